"""Types of the cffi extension, in the part that Python uses.

``lib`` follows ``tls.h``: every call returns ``>= 0`` or ``-errno``.
"""

from typing import Any, Protocol

class _FFI(Protocol):
    NULL: Any
    def new(self, cdecl: str, init: Any = ...) -> Any: ...
    def cast(self, cdecl: str, value: int | Any) -> Any: ...
    def gc(self, cdata: Any, destructor: Any, size: int = ...) -> Any: ...
    def string(self, cdata: Any, maxlen: int = ...) -> bytes: ...

ffi: _FFI
# The declarations themselves are in tls.h; cffi checks each call against them.
lib: Any

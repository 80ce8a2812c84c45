"""TLS for connections to and from page servers, by OpenSSL, in an extension that a build may lack.

``tls.h`` is the contract between C and the thin typed layer over it. Another
extension carries its bytes through ``struct criupy_transport`` (``criupy.h``).
"""

"""Stand-ins that anyone may use to test post-copy migration, with CRIU and without."""

from __future__ import annotations

from criupy.testing.spec import Area, Run, WorkloadSpec, page_bytes

__all__ = ["Area", "Run", "WorkloadSpec", "page_bytes"]

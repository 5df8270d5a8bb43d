"""What the tests' ranks communicate through."""

from __future__ import annotations

import pytest

from colrow.transport.agreement import what_is_lacking, wish

SHARED = not what_is_lacking() and wish() != "gloo"
"""Whether it is shared memory, as it is unless the extension is missing or gloo is asked for."""

needs_extension = pytest.mark.skipif(bool(what_is_lacking()), reason=what_is_lacking() or "it is there")
needs_shared_memory = pytest.mark.skipif(not SHARED, reason="the ranks communicate through gloo")

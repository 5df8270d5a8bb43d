"""Collectives in shared memory between the ranks of a host; gloo serves between hosts and where that fails.

Importing this makes the backend ``shm`` known to ``torch.distributed``.
"""

from colrow.transport.agreement import wish
from colrow.transport.c10d import BACKEND, register, share_memory
from colrow.transport.errors import TransportError
from colrow.transport.group import SharedGroup
from colrow.transport.hierarchy import HierarchicalGroup
from colrow.transport.rendezvous import Memory, join

__all__ = [
    "BACKEND",
    "HierarchicalGroup",
    "Memory",
    "SharedGroup",
    "TransportError",
    "join",
    "share_memory",
    "wish",
]

register()

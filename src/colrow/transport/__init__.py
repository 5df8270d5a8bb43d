"""Collectives in shared memory between the ranks of one host. Where they are impossible, gloo serves.

Importing this makes the backend ``shm`` known to ``torch.distributed``.
"""

from colrow.transport.agreement import wish
from colrow.transport.c10d import BACKEND, register, share_memory
from colrow.transport.errors import TransportError
from colrow.transport.group import SharedGroup
from colrow.transport.rendezvous import join

__all__ = ["BACKEND", "SharedGroup", "TransportError", "join", "share_memory", "wish"]

register()

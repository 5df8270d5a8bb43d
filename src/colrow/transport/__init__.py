"""Collectives in shared memory between the ranks of one host. Where they are impossible, gloo serves."""

from colrow.transport.errors import TransportError
from colrow.transport.group import SharedGroup
from colrow.transport.rendezvous import join

__all__ = ["SharedGroup", "TransportError", "join"]

"""Context parallelism: every sequence is cut over the ranks of the mesh dimension ``cp``."""

from colrow.parallel.context.attention import Method, context_attention
from colrow.parallel.context.results import ShardedSequence
from colrow.parallel.context.share import Order, SequenceShare

__all__ = ["Method", "Order", "SequenceShare", "ShardedSequence", "context_attention"]

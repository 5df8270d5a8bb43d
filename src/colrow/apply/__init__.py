"""Applying a plan: parameters sharded in place, layers and hooks that communicate, local integers."""

from colrow.apply.loss import ShardedLogits
from colrow.apply.parallelize import parallelize

__all__ = ["ShardedLogits", "parallelize"]

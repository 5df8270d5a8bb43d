"""Applying a plan: parameters sharded in place, layers and hooks that communicate, local integers."""

from colrow.apply.loss import ShardedLogits
from colrow.apply.parallelize import parallelize
from colrow.apply.unshard import unshard

__all__ = ["ShardedLogits", "parallelize", "unshard"]

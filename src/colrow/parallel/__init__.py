"""The other dimensions of a mesh: replicas that share the data."""

from colrow.parallel.data import data_parallel, no_gradient_sync
from colrow.parallel.tokens import token_weight
from colrow.parallel.zero import zero_redundancy_optimizer

__all__ = ["data_parallel", "no_gradient_sync", "token_weight", "zero_redundancy_optimizer"]

"""The other dimensions of a mesh: replicas that share the data, and stages that share the layers."""

from colrow.parallel.data import data_parallel, no_gradient_sync
from colrow.parallel.pipeline import Pipeline, pipeline_parallel
from colrow.parallel.tokens import token_weight
from colrow.parallel.zero import zero_redundancy_optimizer

__all__ = [
    "Pipeline",
    "data_parallel",
    "no_gradient_sync",
    "pipeline_parallel",
    "token_weight",
    "zero_redundancy_optimizer",
]

"""Parallel layers, for use by hand and by ``colrow.parallelize``."""

from colrow.layers.cross_entropy import cross_entropy
from colrow.layers.embedding import VocabParallelEmbedding
from colrow.layers.entry import SharedEntry
from colrow.layers.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_parallel,
    row_parallel,
)
from colrow.layers.linear_cross_entropy import linear_cross_entropy
from colrow.layers.local import make_local, multiply_faster
from colrow.layers.lookup import lookup

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "SharedEntry",
    "VocabParallelEmbedding",
    "column_parallel",
    "cross_entropy",
    "linear_cross_entropy",
    "lookup",
    "make_local",
    "multiply_faster",
    "row_parallel",
]

"""Cuts of axes, layouts of dimensions and tensors. Pure arithmetic: knows nothing of processes."""

from colrow.layout.cut import Cut
from colrow.layout.dimension import DimensionLayout, Segment
from colrow.layout.tensor import TensorLayout

__all__ = ["Cut", "DimensionLayout", "Segment", "TensorLayout"]

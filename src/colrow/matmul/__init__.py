"""Distributed matrix products: by columns, by rows, and on a 2D grid of ranks (SUMMA)."""

from colrow.matmul.grid import Grid
from colrow.matmul.product import matmul
from colrow.matmul.result import MatmulResult

__all__ = ["Grid", "MatmulResult", "matmul"]

"""Tensor parallelism for PyTorch that derives, proves and predicts."""

from colrow.collectives import comm_stats, reset_comm_stats
from colrow.errors import PlanError, RankFailure
from colrow.mesh import init_mesh

__all__ = ["PlanError", "RankFailure", "comm_stats", "init_mesh", "reset_comm_stats"]

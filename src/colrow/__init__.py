"""Tensor parallelism for PyTorch that derives, proves and predicts."""

from colrow.apply import ShardedLogits, parallelize, unshard
from colrow.axes import rule
from colrow.checkpoint import load_optimizer, load_pretrained, save_optimizer, save_pretrained
from colrow.collectives import comm_stats, reset_comm_stats
from colrow.errors import PlanError, PlanWarning, RankFailure
from colrow.layers import cross_entropy
from colrow.matmul import Grid, MatmulResult, matmul
from colrow.mesh import init_mesh, mesh_table
from colrow.parallel import (
    Pipeline,
    data_parallel,
    no_gradient_sync,
    pipeline_parallel,
    token_weight,
    zero_redundancy_optimizer,
)
from colrow.parallel.context import SequenceShare, ShardedSequence, context_attention
from colrow.parallel.experts import expert_loads, reset_expert_loads
from colrow.parameters import ParameterCount, clip_grad_norm_, count_parameters, global_grad_norm
from colrow.plan import HandPlan, Plan, derive_plan
from colrow.randomness import manual_seed
from colrow.replicas import check_replicas
from colrow.state import state_of
from colrow.verify import VerificationError, verify, verify_on_ranks

__all__ = [
    "Grid",
    "HandPlan",
    "MatmulResult",
    "ParameterCount",
    "Pipeline",
    "Plan",
    "PlanError",
    "PlanWarning",
    "RankFailure",
    "SequenceShare",
    "ShardedLogits",
    "ShardedSequence",
    "VerificationError",
    "check_replicas",
    "clip_grad_norm_",
    "comm_stats",
    "context_attention",
    "count_parameters",
    "cross_entropy",
    "data_parallel",
    "derive_plan",
    "expert_loads",
    "global_grad_norm",
    "init_mesh",
    "load_optimizer",
    "load_pretrained",
    "manual_seed",
    "matmul",
    "mesh_table",
    "no_gradient_sync",
    "parallelize",
    "pipeline_parallel",
    "reset_comm_stats",
    "reset_expert_loads",
    "rule",
    "save_optimizer",
    "save_pretrained",
    "state_of",
    "token_weight",
    "unshard",
    "verify",
    "verify_on_ranks",
    "zero_redundancy_optimizer",
]

"""Experts divided over the ranks of ``ep``: tokens travel to the rank that holds the expert they chose."""

from colrow.parallel.experts.apply import (
    axes_over_experts,
    find_for,
    give_experts,
    prepare,
    take_experts_back,
)
from colrow.parallel.experts.loads import expert_loads, reset_expert_loads

__all__ = [
    "axes_over_experts",
    "expert_loads",
    "find_for",
    "give_experts",
    "prepare",
    "reset_expert_loads",
    "take_experts_back",
]

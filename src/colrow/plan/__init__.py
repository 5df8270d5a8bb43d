"""Plans as data: written by hand here; printed, compared and applied elsewhere."""

from colrow.plan.examples import BERT, GPT2, LLAMA, default_plan, hand_plan
from colrow.plan.hand import AxisSpec, HandPlan, LossSpec, Style, column, replicated, row, vocab
from colrow.plan.plan import (
    Axis,
    Entry,
    Exit,
    LocalAttribute,
    Lookup,
    Loss,
    PartialParameter,
    Plan,
    Sharding,
)

__all__ = [
    "BERT",
    "GPT2",
    "LLAMA",
    "Axis",
    "AxisSpec",
    "Entry",
    "Exit",
    "HandPlan",
    "LocalAttribute",
    "Lookup",
    "Loss",
    "LossSpec",
    "PartialParameter",
    "Plan",
    "Sharding",
    "Style",
    "column",
    "default_plan",
    "hand_plan",
    "replicated",
    "row",
    "vocab",
]

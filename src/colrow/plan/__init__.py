"""Plans as data: written by hand here; printed, compared and applied elsewhere."""

from colrow.plan.derive import derive_plan
from colrow.plan.examples import BERT, GPT2, LLAMA
from colrow.plan.hand import AxisSpec, HandPlan, LossSpec, Style, column, replicated, row, vocab
from colrow.plan.places import Call, CallArgument, CallResult, ModuleInput, ModuleOutput, Place
from colrow.plan.plan import (
    Axis,
    Entry,
    Exit,
    Gather,
    LocalAttribute,
    LocalInteger,
    Lookup,
    Loss,
    OnceParameter,
    OwnRandomness,
    PartialParameter,
    PartSlice,
    Plan,
    Sharding,
)
from colrow.plan.prediction import PredictedCollective, Prediction

__all__ = [
    "BERT",
    "GPT2",
    "LLAMA",
    "Axis",
    "AxisSpec",
    "Call",
    "CallArgument",
    "CallResult",
    "Entry",
    "Exit",
    "Gather",
    "HandPlan",
    "LocalAttribute",
    "LocalInteger",
    "Lookup",
    "Loss",
    "LossSpec",
    "ModuleInput",
    "ModuleOutput",
    "OnceParameter",
    "OwnRandomness",
    "PartSlice",
    "PartialParameter",
    "Place",
    "Plan",
    "PredictedCollective",
    "Prediction",
    "Sharding",
    "Style",
    "column",
    "derive_plan",
    "replicated",
    "row",
    "vocab",
]

"""transformers' own tensor parallelism, from the plan that it ships for a type of model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

from ..shapes import Case
from .trainer import Trainer, dtype_of, folder_of_model

LOADED = (GPT2LMHeadModel, LlamaForCausalLM)
"""Classes that are imported when they are first named: now, so that they count as the interpreter's own."""


def build(case: Case, folder: Path) -> Trainer:
    model = AutoModelForCausalLM.from_pretrained(
        folder_of_model(folder, case), dtype=dtype_of(case), distributed_config={"tp_plan": "auto"}
    )
    return Trainer(model)

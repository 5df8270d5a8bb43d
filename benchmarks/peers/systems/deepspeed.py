"""DeepSpeed's AutoTP training, on transformers' models.

Its shared-memory operator is compiled at the first start, without a word; in training its layers use gloo.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

from ..shapes import Case
from .trainer import LEARNING_RATE, WEIGHT_DECAY, Trainer, dtype_of, folder_of_model

LOADED = (GPT2LMHeadModel, LlamaForCausalLM)
"""Classes that are imported when they are first named: now, so that they count as the interpreter's own."""


class DeepspeedTrainer(Trainer):
    def __init__(self, engine: Any) -> None:
        self.model = self._engine = engine
        self.notes = []

    def step(self, tokens: Tensor) -> Tensor:
        loss = self.loss(tokens)
        self._engine.backward(loss)
        self._engine.step()
        return loss.detach()


def build(case: Case, folder: Path) -> DeepspeedTrainer:
    deepspeed.init_distributed()
    model = AutoModelForCausalLM.from_pretrained(folder_of_model(folder, case), dtype=dtype_of(case)).train()
    optimizer = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "torch_adam": True}
    configuration: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": case.shape.batch,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "AdamW", "params": optimizer},
        "tensor_parallel": {"autotp_size": case.ranks},
        "bf16": {"enabled": case.dtype == "bf16"},  # it trains no bf16 without weights in fp32 beside it
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, config=configuration, model_parameters=model.parameters())
    trainer = DeepspeedTrainer(engine)
    if case.dtype == "bf16":
        trainer.notes.append("keeps weights in fp32 as well")
    return trainer

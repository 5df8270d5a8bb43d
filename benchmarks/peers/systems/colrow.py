"""colrow: the plain model, cut by the plan that is derived from a call of it."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn
from transformers import LlamaForCausalLM

import colrow
from colrow.checkpoint.pretrained import load_weights

from ..shapes import Case
from .counting import Moved
from .models import is_gpt, llama_configuration, plain_model
from .trainer import Trainer, batch, dtype_of, folder_of_model


class ColrowTrainer(Trainer):
    """Counts with colrow's own counters, which see every transport."""

    def count(self, tokens: Tensor) -> Moved:
        colrow.reset_comm_stats()
        self.step(tokens)
        total = colrow.comm_stats().total
        return Moved(total.count, total.bytes)


def parallelized(case: Case, folder: Path, *, sequence: bool = False) -> nn.Module:
    """The model, cut over the ranks; with ``sequence`` along the sequence too, between regions.

    Each rank reads its own parts of a model in Hugging Face layout, as transformers' ``tp_plan`` does.
    """
    mesh = colrow.init_mesh(tp=case.ranks, device="cpu")
    tokens = batch(case, 0)
    calls = {"input_ids": tokens, "labels": tokens}
    if is_gpt(case):
        return colrow.parallelize(plain_model(case, folder).train(), mesh, calls, sequence=sequence)
    with colrow.checkpoint.parameters_on_meta():
        model = nn.Module.to(LlamaForCausalLM(llama_configuration(case.shape)).train(), dtype_of(case))
    colrow.parallelize(model, mesh, calls, sequence=sequence)
    load_weights(model, folder_of_model(folder, case))
    return model


def settings() -> list[str]:
    """What the environment tells colrow to do in another way than it would by itself."""
    return [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("COLROW_")]


def build(case: Case, folder: Path) -> ColrowTrainer:
    trainer = ColrowTrainer(parallelized(case, folder))
    trainer.notes = settings()
    return trainer

"""transformers' Trainer on a cut model trains as plain PyTorch does in one process that has all data."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import colrow
from colrow.model import calls_for
from tests.apply.double import in_double as doubled
from tests.engines import in_double
from tests.engines.job import BATCH, largest_difference, run_example, train_plainly, write_job
from tests.pool import Pool, worker_mesh

pytest.importorskip("accelerate")

from colrow.data_shards import held
from colrow.engines.sharding import Data
from colrow.engines.trainer import Trainer
from tests.engines.in_pool import on_its_own

pytestmark = pytest.mark.slow
SEED = 42
"""Trainer's own default, of the order of the data."""


@pytest.mark.parametrize(("ranks", "data"), [(2, "ddp"), (4, "ddp"), (4, "fsdp")])
def test_the_example(tmp_path: Path, ranks: int, data: str) -> None:
    model, text = write_job(tmp_path, torch.float64)
    out = tmp_path / "out"
    run_example("with_trainer", ranks, model, text, out, environment={"DATA": data})
    lines = text.read_text().splitlines()
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(SEED)).tolist()
    batches = [[lines[one] for one in order[first : first + BATCH]] for first in range(0, len(lines), BATCH)]
    rates = [1e-3 * (1 - step / len(batches)) for step in range(len(batches))]
    with in_double.staying_in_double():
        expected, numbers = train_plainly(model, batches, rates, weight_decay=0.0)
    *steps, whole = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses, norms = zip(*numbers, strict=True)
    # Trainer adds losses up in single precision
    np.testing.assert_allclose([one["loss"] for one in steps], losses, rtol=1e-6)
    np.testing.assert_allclose([one["grad_norm"] for one in steps], norms, rtol=1e-9)
    assert whole["train_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert largest_difference(expected, out) < 1e-9


def _llama(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=20,
        intermediate_size=33,
        num_hidden_layers=1,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=4,
        attention_dropout=dropout,
        use_cache=False,
    )
    return doubled(LlamaForCausalLM(config))


def _rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Ids, of which more or fewer are labels."""
    ids = torch.randint(31, (count, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row in range(count):
        labels[row, : row % 5] = -100
    return [{"input_ids": one, "labels": label} for one, label in zip(ids, labels, strict=True)]


def _trainer(folder: Path, model: nn.Module | None = None, data: Data = "ddp", **options: Any) -> Trainer:
    mesh = worker_mesh(tp=2, dp=2)
    rows = _rows(20)
    model = model or _llama()
    model = colrow.parallelize(model, mesh, calls_for(model))
    metrics = options.pop("compute_metrics", None)
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        **options,
    }
    arguments = TrainingArguments(str(folder), **chosen)
    given: dict[str, Any] = {"train_dataset": rows, "eval_dataset": rows[:10], "compute_metrics": metrics}
    return Trainer(model, arguments, data=data, **given)


def _parameters(trainer: Trainer) -> torch.Tensor:
    return torch.cat([held(one).detach().flatten().clone() for one in trainer.model.parameters()])


def _goes_on(folder: Path, data: Data = "ddp") -> None:
    trainer = _trainer(folder, _llama(dropout=0.3), data)
    trainer.train()
    expected = _parameters(trainer)
    colrow.check_replicas(trainer.model)
    trainer = _trainer(folder, _llama(dropout=0.3), data)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert torch.equal(_parameters(trainer), expected)


def _evaluates(folder: Path) -> None:
    whole = _llama()
    rows = _rows(10)
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"rows": len(prediction.predictions)}

    trainer = _trainer(
        folder, copy.deepcopy(whole), compute_metrics=metrics, include_num_input_tokens_seen="all"
    )
    trainer.accelerator.free_memory()
    found = trainer.evaluate()
    assert found["eval_rows"] == 10
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    np.testing.assert_allclose(seen[0].predictions, whole(ids).logits.detach().numpy(), atol=1e-12)
    np.testing.assert_array_equal(seen[0].label_ids, labels.numpy())
    rows = _rows(12)
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        steps = [whole(input_ids=ids[i : i + 6], labels=labels[i : i + 6]).loss.item() for i in (0, 6)]
    for trainer.args.prediction_loss_only in (False, True):
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(sum(steps) / 2, rel=1e-9)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 4 * 4 * 9  # steps, rows of both replicas, tokens


class _Drawing(Trainer):
    """Every rank draws its own data."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any) -> torch.Tensor:
        rank = self.mesh.get_local_rank("tp")
        return super().training_step(
            model, {**inputs, "input_ids": (inputs["input_ids"] + rank) % 31}, *arguments
        )


def _wrong_calls(folder: Path) -> None:
    with pytest.raises(ValueError, match="on CPUs they need use_cpu=True"):
        _trainer(folder, use_cpu=False)
    with pytest.raises(ValueError, match="batch_rebalance"):
        _trainer(folder, train_sampling_strategy="batch_rebalance")
    with pytest.raises(ValueError, match="has not been parallelized"):
        Trainer(_llama(), TrainingArguments(str(folder), use_cpu=True))
    with pytest.raises(ValueError, match="not model_init"):
        Trainer(model_init=_llama, args=TrainingArguments(str(folder), use_cpu=True))
    trainer = _trainer(folder)
    trainer.__class__ = _Drawing
    with pytest.raises(ValueError, match="ranks of a replica have different batches"):
        trainer.train()


@pytest.mark.parametrize("task", [_goes_on, _evaluates, _wrong_calls])
def test_on_four_ranks(ranks: Callable[[int], Pool], tmp_path: Path, task: Callable[[Path], None]) -> None:
    ranks(4).run(on_its_own, task, tmp_path)


def test_going_on_with_parameters_that_replicas_share(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    ranks(4).run(on_its_own, _goes_on, tmp_path, "fsdp")

"""The optimizer step on cut models: equal to plain PyTorch on one process, at every number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import colrow
from colrow.train.configuration import OptimizerConfiguration
from colrow.train.optimizer import build_optimizer, resume_optimizer
from colrow.train.step import IGNORED, accumulate_gradients, mean_loss, optimizer_step, predicted_tokens
from tests.plans import hand_plan
from tests.pool import Pool, worker_mesh
from tests.train.small import LLAMA

OPTIMIZER = OptimizerConfiguration(learning_rate=3e-3, max_norm=0.5)


def _model(dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=53, attention_dropout=dropout, **LLAMA)).double()


def _batch(step: int, sequences: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(53, (sequences, 16), generator=generator)


def test_predicted_tokens() -> None:
    labels = torch.tensor([[1, 2, 3], [IGNORED, IGNORED, 5]])
    assert predicted_tokens(labels) == 3


def _train(size: int, micro_batch_size: int, max_norm: float | None, steps: int) -> list[tuple[float, float]]:
    mesh = worker_mesh(size)
    model = colrow.parallelize(_model(), mesh, hand_plan(_model()))
    optimizer = build_optimizer(model, OPTIMIZER)
    results = []
    for step in range(steps):
        loss = accumulate_gradients(model, _batch(step), micro_batch_size, "fp64", mesh)
        norm = optimizer_step(model, optimizer, OPTIMIZER.learning_rate, max_norm)
        results.append((float(loss), float(norm)))
    return results


def _reference(max_norm: float | None, steps: int) -> list[tuple[float, float]]:
    """What the PyTorch documentation would write."""
    model = _model()
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n]
    spared = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    results = []
    for step in range(steps):
        loss = model(input_ids=_batch(step), labels=_batch(step)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        results.append((loss.item(), norm.item()))
    return results


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_plain_pytorch(ranks: Callable[[int], Pool], size: int) -> None:
    # 6 sequences as 4 and 2: a mean of means would be wrong
    for micro_batch_size, max_norm in ((6, None), (4, 0.5), (1, None)):
        expected = torch.tensor(_reference(max_norm, 3), dtype=torch.float64)
        for result in ranks(size).run(_train, size, micro_batch_size, max_norm, 3):
            actual = torch.tensor(result, dtype=torch.float64)
            # transformers rounds logits to float32 before the loss
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def _evaluate(size: int) -> list[tuple[float, bool, float]]:
    mesh = worker_mesh(size)
    model = colrow.parallelize(_model(dropout=0.3), mesh, hand_plan(_model()))
    model.train()
    results = []
    for batch_size in (5, 2):
        colrow.manual_seed(3, mesh)
        batches = _batch(0, 5).split(batch_size)
        loss = mean_loss(model, ((one, True) for one in batches), "fp64", torch.device("cpu"), mesh)
        results.append((loss, model.training, float(torch.rand(1))))
    assert all(one.grad is None for one in model.parameters())
    return results


@pytest.mark.parametrize("size", [1, 3])
def test_validation_loss(ranks: Callable[[int], Pool], size: int) -> None:
    model = _model().eval()
    expected = model(input_ids=_batch(0, 5), labels=_batch(0, 5)).loss.item()
    torch.manual_seed(3)
    following = float(torch.rand(1))
    for result in ranks(size).run(_evaluate, size):
        for loss, training, number in result:
            assert loss == pytest.approx(expected, abs=1e-6)
            assert training
            assert number == following  # no random number was drawn


def _precision(size: int, precision: Any) -> tuple[float, float, set[str]]:
    mesh = worker_mesh(size)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = colrow.parallelize(_model().to(dtype), mesh, hand_plan(_model()))
    optimizer = build_optimizer(model, OPTIMIZER)
    first = float(accumulate_gradients(model, _batch(0), 4, precision, mesh))
    for _ in range(10):
        optimizer_step(model, optimizer, 3e-3, 1.0)
        last = float(accumulate_gradients(model, _batch(0), 4, precision, mesh))
    return first, last, {str(one.dtype) for one in model.parameters()}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
def test_half_precision_learns(ranks: Callable[[int], Pool], size: int, precision: str) -> None:
    expected = _reference(None, 1)[0][0]
    results = ranks(size).run(_precision, size, precision)
    for first, last, dtypes in results:
        assert first == pytest.approx(expected, rel=2e-2)
        assert last < first - 0.5
        assert dtypes == {"torch.bfloat16" if precision == "bf16" else "torch.float32"}
        assert (first, last) == results[0][:2]


def _tied(size: int, recompute: bool) -> list[float]:
    mesh = worker_mesh(size)
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=53, n_embd=36, n_layer=2, n_head=3, n_positions=32)
    model = GPT2LMHeadModel(config).double()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    colrow.parallelize(model, mesh, hand_plan(model))
    model.train()
    optimizer = build_optimizer(model, OPTIMIZER)
    losses = []
    for step in range(3):
        colrow.manual_seed(step, mesh)
        losses.append(float(accumulate_gradients(model, _batch(step), 3, "fp64", mesh)))
        optimizer_step(model, optimizer, 3e-3, 1.0)
    return losses


@pytest.mark.parametrize("size", [1, 2, 3])
def test_recomputed_activations_replay_dropout(ranks: Callable[[int], Pool], size: int) -> None:
    # GPT-2 drops out by default, inside of regions and outside
    expected = ranks(size).run(_tied, size, False)
    assert ranks(size).run(_tied, size, True) == expected
    assert len({tuple(one) for one in expected}) == 1


def _resumed(folder: Path) -> None:
    mesh = worker_mesh(1)
    model = colrow.parallelize(_model(), mesh, hand_plan(_model()))
    optimizer = build_optimizer(model, OPTIMIZER)
    accumulate_gradients(model, _batch(0), 6, "fp64", mesh)
    optimizer_step(model, optimizer, 1e-3, None)
    colrow.save_optimizer(model, optimizer, folder)
    other = build_optimizer(model, OptimizerConfiguration(weight_decay=0.3, betas=(0.5, 0.6)))
    resume_optimizer(model, other, folder)
    assert [group["weight_decay"] for group in other.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.5, 0.6) for group in other.param_groups)
    for parameter in model.parameters():
        assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
        assert other.state[parameter]["step"] == 1


def test_a_run_goes_on_with_the_options_of_its_configuration(
    ranks: Callable[[int], Pool], tmp_path: Path
) -> None:
    ranks(1).run(_resumed, tmp_path)


def _head_alone(folder: Path) -> list[int]:
    mesh = worker_mesh(1, pp=2)
    batch = {"input_ids": _batch(0), "labels": _batch(0)}
    pipeline = colrow.pipeline_parallel(_untied(), mesh, batch, micro_batches=2, stages=["lm_head"])
    optimizer = build_optimizer(pipeline, OPTIMIZER)
    accumulate_gradients(pipeline, _batch(0), 3, "fp64", mesh)
    optimizer_step(pipeline, optimizer, 1e-3, None)
    colrow.save_optimizer(pipeline, optimizer, folder)
    colrow.load_optimizer(pipeline, optimizer, folder)
    return [len(group["params"]) for group in optimizer.param_groups]


def _untied() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=53, **LLAMA | {"tie_word_embeddings": False})).double()


def test_a_stage_without_norms_is_saved(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    assert ranks(2).run(_head_alone, tmp_path)[1] == [1, 0]

"""The flagship: a real Llama with 9 heads and 3 key-value heads over 2, 3 and 4 ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import colrow
from colrow.cli.generate import PROMPTS
from colrow.generation.smollm2 import smollm2_folder
from colrow.generation.text import Generated, Sampling, on_one_process, on_ranks
from tests.apply.comparison import assemble, largest_error
from tests.apply.double import in_double
from tests.pool import Pool, worker_mesh


@pytest.fixture(scope="session")
def folder() -> Path:
    return smollm2_folder()


def _generate(size: int, folder: Path, prompts: list[str], sampling: Sampling) -> Generated:
    worker_mesh(size)
    return on_ranks(folder, prompts, sampling, size, timeout=60.0)


@pytest.mark.parametrize(
    "size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_the_same_forty_tokens(ranks: Callable[[int], Pool], folder: Path, size: int) -> None:
    prompts = list(PROMPTS) if size > 2 else list(PROMPTS[:1])
    sampling = Sampling(max_new_tokens=40, min_new_tokens=40)
    expected = on_one_process(folder, prompts, sampling)
    assert "Paris" in expected.continuations[0].text
    for found in ranks(size).run(_generate, size, folder, prompts, sampling, timeout=500.0):
        assert found.continuations == expected.continuations
        assert all(len(one.tokens) == 40 for one in found.continuations)
        assert found.total_bytes == expected.total_bytes
        assert found.local_bytes < 0.7 * found.total_bytes


def _gradients(size: int, folder: Path) -> dict[str, Any]:
    """One training step in float64: every gradient of the whole model, assembled from the ranks' shards."""
    mesh = worker_mesh(size)
    model = in_double(colrow.load_pretrained(folder, mesh, dtype=torch.float64).train())
    ids = torch.tensor([[504, 3575, 282, 4649, 314, 7042, 30, 198]])
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = assemble(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    if colrow.state_of(model).communicator.rank:
        return {}
    original = in_double(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).train())
    expected = original(ids, labels=ids).loss
    expected.backward()
    errors = {}
    for name, parameter in original.named_parameters():
        assert parameter.grad is not None
        errors[name] = largest_error(gradients[name], parameter.grad)
    return {"loss": abs(loss.item() - expected.item()), "worst": max(errors.values()), "count": len(errors)}


@pytest.mark.parametrize("size", [pytest.param(size, marks=pytest.mark.slow) for size in (2, 3, 4)])
def test_all_gradients_of_a_training_step(ranks: Callable[[int], Pool], folder: Path, size: int) -> None:
    result = ranks(size).run(_gradients, size, folder, timeout=500.0)[0]
    assert result["loss"] < 1e-9
    assert result["count"] == 272
    assert result["worst"] < 1e-9, result

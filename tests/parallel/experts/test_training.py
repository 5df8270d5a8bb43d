"""Experts over ``ep`` train as in one process that has all data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import colrow
from colrow.state import state_of
from colrow.verify.precision import one_precision
from tests.apply.comparison import largest_error
from tests.parallel.experts.models import VOCABULARY, deepseek, mixtral, qwen
from tests.parallel.experts.training import Way, resume_alike, train_alike
from tests.pool import Pool, worker_mesh

CASES = [
    pytest.param(mixtral, 1, 1, 2, "ddp", id="mixtral"),
    pytest.param(qwen, 2, 1, 2, "ddp", id="qwen-tp"),
    pytest.param(deepseek, 1, 2, 2, "fsdp", id="deepseek-fsdp"),
    pytest.param(partial(mixtral, 5), 1, 1, 3, "ddp", id="uneven"),
    pytest.param(mixtral, 1, 2, 2, "ddp", id="mixtral-dp"),
    pytest.param(partial(mixtral, 5), 1, 2, 2, "zero1", id="uneven-zero"),
]


@pytest.mark.parametrize(("build", "tp", "dp", "ep", "kind"), CASES)
def test_as_one_process(
    ranks: Callable[[int], Pool], build: Callable[[], nn.Module], tp: int, dp: int, ep: int, kind: Way
) -> None:
    ranks(tp * dp * ep).run(train_alike, build, tp, dp, ep, kind, None)


def test_files_go_on_in_other_layouts(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    ranks(4).run(train_alike, mixtral, 2, 1, 2, "ddp", tmp_path)
    ranks(4).run(resume_alike, mixtral, 1, 2, 2, "fsdp", tmp_path, 2)
    ranks(2).run(resume_alike, mixtral, 2, 1, 1, "ddp", tmp_path, 2)


@pytest.mark.slow
def test_sharded_files_go_on_too(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    build = partial(mixtral, 5)
    ranks(4).run(train_alike, build, 1, 2, 2, "fsdp", tmp_path)
    ranks(3).run(resume_alike, build, 1, 1, 3, "ddp", tmp_path, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"), [((1, 2, 2, "zero1"), (2, 1, 2, "ddp")), ((2, 1, 2, "ddp"), (1, 2, 2, "zero1"))]
)
def test_divided_states_go_on_too(
    ranks: Callable[[int], Pool],
    one: tuple[int, int, int, Way],
    other: tuple[int, int, int, Way],
    tmp_path: Path,
) -> None:
    build = partial(mixtral, 5)
    ranks(4).run(train_alike, build, *one, tmp_path)
    ranks(4).run(resume_alike, build, *other, tmp_path, one[1] * one[2])
    ranks(2).run(resume_alike, build, 1, 1, 2, "zero1", tmp_path, one[1] * one[2])


def _loaded(folder: Path) -> None:
    mesh = worker_mesh(tp=1, ep=2)
    with one_precision():
        options = {"dtype": torch.float64, "experts_implementation": "eager"}
        ids = torch.randint(VOCABULARY, (2, 7))
        model = colrow.parallelize(mixtral(), mesh, {"input_ids": ids})
        colrow.save_pretrained(model, folder)
        loaded = colrow.load_pretrained(folder, mesh, state_of(model).plan, **options)
        original = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        assert largest_error(loaded(input_ids=ids).logits, original(input_ids=ids).logits) < 1e-9


@pytest.mark.slow
def test_load_pretrained(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    ranks(2).run(_loaded, tmp_path)

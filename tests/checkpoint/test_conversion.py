"""Checkpoints that transformers has written with one tensor for each expert are read in the model's form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import colrow
from colrow.state import parallel_module, placed_parameters, state_of
from tests.parallel.experts.models import deepseek, mixtral, qwen
from tests.pool import Pool, worker_mesh

OPTIONS: dict[str, Any] = {"dtype": torch.float64, "experts_implementation": "eager"}
BUILDERS = {"mixtral": mixtral, "qwen": qwen, "deepseek": deepseek}


def _loaded(folder: Path, sizes: dict[str, int]) -> int:
    mesh = worker_mesh(**{"tp": 1, **sizes})
    pipeline = {"schedule": "gpipe", "micro_batches": 2} if "pp" in sizes else None
    model = colrow.load_pretrained(folder, mesh, pipeline=pipeline, **OPTIONS)
    original = dict(AutoModelForCausalLM.from_pretrained(folder, **OPTIONS).named_parameters())
    rank = state_of(model).communicator.rank
    placed = list(placed_parameters(parallel_module(model)))
    for one in placed:
        part = original[one.name].detach()
        for dimension in range(part.dim()):
            indices = [torch.arange(*ends) for ends in one.layout.ranges(dimension, rank)]
            part = part.index_select(dimension, torch.cat(indices))
        assert torch.equal(part, one.parameter.detach()), one.name
    return len(placed)


@pytest.mark.filterwarnings("error:.*has tensors that the model does not")
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mixtral", {"tp": 2}),
        pytest.param("deepseek", {"ep": 2}, marks=pytest.mark.slow),
        pytest.param("qwen", {"pp": 2}, marks=pytest.mark.slow),
        pytest.param("mixtral", {"ep": 2, "tp": 2}, marks=pytest.mark.slow),
        pytest.param("deepseek", {"pp": 2, "tp": 2}, marks=pytest.mark.slow),
        pytest.param("qwen", {"ep": 2, "tp": 2}, marks=pytest.mark.slow),
    ],
)
def test_one_tensor_for_each_expert(
    ranks: Callable[[int], Pool], name: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    BUILDERS[name]().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "model.layers.1.mlp.experts.down_proj" not in set(file.keys())
    size = 2 * len(sizes)
    found = ranks(size).run(_loaded, tmp_path, sizes)
    assert min(found) > 10


def _refused(folder: Path) -> str:
    with pytest.raises(ValueError) as raised:
        colrow.load_pretrained(folder, worker_mesh(2), **OPTIONS)
    return str(raised.value)


def test_what_is_missing_is_named(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    model = mixtral()
    state = model.state_dict()
    del state["model.layers.1.mlp.experts.down_proj"]
    model.save_pretrained(tmp_path, state_dict=state)
    assert (
        "lacks 1 of the model's weights: model.layers.1.mlp.experts.down_proj"
        in (ranks(2).run(_refused, tmp_path)[0])
    )


def test_quantized_weights_are_refused(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "fp8"}})
    )
    assert "are quantized, which only transformers reads" in ranks(2).run(_refused, tmp_path)[0]

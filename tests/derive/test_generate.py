"""Generation with a cache gives the tokens of the original; unsharded, the model is the original."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import colrow
from tests.benchmarks.builders import load
from tests.pool import Pool, worker_mesh

MODELS = ["gpt2", "llama", "llama-two-groups", "bloom", "falcon-one-group", "t5"]


def _generate(name: str, ranks: int) -> tuple[list[list[int]], list[list[int]]]:
    model, inputs = load("listed").build(name)
    model.float().eval()
    ids: Tensor = inputs["input_ids"]
    original = copy.deepcopy(model)
    colrow.parallelize(model, worker_mesh(ranks), inputs)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, **options)
    expected = original.generate(ids, **options)
    _unshard(model, original, inputs)
    return found.tolist(), expected.tolist()


def _unshard(model: torch.nn.Module, original: torch.nn.Module, inputs: dict[str, Tensor]) -> None:
    assert colrow.unshard(model) is model
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in original.state_dict().items())
    assert [type(one) for one in model.modules()] == [type(one) for one in original.modules()]
    for module, other in zip(model.modules(), original.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys(), f"{vars(module).keys() ^ vars(other).keys()}"
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], original(**inputs)[0])
    with pytest.raises(ValueError, match="has not been parallelized"):
        colrow.unshard(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_same_tokens(ranks: Callable[[int], Pool], name: str, size: int) -> None:
    for found, expected in ranks(size).run(_generate, name, size, timeout=120):
        assert found == expected

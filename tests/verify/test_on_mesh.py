"""Training on meshes of more dimensions than tp: what is equal, and errors that must be found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import colrow
from colrow.mesh import replicas
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from colrow.verify.on_mesh import Data
from tests.pool import Pool, worker_mesh
from tests.verify import models


def _example() -> Example:
    ids = torch.randint(models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    return Example(keywords={"input_ids": ids, "labels": ids})


def _verify(name: str, sizes: Mapping[str, int], data: Data) -> Report:
    example = {"training": _example()}
    mesh = worker_mesh(**{"tp": 1, **sizes})
    return verify_on_ranks(getattr(models, name), example, mesh, data=data, steps=2)


@pytest.mark.parametrize(
    ("name", "sizes", "data"),
    [
        ("llama", {"dp": 2, "tp": 2}, "ddp"),
        pytest.param("gpt2", {"dp": 2, "tp": 2}, "fsdp", marks=pytest.mark.slow),
        ("llama", {"dp": 3}, "zero1"),
        ("gpt2", {"pp": 2, "tp": 2}, "ddp"),
        pytest.param("llama", {"pp": 2, "dp": 2}, "zero1", marks=pytest.mark.slow),
        ("gpt2", {"cp": 2, "tp": 2}, "ddp"),
        ("mixtral", {"ep": 2, "tp": 2}, "fsdp"),
        pytest.param("mixtral", {"pp": 2, "ep": 2}, "fsdp", marks=pytest.mark.slow),
        ("gpt2", {"pp": 2, "cp": 2}, "ddp"),
    ],
)
def test_equal(ranks: Callable[[int], Pool], name: str, sizes: dict[str, int], data: Data) -> None:
    count = prod(sizes.values())
    for report in ranks(count).run(_verify, name, sizes, data):
        assert report.passed, str(report)
        assert report.ranks == count
        kinds = {(check.stage, check.kind) for check in report.checks}
        assert {("step 2", "gradients"), ("step 2", "norm"), ("step 2", "parameters")} <= kinds
        assert all(f"{name}={size}" in str(report) for name, size in sizes.items())


def _of_own_data_only() -> Report:
    """What if replicas were not to average?"""

    def alone(model: nn.Module, mesh: object, kind: object = None) -> nn.Module:
        return model

    with patch("colrow.verify.on_mesh.data_parallel", alone):
        return _verify("llama", {"dp": 2, "tp": 2}, "ddp")


def _of_one_layer_not() -> Report:
    """What if one parameter's gradient were left out of the average?"""

    def partly(model: nn.Module, mesh: DeviceMesh, kind: object = None) -> nn.Module:
        last = [name for name, _ in model.named_parameters()][-1]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [last])
        return nn.parallel.DistributedDataParallel(model, process_group=replicas(mesh).get_group())

    with patch("colrow.verify.on_mesh.data_parallel", partly):
        return _verify("gpt2", {"dp": 2, "tp": 2}, "ddp")


@pytest.mark.parametrize(("mistake", "least"), [(_of_own_data_only, 15), (_of_one_layer_not, 1)])
def test_mistakes_are_found(ranks: Callable[[int], Pool], mistake: Callable[[], Report], least: int) -> None:
    for report in ranks(4).run(mistake):
        assert not report.exact
        first = [one for one in report.failed if one.stage == "step 1" and one.kind == "gradients"]
        assert len(first) >= least
        assert all(one.error > 1e-3 for one in first)


def _without_training() -> str:
    example = {"evaluation": _example()}
    with pytest.raises(ValueError) as raised:
        verify_on_ranks(models.llama, example, worker_mesh(dp=2, tp=1))
    return str(raised.value)


def _without_loss() -> str:
    example = {"training": Example(keywords={"input_ids": torch.randint(models.VOCABULARY, (2, 5))})}
    with pytest.raises(ValueError) as raised:
        verify_on_ranks(models.llama, example, worker_mesh(dp=2, tp=1), steps=1)
    return str(raised.value)


def test_what_cannot_be_verified(ranks: Callable[[int], Pool]) -> None:
    assert "give an example of it, with labels" in ranks(2).run(_without_training)[0]
    assert "the model gives no loss" in ranks(2).run(_without_loss)[0]


def test_a_mesh_in_the_call() -> None:
    report = colrow.verify(models.gpt2, {"training": _example()}, {"dp": 2}, data="ddp", steps=1, timeout=120)
    assert report.passed, str(report)

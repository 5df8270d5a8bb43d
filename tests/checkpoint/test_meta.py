"""Loading into a model without memory: the objects stay, so that what was made for them goes on to work."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import colrow
from colrow import checkpoint
from colrow.checkpoint import parameters_on_meta
from colrow.checkpoint.meta import materialise
from tests.checkpoint.perceptron import PLAN, cut, train
from tests.pool import Pool, worker_mesh


def _on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


def _optimizer_before_loading(size: int, folder: Path) -> None:
    mesh = worker_mesh(size)
    expected = cut(mesh)
    checkpoint.save_pretrained(expected, folder)
    model = _on_meta()
    model[2].bias.requires_grad_(False)
    colrow.parallelize(model, mesh, PLAN)
    fired: list[str] = []
    weight = model[0].weight
    weight.mark = "kept"  # type: ignore[attr-defined]
    handle = weight.register_hook(lambda gradient: gradient * 2)
    weight.register_post_accumulate_grad_hook(lambda parameter: fired.append(str(parameter.shape)))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint.load_weights(model, folder)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert model[0].weight.mark == "kept"  # type: ignore[attr-defined]
    assert not model[2].bias.requires_grad
    original = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, original[name]), name
    start = original["0.weight"].detach().clone()
    train(model, optimizer)
    train(expected, torch.optim.SGD(expected.parameters(), lr=0.1))
    moved, once = weight.detach() - start, original["0.weight"].detach() - start
    assert torch.allclose(moved, 2 * once)  # the optimizer trains it, and the hook doubles its gradient
    assert once.abs().max() > 1e-3
    assert torch.equal(model[2].weight, original["2.weight"])
    assert fired == [str(weight.shape)]
    handle.remove()
    optimizer.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    assert weight.grad is not None
    doubled = weight.grad.clone()
    weight.register_hook(lambda gradient: gradient * 2)
    optimizer.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    assert torch.equal(weight.grad, 2 * doubled)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_optimizer_and_hooks_made_before_loading(
    ranks: Callable[[int], Pool], tmp_path: Path, size: int
) -> None:
    ranks(size).run(_optimizer_before_loading, size, tmp_path)


def _weak_reference(folder: Path) -> None:
    mesh = worker_mesh(2)
    checkpoint.save_pretrained(cut(mesh), folder)
    model = colrow.parallelize(_on_meta(), mesh, PLAN)
    reference = weakref.ref(model[0].weight)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"0\.weight on the meta device .* weak references"):
        checkpoint.load_weights(model, folder)
    assert reference() is not None


def test_memory_that_something_refers_to(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    ranks(2).run(_weak_reference, tmp_path)


def _buffers(folder: Path) -> None:
    mesh = worker_mesh(2)
    model = cut(mesh)
    checkpoint.save_pretrained(model, folder / "without")
    model.register_buffer("running", torch.tensor([3, 4]))
    checkpoint.save_pretrained(model, folder / "with")
    lacking = cut(mesh)
    lacking.register_buffer("running", torch.tensor([7, 7]))
    first = lacking[0].weight  # type: ignore[index]
    with torch.no_grad():
        first.fill_(9)
    with pytest.raises(ValueError, match="lacks 1 of the model's weights: running"):
        checkpoint.load_weights(lacking, folder / "without")
    assert torch.equal(first, torch.full_like(first, 9))  # nothing was loaded
    lacking.register_buffer("scratch", torch.zeros(1), persistent=False)
    checkpoint.load_weights(lacking, folder / "with")
    assert lacking.running.tolist() == [3, 4]  # type: ignore[union-attr, operator]
    on_meta = _on_meta()
    on_meta.register_buffer("running", torch.zeros(2, dtype=torch.int64, device="meta"))
    colrow.parallelize(on_meta, mesh, PLAN)
    checkpoint.load_weights(on_meta, folder / "with")
    assert on_meta.running.tolist() == [3, 4]  # type: ignore[union-attr, operator]
    lost = _on_meta()
    lost.register_buffer("frequencies", torch.zeros(2, device="meta"), persistent=False)
    colrow.parallelize(lost, mesh, PLAN)
    with pytest.raises(ValueError, match=r"do not hold them: frequencies\. Build the model in .*on_meta"):
        checkpoint.load_weights(lost, folder / "without")


def test_buffers(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    ranks(2).run(_buffers, tmp_path)


def test_parameters_on_meta_ends() -> None:
    register = nn.Module.register_parameter
    with parameters_on_meta():
        model = nn.BatchNorm1d(3)
    assert model.weight.is_meta
    assert not model.running_mean.is_meta  # type: ignore[union-attr]

    def fails() -> None:
        with parameters_on_meta():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert nn.Module.register_parameter is register
    assert not nn.Linear(2, 2).weight.is_meta


def test_cycles_that_refer_to_a_parameter_are_collected() -> None:
    """What has been recorded of a model may have been dropped, and not been collected yet."""
    layer = nn.Linear(3, 2, device="meta")
    output = layer(torch.ones(1, 3, device="meta"))
    cycle: list[object] = [output, layer.weight.view(6)]
    cycle.append(cycle)
    del output, cycle
    materialise(layer.weight, torch.ones(2, 3), "weight")
    assert layer.weight.sum() == 6

"""Linear layers that read one value, called in every way that a program may, in float64 on real ranks."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import colrow
from colrow.collectives import communicator
from colrow.layers import SharedEntry, column_parallel, siblings
from colrow.layers.linear import ColumnParallel
from colrow.layout import Cut, DimensionLayout, TensorLayout
from tests.pool import Pool, worker_mesh

WIDTH, UNITS = 6, 5
FEATURES = {"q": 4 * UNITS, "k": 2 * UNITS, "v": UNITS}
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}

Results = list[tuple[str, Tensor]]


class Layers(nn.Module):
    """Queries, keys and values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        for name, features in FEATURES.items():
            bias = name != "k"
            linear = Conv1D(features, WIDTH) if kind == "conv1d" else nn.Linear(WIDTH, features, bias)
            self.add_module(name, linear)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def results(self, value: Tensor, names: str = "qkv") -> Results:
        return [(name, self.get_submodule(name)(value)) for name in names]


def all_of_one(layers: Layers, a: Tensor, b: Tensor) -> Results:
    return layers.results(a)


def some(layers: Layers, a: Tensor, b: Tensor) -> Results:
    return layers.results(a, "qv")


def results_without_use(layers: Layers, a: Tensor, b: Tensor) -> Results:
    return layers.results(a)[1:]


def again(layers: Layers, a: Tensor, b: Tensor) -> Results:
    return layers.results(a, "qqkvqk")


def two_values(layers: Layers, a: Tensor, b: Tensor) -> Results:
    return layers.results(a, "q") + layers.results(b, "kv")


def in_turn(layers: Layers, a: Tensor, b: Tensor) -> Results:
    return [one for name in "qkv" for value in (a, b) for one in layers.results(value, name)]


def without_gradients_first(layers: Layers, a: Tensor, b: Tensor) -> Results:
    with torch.no_grad():
        first = layers.results(a, "qk")
    return first + layers.results(a)


def without_gradients_between(layers: Layers, a: Tensor, b: Tensor) -> Results:
    first = layers.results(a, "q")
    with torch.no_grad():
        second = layers.results(a, "k")
    return first + second + layers.results(a, "v")


def evaluation(layers: Layers, a: Tensor, b: Tensor) -> Results:
    layers.eval()
    with torch.inference_mode():
        layers.results(a)
    return layers.results(a)


def written_into(layers: Layers, a: Tensor, b: Tensor) -> Results:
    results = layers.results(a)
    for number, (_, result) in enumerate(results):
        result.mul_(number + 2).add_(1)
    return results


def changed_value(layers: Layers, a: Tensor, b: Tensor) -> Results:
    for one in layers.parameters():
        one.requires_grad_(False)  # or the first layer would miss the value as it was
    value = a * 1
    first = layers.results(value, "q")
    value.add_(b)
    return first + layers.results(value, "kv")


def frozen_weights(layers: Layers, a: Tensor, b: Tensor) -> Results:
    layers.q.weight.requires_grad_(False)
    layers.v.bias.requires_grad_(False)
    return layers.results(a)


def frozen(layers: Layers, a: Tensor, b: Tensor) -> Results:
    layers.requires_grad_(False)
    return layers.results(a)


def constant_value(layers: Layers, a: Tensor, b: Tensor) -> Results:
    return layers.results(a.detach())


def tied(layers: Layers, a: Tensor, b: Tensor) -> Results:
    queries, keys = layers.get_submodule("q"), layers.get_submodule("k")
    keys.register_parameter("weight", queries.get_parameter("weight"))
    keys.register_parameter("bias", queries.get_parameter("bias"))
    if isinstance(keys, Conv1D):
        keys.nf = queries.get_parameter("weight").shape[1]
    return [*layers.results(a, "q"), ("q", keys(a)), *layers.results(a, "v")]


def hooks(layers: Layers, a: Tensor, b: Tensor) -> Results:
    layers.k.register_forward_pre_hook(lambda _, given: (given[0] * 2,))
    layers.v.register_forward_hook(lambda _, given, result: result * 3)
    layers.q.register_full_backward_hook(lambda _, given, taken: (given[0] * 0.5,))
    return layers.results(a)


def weights_from_hooks(layers: Layers, a: Tensor, b: Tensor) -> Results:
    def halve(module: nn.Module, given: Any) -> None:
        module.weight.data.mul_(0.5)

    layers.k.register_forward_pre_hook(halve)
    return layers.results(a)


def changed_weight(layers: Layers, a: Tensor, b: Tensor) -> Results:
    first = layers.results(a, "q")
    with torch.no_grad():
        layers.k.weight.mul_(2)
    return first + layers.results(a, "kv")


def replaced_data(layers: Layers, a: Tensor, b: Tensor) -> Results:
    layers.results(a)
    for one in layers.parameters():
        one.data = one.data.clone() * 2
    return layers.results(a)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrized(layers: Layers, a: Tensor, b: Tensor) -> Results:
    parametrize.register_parametrization(layers.v, "weight", Doubled())
    return layers.results(a)


def rows_of_one(layers: Layers, a: Tensor, b: Tensor) -> Results:
    return layers.results(a[0, 0])


def turned(layers: Layers, a: Tensor, b: Tensor) -> Results:
    return [(name, one.transpose(0, 1)) for name, one in layers.results(a)]


def recomputed(layers: Layers, a: Tensor, b: Tensor) -> Results:
    return list(zip("qkv", _recomputed(layers, a, "qkv", False), strict=True))


def recomputed_reentrant(layers: Layers, a: Tensor, b: Tensor) -> Results:
    return list(zip("qkv", _recomputed(layers, a, "qkv", True), strict=True))


def some_recomputed(layers: Layers, a: Tensor, b: Tensor) -> Results:
    first = layers.results(a, "q")
    (second,) = _recomputed(layers, a, "k", False)
    return [*first, ("k", second), *layers.results(a, "v")]


def _recomputed(layers: Layers, value: Tensor, names: str, reentrant: bool) -> Sequence[Tensor]:
    def function(value: Tensor) -> tuple[Tensor, ...]:
        return tuple(one for _, one in layers.results(value, names))

    results: Sequence[Tensor] = checkpoint(function, value, use_reentrant=reentrant)
    return results


WAYS: dict[Callable[[Layers, Tensor, Tensor], Results], int] = {
    all_of_one: 1,
    some: 1,
    results_without_use: 1,
    again: 3,
    two_values: 2,
    in_turn: 2,
    without_gradients_first: 1,
    without_gradients_between: 1,
    evaluation: 1,
    written_into: 1,
    changed_value: 2,
    frozen_weights: 1,
    frozen: 1,
    constant_value: 0,
    tied: 1,
    hooks: 3,
    weights_from_hooks: 1,
    changed_weight: 1,
    replaced_data: 1,
    parametrized: 1,
    rows_of_one: 1,
    turned: 1,
    recomputed: 1,
    recomputed_reentrant: 1,
    some_recomputed: 3,
}
"""With the number of reductions of each, where there are several ranks."""


def _layers(mesh: Any, kind: str) -> tuple[Layers, Layers, dict[str, TensorLayout]]:
    """The whole layers, the cut ones, and how a matrix of each one's results is cut."""
    size = communicator(mesh).size
    torch.manual_seed(1)
    whole = Layers(kind).double()
    cut = copy.deepcopy(whole)
    entry = SharedEntry(communicator(mesh), "enter q, k, v", 3)
    units = Cut.balanced(UNITS, size)
    layouts = {}
    for name, features in FEATURES.items():
        layout = DimensionLayout.packed([features], UNITS)
        column_parallel(cut.get_submodule(name), mesh, layout=layout, cut=units, entry=entry, label=name)
        layouts[name] = TensorLayout((1, features), {1: (layout, units)})
    return whole, cut, layouts


def _slice(whole: Tensor, layout: TensorLayout, rank: int) -> Tensor:
    """A rank's part of the last dimension."""
    ((features, cut),) = layout.dimensions.values()
    pieces = [whole[..., low:high] for low, high in features.ranges(cut, rank)]
    return torch.cat(pieces, -1)


def _ways(size: int, kind: str) -> None:
    mesh = worker_mesh(size)
    rank = communicator(mesh).rank
    for way, count in WAYS.items():
        whole, cut, layouts = _layers(mesh, kind)
        torch.manual_seed(2)
        values = [torch.randn(2, 3, WIDTH, dtype=torch.float64) for _ in range(2)]
        given = [[one.clone().requires_grad_() for one in values] for _ in range(2)]
        expected = way(whole, *given[0])
        colrow.reset_comm_stats()
        found = way(cut, *given[1])
        losses = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
        for (name, one), (_, other) in zip(expected, found, strict=True):
            torch.testing.assert_close(other, _slice(one, layouts[name], rank), **EXACT, msg=way.__name__)
            cotangent = torch.randn(one.shape, dtype=torch.float64)
            losses[0] = losses[0] + (one * cotangent).sum()
            losses[1] = losses[1] + (other * _slice(cotangent, layouts[name], rank)).sum()
        for loss in losses:
            loss.backward()
        for one, other in zip(*given, strict=True):
            torch.testing.assert_close(other.grad, one.grad, **EXACT, msg=way.__name__)
        for (name, parameter), shard in zip(whole.named_parameters(), cut.parameters(), strict=True):
            gradient = parameter.grad
            if gradient is None:
                assert shard.grad is None, (way.__name__, name)
                continue
            if gradient.dim() == 2 and kind == "linear":
                gradient = gradient.t()
            mine = _slice(gradient, layouts[name[0]], rank)
            mine = mine.t() if mine.dim() == 2 and kind == "linear" else mine
            torch.testing.assert_close(shard.grad, mine, **EXACT, msg=f"{way.__name__} {name}")
        moved = colrow.comm_stats(mesh)
        assert moved.where(phase="backward").count == (count if size > 1 else 0), (way.__name__, str(moved))
        assert moved.where(phase="forward").count == 0, way.__name__


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_way_to_call_them(ranks: Callable[[int], Pool], size: int, kind: str) -> None:
    ranks(size).run(_ways, size, kind)


def _order() -> None:
    """The value's gradient is summed in one piece, its reduction begun before the weights' are computed."""
    mesh = worker_mesh(2)
    ranks = communicator(mesh)
    _, cut, _ = _layers(mesh, "linear")
    seen: list[str] = []
    start, product = ranks.start_all_reduce, siblings.gradient_of_weight

    def reduced(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        seen.append(f"reduce {list(tensor.shape)} {keywords['label']}")
        pending = start(tensor, *arguments, **keywords)
        wait = pending.wait

        def waited() -> Tensor:
            seen.append("wait")
            return wait()

        pending.wait = waited  # type: ignore[method-assign]
        return pending

    def multiplied(*arguments: Any) -> Tensor:
        seen.append("weight")
        return product(*arguments)

    ranks.start_all_reduce, siblings.gradient_of_weight = reduced, multiplied  # type: ignore[method-assign]
    try:
        x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
        sum((one.square().sum() for _, one in cut.results(x)), torch.zeros(())).backward()
    finally:
        del ranks.start_all_reduce
        siblings.gradient_of_weight = product
    assert seen == [f"reduce [2, 3, {WIDTH}] enter q, k, v", "weight", "weight", "weight", "wait"], seen


def test_the_reduction_begins_before_the_weights_gradients(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_order)


def _second() -> None:
    mesh = worker_mesh(2)
    rank = communicator(mesh).rank
    whole, cut, layouts = _layers(mesh, "linear")
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    found = []
    for layers in (whole, cut):
        value = x.clone().requires_grad_()
        loss = sum((one.pow(3).sum() for _, one in layers.results(value)), torch.zeros(()))
        (gradient,) = torch.autograd.grad(loss, value, create_graph=True)
        gradient.square().sum().backward()
        found.append((value.grad, [one.grad for one in layers.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], **EXACT)
    names = [name for name, _ in whole.named_parameters()]
    for name, one, other in zip(names, found[0][1], found[1][1], strict=True):
        assert one is not None
        part = _slice(one.t() if one.dim() == 2 else one, layouts[name[0]], rank)
        torch.testing.assert_close(other, part.t() if one.dim() == 2 else part, **EXACT, msg=name)


def test_second_derivatives(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_second)


def _copies() -> None:
    """A copy of the layers shares an entry of its own, with the same number of reductions."""
    mesh = worker_mesh(2)
    _, cut, _ = _layers(mesh, "linear")
    x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    first = cut.results(x, "q")
    other = copy.deepcopy(cut)
    assert isinstance(other.q, ColumnParallel)
    assert isinstance(other.k, ColumnParallel)
    assert other.q.entry is other.k.entry is not cut.get_submodule("q").entry
    for parameter in other.parameters():
        parameter.data.mul_(2)
    colrow.reset_comm_stats()
    results = dict(other.results(x))
    sum((one.sum() for one in results.values()), torch.zeros(())).backward()
    assert colrow.comm_stats().count == 1
    torch.testing.assert_close(results["q"], first[0][1] * 2, **EXACT)


def test_copies_share_among_themselves(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_copies)


class Attention(nn.Module):
    """Keys only where they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, 8) for _ in range(3))
        self.o = nn.Linear(8, WIDTH)
        self.with_keys = True
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        self.seen.append(weakref.ref(x))
        q, v = self.q(x), self.v(x)
        mixed = q * self.k(x) * v if self.with_keys else q * v
        result: Tensor = self.o(mixed)
        return result


def _forgotten(mode: str) -> None:
    mesh = worker_mesh(2)
    torch.manual_seed(1)
    model = nn.Sequential(Attention(), Attention()).double()
    whole = copy.deepcopy(model)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    colrow.parallelize(model, mesh, (x,))
    assert isinstance(model[0].get_submodule("q"), ColumnParallel)
    for one in [*model, *whole]:
        assert isinstance(one, Attention)
        one.with_keys = False
    given = [x.clone().requires_grad_() for _ in range(2)]
    for layers, value in zip((whole, model), given, strict=True):
        if mode == "error":
            layers[1].o.register_forward_pre_hook(_raise)
            with pytest.raises(ZeroDivisionError):
                layers(value)
        elif mode == "recomputed":
            hidden = value
            for layer in layers:
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            hidden.square().sum().backward()
            del hidden
        elif mode == "backward":
            layers(value).square().sum().backward()
        else:
            layers(value)
    if mode in ("recomputed", "backward"):
        torch.testing.assert_close(given[1].grad, given[0].grad, **EXACT)
    gc.collect()
    assert isinstance(model[0], Attention)
    alive = [reference for layer in model for reference in layer.seen if reference() is not None]  # type: ignore[union-attr]
    assert not alive, mode


def _fully_sharded(units: str) -> None:
    """With FSDP2 over data-parallel ranks: weights come for a forward, and again for its backward."""
    mesh = worker_mesh(tp=2, dp=2)
    torch.manual_seed(1)
    model = nn.Sequential(Attention(), Attention()).double()
    whole = copy.deepcopy(model)
    torch.manual_seed(2)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    colrow.parallelize(model, mesh, (x,))
    for attention in model:
        for module in [attention] if units == "layers" else [attention.q, attention.v, attention]:
            fully_shard(module, mesh=mesh["dp"], reshard_after_forward=True)
    fully_shard(model, mesh=mesh["dp"])
    replica = mesh.get_local_rank("dp")
    given = [x.clone().requires_grad_(), x[2 * replica : 2 * replica + 2].clone().requires_grad_()]
    for step in range(2):
        whole(given[0]).square().mean().backward()
        colrow.reset_comm_stats()
        model(given[1]).square().mean().backward()
        moved = colrow.comm_stats(mesh).where(phase="backward", label="enter").count
        # FSDP2 gives a layer that it looks after by itself a value of its own: each is entered apart
        assert moved == (2 if units == "layers" else 6), (step, moved)
    state = colrow.state_of(model)
    for (name, parameter), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
        gradient = parameter.grad
        assert gradient is not None
        assert reference.grad is not None
        expected = state.layouts[name].slice(reference.grad, state.communicator.rank)
        torch.testing.assert_close(gradient.full_tensor(), expected, **EXACT, msg=name)  # type: ignore[attr-defined]
    torch.testing.assert_close(given[1].grad, given[0].grad[2 * replica : 2 * replica + 2] * 2, **EXACT)  # type: ignore[index]


@pytest.mark.parametrize("units", ["layers", "weights"])
def test_weights_that_come_and_go(ranks: Callable[[int], Pool], units: str) -> None:
    ranks(4).run(_fully_sharded, units)


def _raise(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("mode", ["dropped", "backward", "recomputed", "error"])
def test_nothing_is_kept_for_a_layer_that_is_not_called(ranks: Callable[[int], Pool], mode: str) -> None:
    ranks(2).run(_forgotten, mode)

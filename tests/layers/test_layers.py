"""Parallel layers against the plain ones in float64: outputs, every gradient, weights after AdamW steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import colrow
from colrow.collectives import communicator
from colrow.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SharedEntry,
    VocabParallelEmbedding,
    column_parallel,
    cross_entropy,
    row_parallel,
)
from colrow.layout import Cut, DimensionLayout, TensorLayout
from tests.pool import Pool, worker_mesh

SIZES = [1, 2, 3, 4]
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _conv1d(inputs: int, outputs: int) -> nn.Module:
    module = Conv1D(outputs, inputs).double()
    with torch.no_grad():
        module.weight.copy_(_random(inputs, outputs, seed=5))
        module.bias.copy_(_random(outputs, seed=6))
    return module


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    return nn.Linear(inputs, outputs, bias).double()


def _check_shard(local: Tensor | None, whole: Tensor | None, layout: TensorLayout, rank: int) -> None:
    assert local is not None
    assert whole is not None
    torch.testing.assert_close(local, layout.slice(whole, rank), **EXACT)


def _columns(size: int, kind: str, features: int, parts: int) -> None:
    mesh = worker_mesh(size)
    ranks = communicator(mesh)
    make = _conv1d if kind == "conv1d" else _linear
    torch.manual_seed(1)
    plain = make(6, features)
    torch.manual_seed(1)
    module = make(6, features)
    weight = module.weight
    layout = DimensionLayout.packed([features // parts] * parts, features // parts)
    parallel = column_parallel(module, mesh, layout=layout, label="the layer")
    assert parallel is module
    assert module.weight is weight
    assert isinstance(module, Conv1D if kind == "conv1d" else nn.Linear)
    cut = Cut.balanced(features // parts, size)
    axis = 1 if kind == "conv1d" else 0
    weight_layout = TensorLayout(tuple(plain.weight.shape), {axis: (layout, cut)})
    output_layout = TensorLayout((3, 2, features), {2: (layout, cut)})
    x, cotangent = _random(3, 2, 6, seed=2), _random(3, 2, features, seed=3)
    x_plain, x_parallel = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = plain(x_plain)
    found = parallel(x_parallel)
    torch.testing.assert_close(found, output_layout.slice(expected, ranks.rank), **EXACT)
    expected, found = expected.mul_(2), found.mul_(2)  # the result may be written into
    (expected * cotangent).sum().backward()
    (found * output_layout.slice(cotangent, ranks.rank)).sum().backward()
    torch.testing.assert_close(x_parallel.grad, x_plain.grad, **EXACT)
    _check_shard(module.weight.grad, plain.weight.grad, weight_layout, ranks.rank)
    bias_layout = TensorLayout((features,), {0: (layout, cut)})
    _check_shard(module.bias.grad, plain.bias.grad, bias_layout, ranks.rank)
    stats = colrow.comm_stats()
    assert stats.where(phase="forward").count == 0
    assert stats.where(phase="backward", operation="all_reduce").count == (size > 1)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("size", SIZES)
def test_column_parallel(ranks: Callable[[int], Pool], size: int, kind: str) -> None:
    for features, parts in [(8, 1), (7, 1), (15, 3), (2, 1)]:
        ranks(size).run(_columns, size, kind, features, parts)


def _rows(size: int, kind: str, features: int, reads: str) -> None:
    mesh = worker_mesh(size)
    ranks = communicator(mesh)
    make = _conv1d if kind == "conv1d" else _linear
    torch.manual_seed(1)
    plain = make(features, 5)
    torch.manual_seed(1)
    parallel = row_parallel(make(features, 5), mesh, reads=reads)  # type: ignore[arg-type]
    layout, cut = DimensionLayout.contiguous(features), Cut.balanced(features, size)
    axis = 0 if kind == "conv1d" else 1
    weight_layout = TensorLayout(tuple(plain.weight.shape), {axis: (layout, cut)})
    input_layout = TensorLayout((3, features), {1: (layout, cut)} if reads == "V" else {})
    x, cotangent = _random(3, features, seed=2), _random(3, 5, seed=3)
    x_plain = x.clone().requires_grad_()
    x_parallel = input_layout.slice(x, ranks.rank).requires_grad_()
    expected, found = plain(x_plain), parallel(x_parallel)
    torch.testing.assert_close(found, expected, **EXACT)  # the bias is in it once
    (expected * cotangent).sum().backward()
    (found * cotangent).sum().backward()
    assert x_plain.grad is not None
    _check_shard(x_parallel.grad, x_plain.grad, input_layout, ranks.rank)
    _check_shard(parallel.weight.grad, plain.weight.grad, weight_layout, ranks.rank)  # type: ignore[arg-type]
    assert torch.equal(parallel.bias.grad, cotangent.sum(0))  # type: ignore[arg-type, union-attr]
    stats = colrow.comm_stats()
    assert stats.where(phase="forward", operation="all_reduce").count == (size > 1)
    assert stats.where(phase="backward").count == (size > 1 and reads == "I")


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("size", SIZES)
def test_row_parallel(ranks: Callable[[int], Pool], size: int, kind: str) -> None:
    for features, reads in [(8, "V"), (7, "V"), (7, "I"), (2, "V")]:
        ranks(size).run(_rows, size, kind, features, reads)


class _PlainMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(211, 12, padding_idx=3)
        self.up = nn.Linear(12, 23)
        self.down = nn.Linear(23, 12)
        self.head = nn.Linear(12, 211, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        result: Tensor = self.head(hidden + self.down(F.gelu(self.up(hidden))))
        return result


def _mlp_from_sizes(size: int) -> None:
    """A two-layer MLP between embedding and loss, built from the layers; three AdamW steps."""
    mesh = worker_mesh(size)
    rank = communicator(mesh).rank
    torch.manual_seed(7)
    plain = _PlainMLP().double()
    torch.manual_seed(7)
    parallel = _PlainMLP()
    torch.manual_seed(7)
    kept = {"device": None, "dtype": None}
    parallel.embed = VocabParallelEmbedding(211, 12, mesh, padding_idx=3, **kept)  # type: ignore[arg-type]
    parallel.up = ColumnParallelLinear(12, 23, mesh)
    parallel.down = RowParallelLinear(23, 12, mesh)
    parallel.head = ColumnParallelLinear(12, 211, mesh, bias=False)
    parallel.double()
    # the initial shards are the slices of the plain model's weights, bit for bit
    vocab = (DimensionLayout.contiguous(211), Cut.balanced(211, size))
    hidden = (DimensionLayout.contiguous(23), Cut.balanced(23, size))
    layouts = {
        "embed.weight": TensorLayout((211, 12), {0: vocab}),
        "up.weight": TensorLayout((23, 12), {0: hidden}),
        "up.bias": TensorLayout((23,), {0: hidden}),
        "down.weight": TensorLayout((12, 23), {1: hidden}),
        "down.bias": TensorLayout((12,)),
        "head.weight": TensorLayout((211, 12), {0: vocab}),
    }
    for name, whole in plain.named_parameters():
        assert torch.equal(parallel.get_parameter(name), layouts[name].slice(whole.detach(), rank)), name
    ids = torch.randint(211, (4, 6), generator=torch.Generator().manual_seed(1))
    ids[0, :2] = 3
    target = torch.randint(211, (4, 6), generator=torch.Generator().manual_seed(2))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (plain, parallel)]
    for _ in range(3):
        expected = F.cross_entropy(plain(ids).flatten(0, 1), target.flatten())
        found = cross_entropy(parallel(ids), target, mesh, vocabulary=211)
        torch.testing.assert_close(found, expected, **EXACT)
        for loss, optimizer in zip((expected, found), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for name, whole in plain.named_parameters():
            _check_shard(parallel.get_parameter(name).grad, whole.grad, layouts[name], rank)
        for optimizer in optimizers:
            optimizer.step()
    for name, whole in plain.named_parameters():
        torch.testing.assert_close(
            parallel.get_parameter(name), layouts[name].slice(whole.detach(), rank), rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("size", SIZES)
def test_mlp_from_sizes(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_mlp_from_sizes, size)


def _integer_operands(size: int) -> None:
    """With small integers every partial sum is exact in float32, so the comparison is bitwise."""
    mesh = worker_mesh(size)
    torch.manual_seed(3)
    up, down = nn.Linear(6, 11), nn.Linear(11, 5)
    for parameter in [*up.parameters(), *down.parameters()]:
        parameter.data = torch.randint(-4, 5, parameter.shape).float()
    x = torch.randint(-4, 5, (7, 6)).float()
    expected = down(up(x))
    column_parallel(up, mesh)
    row_parallel(down, mesh)
    assert torch.equal(down(up(x)), expected)


@pytest.mark.parametrize("size", SIZES)
def test_integer_operands_are_bitwise_equal(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_integer_operands, size)


def _second_derivatives(size: int) -> None:
    """Gradient of a gradient norm, through lookup, column-parallel and row-parallel layers."""
    mesh = worker_mesh(size)
    rank = communicator(mesh).rank

    def build() -> _PlainMLP:
        torch.manual_seed(7)
        return _PlainMLP().double()

    def penalty(model: _PlainMLP, norm_over_ranks: bool) -> Tensor:
        hidden = model.embed(ids)
        y = (torch.tanh(model.down(torch.tanh(model.up(hidden)))) * cotangent).sum()
        (gradient,) = torch.autograd.grad(y, hidden, create_graph=True)
        return (gradient**2).sum() + y**2

    ids, cotangent = torch.tensor([[1, 5, 200]]), _random(1, 3, 12, seed=9)
    plain, parallel = build(), build()
    VocabParallelEmbedding.from_module(parallel.embed, mesh)
    column_parallel(parallel.up, mesh)
    row_parallel(parallel.down, mesh)
    penalty(plain, False).backward()
    penalty(parallel, True).backward()
    hidden = (DimensionLayout.contiguous(23), Cut.balanced(23, size))
    vocab = (DimensionLayout.contiguous(211), Cut.balanced(211, size))
    for name, layout in {
        "up.weight": TensorLayout((23, 12), {0: hidden}),
        "down.weight": TensorLayout((12, 23), {1: hidden}),
        "down.bias": TensorLayout((12,)),
        "embed.weight": TensorLayout((211, 12), {0: vocab}),
    }.items():
        _check_shard(parallel.get_parameter(name).grad, plain.get_parameter(name).grad, layout, rank)


@pytest.mark.parametrize("size", SIZES)
def test_second_derivatives(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_second_derivatives, size)


def _shared_entry() -> list[int]:
    mesh = worker_mesh(2)
    entry = SharedEntry(communicator(mesh), "enter q, k, v")
    q, k, v = (column_parallel(_linear(6, 8), mesh, entry=entry) for _ in range(3))
    counts = []
    a, b = _random(4, 6).requires_grad_(), _random(4, 6).requires_grad_()
    colrow.reset_comm_stats()
    (q(a).sum() + k(b).sum() + q(b).sum() + k(a).sum() + v(a).sum()).backward()
    counts.append(colrow.comm_stats().count)
    entry.forget()
    for second_input in (False, True):
        x = _random(4, 6).requires_grad_()
        other = _random(4, 6).requires_grad_() if second_input else x
        colrow.reset_comm_stats()
        (q(x).sum() + k(other).sum() + v(other).sum()).backward()
        counts.append(colrow.comm_stats().count)
    with torch.no_grad():
        q(x)
    # a value that was changed in place is another value
    z = _random(4, 6).requires_grad_() * 1
    first = entry(z)
    assert entry(z) is first
    z.data.add_(1)
    assert entry(z) is first  # .data hides the change on purpose
    y = _random(4, 6).requires_grad_() * 1
    first = entry(y)
    y.add_(1)
    assert entry(y) is not first
    return counts


def test_layers_that_read_one_value_share_an_entry(ranks: Callable[[int], Pool]) -> None:
    """One all-reduce backward for each value: two that take turns, one, q of one and k, v of another."""
    assert ranks(2).run(_shared_entry) == [[2, 1, 2], [2, 1, 2]]


def _autocast_layers() -> None:
    mesh = worker_mesh(2)
    torch.manual_seed(0)
    up, down = nn.Linear(16, 24), nn.Linear(24, 16)
    torch.manual_seed(0)
    plain_up, plain_down = nn.Linear(16, 24), nn.Linear(24, 16)
    column_parallel(up, mesh)
    row_parallel(down, mesh)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = down(up(x)), plain_down(plain_up(x))
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    cotangent = torch.randn(5, 16)
    for result in (found, expected):
        (result.float() * cotangent).sum().backward()
    assert up.weight.grad is not None
    assert plain_up.weight.grad is not None
    assert up.weight.grad.dtype == torch.float32
    rank = communicator(mesh).rank
    torch.testing.assert_close(
        up.weight.grad, plain_up.weight.grad[12 * rank : 12 * rank + 12], rtol=3e-2, atol=3e-2
    )
    # Conv1D, alone and with a shared entry, gives the dtype of the plain layer
    for entry in (None, SharedEntry(communicator(mesh), "shared", 1)):
        conv = column_parallel(Conv1D(8, 16), mesh, entry=entry)
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == Conv1D(8, 16)(x).dtype == torch.bfloat16


def _kept() -> None:
    """What a module and its parameters carry survives: hooks, dtype, requires_grad, attributes."""
    mesh = worker_mesh(2)
    module = nn.Linear(4, 6, dtype=torch.float64)
    fired: list[str] = []
    module.weight.register_hook(lambda gradient: fired.append(f"weight {list(gradient.shape)}"))
    module.register_forward_hook(lambda *_: fired.append("forward"))
    module.bias.requires_grad_(False)
    module.weight.tag = "mine"  # type: ignore[attr-defined]
    column_parallel(module, mesh)
    module(_random(2, 4)).sum().backward()
    assert fired == ["forward", "weight [3, 4]"]
    assert module.weight.tag == "mine"  # type: ignore[attr-defined]
    assert module.weight.dtype == torch.float64
    assert not module.bias.requires_grad
    assert module.bias.grad is None
    with pytest.raises(RuntimeError, match="initialise a layer before it is made parallel"):
        module.reset_parameters()


def test_what_modules_carry_survives(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_kept)


def _overlap() -> list[str]:
    """The reduction of the input's gradient is under way while the weight's gradient is computed."""
    mesh = worker_mesh(2)
    layer = ColumnParallelLinear(4, 6, mesh, bias=False)
    events: list[str] = []
    ranks = communicator(mesh)
    start = ranks.start_all_reduce

    def watched(*arguments: Any, **options: Any) -> Any:
        events.append("start")
        pending = start(*arguments, **options)
        wait = pending.wait

        def waited() -> Tensor:
            events.append("wait")
            return wait()

        pending.wait = waited  # type: ignore[method-assign]
        return pending

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.mm.default:
                events.append(f"product {list(args[0].shape)} x {list(args[1].shape)}")
            return function(*args, **(kwargs or {}))

    x = torch.randn(5, 4, requires_grad=True)
    y = layer(x)
    ranks.start_all_reduce = watched  # type: ignore[method-assign]
    try:
        with Products():
            y.backward(torch.randn_like(y))
    finally:
        del ranks.start_all_reduce  # type: ignore[method-assign]
    return events


def test_reduction_overlaps_the_weight_gradient(ranks: Callable[[int], Pool]) -> None:
    for events in ranks(2).run(_overlap):
        assert events == ["product [5, 3] x [3, 4]", "start", "product [3, 5] x [5, 4]", "wait"]


def test_autocast(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_autocast_layers)


def _refused() -> None:
    mesh = worker_mesh(2)

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(colrow.PlanError, match=r"up: Scaled is not a plain linear layer"):
        column_parallel(Scaled(4, 4), mesh, label="up")
    with pytest.raises(colrow.PlanError, match="max_norm"):
        VocabParallelEmbedding.from_module(nn.Embedding(4, 4, max_norm=1.0), mesh)
    with pytest.raises(ValueError, match="a cut of 3 units"):
        ColumnParallelLinear(4, 4, mesh, cut=Cut.balanced(3, 2))
    with pytest.raises(ValueError, match="cannot be gathered"):
        ColumnParallelLinear(4, 6, mesh, layout=DimensionLayout.packed([2, 2, 2], 2), gather_output=True)
    embedding = VocabParallelEmbedding(11, 4, mesh)
    for ids in ([11], [-1], [10, 400]):
        with pytest.raises(IndexError, match=r"must be in \[0, 11\)"):
            embedding(torch.tensor(ids))


def test_errors(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_refused)


def _gathered(size: int) -> None:
    mesh = worker_mesh(size)
    torch.manual_seed(0)
    layer = ColumnParallelLinear(5, 7, mesh, gather_output=True, dtype=torch.float64)
    torch.manual_seed(0)
    plain = nn.Linear(5, 7, dtype=torch.float64)
    x, cotangent = _random(3, 5), _random(3, 7, seed=1)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(layer(a), plain(b), **EXACT)
    (layer(a) * cotangent).sum().backward()
    (plain(b) * cotangent).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, **EXACT)
    assert f"rank {communicator(mesh).rank} of {size}" in repr(layer)
    assert "7 features" in repr(layer)


@pytest.mark.parametrize("size", SIZES)
def test_gathered_output(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_gathered, size)

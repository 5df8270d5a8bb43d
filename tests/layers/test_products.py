"""Matrix products by oneDNN: the same results as torch's own, in all that a linear layer does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from transformers.pytorch_utils import Conv1D

import colrow
from colrow.collectives import Communicator, communicator
from colrow.layers import SharedEntry, column_parallel, linear_functions, local, products, row_parallel
from colrow.layers.linear import ColumnParallel, RowParallel
from colrow.layers.products import Products, agreed_products, choose_products
from colrow.state import state_of
from tests.benchmarks.builders import load
from tests.pool import Pool, worker_mesh

FAULT = products._fault()
needs_onednn = pytest.mark.skipif(bool(FAULT), reason=FAULT)


def test_the_library_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_products("mkl").onednn_from is None
    with pytest.raises(ValueError, match="COLROW_GEMM must be onednn, mkl or torch, not 'blas'"):
        choose_products("blas")
    monkeypatch.setattr(products, "_fault", lambda: "there is none")
    with pytest.raises(ValueError, match="COLROW_GEMM=onednn cannot be done: there is none"):
        choose_products.__wrapped__("onednn")
    assert choose_products.__wrapped__(None) == Products(None, "there is none")


@pytest.mark.parametrize("gain", [0.5, 3.0])
def test_the_faster_one_is_taken_from_the_size_on_where_it_is(
    gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([gain, 1.0, gain, 1.0, 1.0, 1.0])
    monkeypatch.setattr(products, "_seconds", lambda work: next(seconds))
    found = products._tried()
    rows, read, written = products.LADDER[-2]
    assert found.onednn_from == (rows * read * written if gain > 1 else None)


@needs_onednn
def test_only_large_products_in_single_precision_on_cpus() -> None:
    chosen = Products(1000)
    weight = torch.zeros(10, 10)
    assert chosen.uses_onednn(10, weight)
    assert not chosen.uses_onednn(9, weight)
    assert not chosen.uses_onednn(10, weight.double())
    assert not chosen.uses_onednn(10, weight.to("meta"))
    assert not Products(0).uses_onednn(5, torch.zeros(0, 10))


Layer = Callable[[int, int, bool], nn.Module]
LAYERS: dict[str, Layer] = {
    "linear": lambda read, written, bias: nn.Linear(read, written, bias),
    "conv1d": lambda read, written, bias: Conv1D(written, read),
}


def _run(first: nn.Module, second: nn.Module, x: Tensor) -> list[Tensor]:
    y = second(torch.tanh(first(x)))
    parameters = [*first.parameters(), *second.parameters()]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def _layers(size: int, kind: str, shared: bool, bias: bool) -> int:
    """Both layers, cut over the ranks with oneDNN, against the whole ones in double precision."""
    mesh = worker_mesh(size)
    ranks = communicator(mesh)
    calls: list[int] = []
    onednn = linear_functions.onednn

    def counted(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(1)
        return onednn(left, right, bias)

    linear_functions.onednn = counted
    try:
        torch.manual_seed(0)
        first, second = LAYERS[kind](24, 18, bias), LAYERS[kind](18, 24, bias)
        x = torch.randn(2, 5, 24)
        whole = x.double().requires_grad_()
        expected = _run(copy.deepcopy(first).double(), copy.deepcopy(second).double(), whole)
        entry = SharedEntry(ranks, "shared", 1) if shared else None
        layers = (column_parallel(first, mesh, entry=entry), row_parallel(second, mesh))
        for layer in layers:
            layer.products = Products(1)
        found = _run(first, second, x.clone().requires_grad_())
        rank = ranks.rank
        for name, one, other in zip(_names(first, second), found, expected, strict=True):
            part = _part(name, other, *layers, rank)
            torch.testing.assert_close(one.double(), part, rtol=1e-4, atol=1e-5, msg=name)
        with torch.no_grad():
            y = second(torch.tanh(first(x)))
        torch.testing.assert_close(y.double(), expected[0], rtol=1e-4, atol=1e-5)
        count = len(calls)
        # second derivatives take torch's products, which have them
        z = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(second(torch.tanh(first(z))).square().sum(), z, create_graph=True)
        gradient.square().sum().backward()
        assert z.grad is not None
        return count
    finally:
        linear_functions.onednn = onednn


def _names(first: nn.Module, second: nn.Module) -> list[str]:
    of_parameters = [f"first.{name}" for name, _ in first.named_parameters()]
    return ["y", "x", *of_parameters, *[f"second.{name}" for name, _ in second.named_parameters()]]


def _part(name: str, whole: Tensor, first: ColumnParallel, second: RowParallel, rank: int) -> Tensor:
    """This rank's part of a parameter's gradient."""
    place, _, parameter = name.partition(".")
    if not parameter or name == "second.bias":
        return whole
    layer, axis = (first, 0) if place == "first" else (second, 1)
    dimension = axis if isinstance(layer, nn.Linear) or whole.dim() == 1 else 1 - axis
    return whole.narrow(dimension, sum(layer.sizes[:rank]), layer.sizes[rank])


@needs_onednn
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shared", [False, True])
def test_layers_equal_whole_ones(ranks: Callable[[int], Pool], size: int, kind: str, shared: bool) -> None:
    counts = ranks(size).run(_layers, size, kind, shared, kind == "conv1d" or not shared)
    # two layers: forward, both gradients of each, and forward once more
    assert counts == [8] * size


def _compiled(kind: str) -> list[str]:
    """Forward and gradients of compiled layers, and which operators are in their graphs."""
    mesh = worker_mesh(2)
    torch.manual_seed(0)
    first, second = LAYERS[kind](24, 18, True), LAYERS[kind](18, 24, True)
    column_parallel(first, mesh)
    row_parallel(second, mesh)
    assert isinstance(first, ColumnParallel)
    assert isinstance(second, RowParallel)
    first.products = second.products = Products(1)
    x = torch.randn(2, 5, 24)
    expected = _run(first, second, x.clone().requires_grad_())
    graphs: list[str] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    compiled = torch.compile(lambda x: second(torch.tanh(first(x))), fullgraph=True, backend=backend)
    z = x.clone().requires_grad_()
    y = compiled(z)
    parameters = [*first.parameters(), *second.parameters()]
    found = [y, *torch.autograd.grad(y.square().sum(), [z, *parameters])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    return [name for name in graphs if "onednn" in name or "mm" in name]


@needs_onednn
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_layers_multiply_alike(ranks: Callable[[int], Pool], kind: str) -> None:
    for names in ranks(2).run(_compiled, kind):
        assert set(names) == {"colrow.onednn.default"}
        assert len(names) >= 6


def _agreed() -> list[int | None]:
    ranks = communicator(worker_mesh(2))
    choose = products.choose_products
    try:
        found = []
        for of_ranks in ([7, None], [None, 7], [5, 5]):
            mine = Products(of_ranks[ranks.rank])
            products.choose_products = lambda mine=mine: mine  # type: ignore[assignment]
            found.append(agreed_products(ranks).onednn_from)
        return found
    finally:
        products.choose_products = choose


def test_all_ranks_do_as_the_first(ranks: Callable[[int], Pool]) -> None:
    assert ranks(2).run(_agreed) == [[7, None, 5], [7, None, 5]]


def _model(name: str) -> tuple[float, set[str]]:
    """A model whose plan has linear layers of all kinds: the largest error of a gradient, and the classes."""
    mesh = worker_mesh(2)
    agreed = local.agreed_products
    local.agreed_products = lambda ranks: Products(1)
    try:
        whole, inputs = load("listed").build(name)
        model = copy.deepcopy(whole).float()
        colrow.parallelize(model, mesh, inputs)
        for one in (whole.double(), model):
            one.train()
            one(**inputs).loss.backward()
        layouts, rank = state_of(model).layouts, state_of(model).communicator.rank
        errors = []
        for (path, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            expected = layouts[path].slice(theirs.grad, rank)
            errors.append(float((mine.grad.double() - expected).norm() / (expected.norm() + 1e-6)))
        classes = {type(one).__name__ for one in model.modules() if isinstance(one, nn.Linear)}
        colrow.unshard(model)
        assert all(type(one) is nn.Linear for one in model.modules() if isinstance(one, nn.Linear))
        return max(errors), classes
    finally:
        local.agreed_products = agreed


@needs_onednn
def test_layers_whose_collectives_are_elsewhere_multiply_alike(ranks: Callable[[int], Pool]) -> None:
    """In a parallel block the values of two layers are entered, and left, together."""
    for error, classes in ranks(2).run(_model, "gpt-neox:labels"):
        assert error < 1e-4
        assert classes == {"LocalLinear", "ColumnParallelLinear"}


def _on_meta() -> tuple[int, set[Products]]:
    """How often ranks agree while a model without weights is cut, and what its layers then have."""
    mesh = worker_mesh(2)
    agreed, asked = local.agreed_products, []

    def counted(ranks: Communicator) -> Products:
        asked.append(ranks)
        return Products(1)

    local.agreed_products = counted
    try:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        colrow.parallelize(model, mesh, {"input": torch.zeros(2, 6, device="meta")})
        return len(asked), {module.products for module in model.modules() if hasattr(module, "products")}
    finally:
        local.agreed_products = agreed


def test_weights_that_are_read_later(ranks: Callable[[int], Pool]) -> None:
    for asked, found in ranks(2).run(_on_meta):
        assert asked == 1  # and not in the dry run, whose ranks are not there
        assert found == {Products(1)}

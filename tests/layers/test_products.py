"""Matrix products by oneDNN: the same results as torch's own, in all that a linear layer does."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from transformers.pytorch_utils import Conv1D

import colrow
from colrow.collectives import Communicator, communicator
from colrow.layers import SharedEntry, column_parallel, faster, linear_functions, local, row_parallel
from colrow.layers.faster import agreed_products, choose_products
from colrow.layers.linear import ColumnParallel, RowParallel
from colrow.layers.products import BY_TORCH, Products, goes_to_onednn
from colrow.state import state_of
from tests.benchmarks.builders import load
from tests.pool import Pool, worker_mesh

FAULT = faster.fault_of_onednn()
needs_onednn = pytest.mark.skipif(bool(FAULT), reason=FAULT)
ALWAYS = Products(1, 1)


def test_the_library_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(8, 16), (16, 8)]
    assert choose_products(sizes, "mkl") == ([BY_TORCH] * 2, "torch (as COLROW_GEMM says)")
    with pytest.raises(ValueError, match="COLROW_GEMM must be onednn, mkl or torch, not 'blas'"):
        choose_products(sizes, "blas")
    monkeypatch.setattr(faster, "fault_of_onednn", lambda: "there is none")
    with pytest.raises(ValueError, match="COLROW_GEMM=onednn cannot be done: there is none"):
        choose_products(sizes, "onednn")
    monkeypatch.delenv("COLROW_GEMM", raising=False)
    assert choose_products(sizes) == ([BY_TORCH] * 2, "torch (there is none)")


Gains = dict[tuple[tuple[int, int], int, bool], float]
"""By size of the weight, rows, and whether it is that of the gradients."""


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gains]:
    """How much faster oneDNN shall be than torch, which is else as fast."""
    monkeypatch.delenv("COLROW_GEMM", raising=False)
    monkeypatch.setattr(faster, "fault_of_onednn", lambda: "")
    wanted: Gains = {}
    monkeypatch.setattr(faster, "_gain", lambda *which: wanted.get(which, 1.0))
    _try = faster._try
    _try.cache_clear()
    yield wanted
    _try.cache_clear()


def test_the_faster_one_is_taken_for_each_size_and_direction(gains: Gains) -> None:
    assert choose_products([(8, 16)]) == ([BY_TORCH], "torch (oneDNN is not faster here)")
    faster._try.cache_clear()
    size = (8, 16)
    gains.update({(size, 8, False): 1.1, (size, 64, False): 3.0, (size, 512, True): 2.0})
    found, reason = choose_products([size, (8, 24), (0, 16)])
    assert found == [Products(64, 512), BY_TORCH, Products(64, 512)]
    assert "3.0 times as fast as torch's own here, for 1 of 2 sizes" in reason


def test_wide_layers_are_tried_narrower_and_few_sizes_are(
    gains: Gains, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, int]] = []
    one = faster._try
    monkeypatch.setattr(faster, "_try", lambda size: tried.append(size) or one(size))
    gains[(1024, 1024), 8, False] = 2.0
    sizes = [(10_000, 20_000), *((8, written) for written in range(1, 20)), (10_000, 30_000)]
    found, _ = choose_products(sizes)
    assert found == [Products(8, None), *[BY_TORCH] * 19, Products(8, None)]
    assert tried == [(8, written) for written in range(13, 20)] + [(1024, 1024)]


@needs_onednn
def test_only_many_rows_in_single_precision_on_cpus() -> None:
    x, weight = torch.zeros(2, 5, 10), torch.zeros(10, 10)
    assert goes_to_onednn(10, x, weight)
    assert not goes_to_onednn(11, x, weight)
    assert not goes_to_onednn(None, x, weight)
    assert not goes_to_onednn(1, x.double(), weight.double())
    assert not goes_to_onednn(1, x, weight.double())
    assert not goes_to_onednn(1, x, weight.to("meta"))
    assert not goes_to_onednn(1, x, torch.zeros(0, 10))
    assert not goes_to_onednn(1, x[:0], weight)


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
            layer.products = ALWAYS
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
    first.products = second.products = ALWAYS
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


def _agreed() -> list[list[Products]]:
    ranks = communicator(worker_mesh(2))
    choose, found = faster.choose_products, []
    try:
        for of_ranks in ([ALWAYS, BY_TORCH], [Products(7, None), ALWAYS]):
            mine = [of_ranks[ranks.rank], of_ranks[1 - ranks.rank]]
            faster.choose_products = lambda sizes, mine=mine: (mine, "")  # type: ignore[assignment]
            found.append(agreed_products(ranks, [(8, 8), (8, 16)]))
        return found
    finally:
        faster.choose_products = choose


def test_all_ranks_do_as_the_first(ranks: Callable[[int], Pool]) -> None:
    assert ranks(2).run(_agreed) == [[[ALWAYS, BY_TORCH], [Products(7, None), ALWAYS]]] * 2


def _refused() -> list[str]:
    ranks, messages = communicator(worker_mesh(2)), []
    choose = faster.choose_products
    faster.choose_products = lambda sizes: choose(sizes, "blas")  # type: ignore[assignment]
    try:
        for _ in range(2):
            with pytest.raises(ValueError) as caught:
                agreed_products(ranks, [(8, 8)])
            messages.append(str(caught.value))
        return messages
    finally:
        faster.choose_products = choose


def test_all_ranks_raise_with_the_first(ranks: Callable[[int], Pool]) -> None:
    first, second = ranks(2).run(_refused)
    assert all("must be onednn" in one for one in first)
    assert all("could not choose" in one for one in second)


@contextmanager
def _chosen(choose: Callable[[Communicator, Sequence[Any]], list[Products]]) -> Iterator[None]:
    """Layers multiply as ``choose`` says."""
    agreed = local.agreed_products
    local.agreed_products = choose
    try:
        yield
    finally:
        local.agreed_products = agreed


def _largest_error(model: nn.Module, whole: nn.Module) -> float:
    """The largest error of a gradient on this rank, of the gradient's size."""
    layouts, rank = state_of(model).layouts, state_of(model).communicator.rank
    errors = []
    for (path, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        expected = layouts[path].slice(theirs.grad, rank)
        errors.append(float((mine.grad.double() - expected).norm() / (expected.norm() + 1e-6)))
    return max(errors)


def _model(name: str, size: int) -> tuple[float, set[str]]:
    """A model whose plan has linear layers of all kinds: the largest error of a gradient, and the classes."""
    mesh = worker_mesh(size)
    with _chosen(lambda ranks, sizes: [ALWAYS] * len(sizes)):
        whole, inputs = load("listed").build(name)
        model = copy.deepcopy(whole).float()
        colrow.parallelize(model, mesh, inputs)
        for one in (whole.double(), model):
            one.train()
            one(**inputs).loss.backward()
        error = _largest_error(model, whole)
        classes = {type(one).__name__ for one in model.modules() if isinstance(one, nn.Linear)}
        colrow.unshard(model)
        assert all(type(one) is nn.Linear for one in model.modules() if isinstance(one, nn.Linear))
        return error, classes


@needs_onednn
@pytest.mark.parametrize(
    ("size", "classes"), [(2, {"LocalLinear", "ColumnParallelLinear"}), (1, {"LocalLinear"})]
)
def test_layers_whose_collectives_are_elsewhere_multiply_alike(
    ranks: Callable[[int], Pool], size: int, classes: set[str]
) -> None:
    """In a parallel block the values of two layers are entered, and left, together; one rank cuts none."""
    for error, found in ranks(size).run(_model, "gpt-neox:labels", size):
        assert error < 1e-4
        assert found == classes


def _on_meta() -> tuple[int, set[Products]]:
    """How often ranks agree while a model without weights is cut, and what its layers then have."""
    mesh = worker_mesh(2)
    asked = []

    def counted(ranks: Communicator, sizes: Sequence[Any]) -> list[Products]:
        asked.append(ranks)
        return [ALWAYS] * len(sizes)

    with _chosen(counted):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        colrow.parallelize(model, mesh, {"input": torch.zeros(2, 6, device="meta")})
        return len(asked), {module.products for module in model.modules() if hasattr(module, "products")}


def test_weights_that_are_read_later(ranks: Callable[[int], Pool]) -> None:
    for asked, found in ranks(2).run(_on_meta):
        assert asked == 1  # and not in the dry run, whose ranks are not there
        assert found == {ALWAYS}


def _tried(size: int) -> tuple[float, list[str]]:
    """A model whose layers are tried for real: the largest error of a gradient, and what is said."""
    named, said = os.environ.pop("COLROW_GEMM"), []
    announce, faster._announce = faster._announce, said.append  # type: ignore[assignment]
    try:
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(256, 300), nn.GELU(), nn.Linear(300, 256))
        x = torch.randn(128, 256)
        model = colrow.parallelize(copy.deepcopy(whole), worker_mesh(size), {"input": x})
        whole.double()(x.double()).square().sum().backward()
        model(x).square().sum().backward()
        return _largest_error(model, whole), said
    finally:
        faster._announce = announce
        os.environ["COLROW_GEMM"] = named


@pytest.mark.parametrize("size", [1, 2])
def test_layers_are_tried(ranks: Callable[[int], Pool], size: int) -> None:
    errors, said = zip(*ranks(size).run(_tried, size), strict=True)
    assert max(errors) < 1e-4
    assert [len(one) for one in said] == [1, 0][:size]

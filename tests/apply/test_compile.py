"""``torch.compile`` of parallelized models: one graph where the original is one, with eager's collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaForCausalLM

import colrow
from colrow.collectives import AllReduce, Communicator, communicator
from colrow.layers import SharedEntry
from colrow.plan import LLAMA
from colrow.state import state_of
from tests.apply.comparison import assemble, largest_error
from tests.apply.double import in_double
from tests.pool import Pool, worker_mesh

VOCABULARY = 61


def _llama(key_value_heads: int = 5) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=33,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=True,
    )
    return in_double(LlamaForCausalLM(config))


def _ids(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (rows, 8), generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A backend that runs what AOTAutograd traced and counts the collectives of both its graphs."""

    def __init__(self) -> None:
        self.graphs: list[dict[str, int]] = []
        # divided into forward and backward as inductor does
        self.backend = aot_autograd(
            fw_compiler=self._compile,
            bw_compiler=self._compile,
            partition_fn=min_cut_rematerialization_partition,
        )

    def _compile(self, module: GraphModule, examples: Any) -> Callable[..., Any]:
        names = [str(node.target).split(".") for node in module.graph.nodes]
        found = Counter(name[1] for name in names if name[0] == "_c10d_functional")
        assert found.pop("wait_tensor", 0) == sum(found.values())
        self.graphs.append({"all_gather" if "gather" in name else name: found[name] for name in found})
        return make_boxed_func(module.forward)


class Wrapper(nn.Module):
    """Holds a model whose hooks are then traced with it; torch.compile leaves those of its root to Python."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        return self.model(*args)


def _backward(output: Tensor, seed: int = 1) -> None:
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype)
    output.backward(cotangent)


def _compare_gradients(original: nn.Module, model: nn.Module, tolerance: float = 1e-9) -> None:
    found = assemble(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, parameter in original.named_parameters():
        assert parameter.grad is not None
        assert largest_error(found[name], parameter.grad) < tolerance, name


def _summed_together(model: nn.Module) -> int:
    """Number of replicated parameters whose gradients are partial."""
    plan = state_of(model).plan
    return len({one.name for one in plan.partial_parameters} - plan.parameters.keys())


def _one_graph(size: int, training: bool, wrapped: bool, derived: bool) -> None:
    torch._dynamo.reset()
    mesh = worker_mesh(size)
    heads = 1 if derived else 5  # a shared key-value head's gradient is summed by a hook on the parameter
    original, model = _llama(heads).train(training), _llama(heads).train(training)
    colrow.parallelize(model, mesh, {"input_ids": _ids()} if derived else LLAMA)
    recorder = Recorder()
    target = Wrapper(model) if wrapped else model
    compiled = torch.compile(target, fullgraph=True, backend=recorder.backend)
    for seed in range(2):
        ids = _ids(seed)
        original.zero_grad()
        model.zero_grad()
        expected, found = original(ids).logits, compiled(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        _backward(expected)
        _backward(found)
        _compare_gradients(original, model)
    assert len(recorder.graphs) == 2
    colrow.reset_comm_stats()
    found = compiled(ids).logits
    _backward(found)
    uncounted = colrow.comm_stats(mesh)  # what graphs move is not counted, what hooks on parameters move is
    colrow.reset_comm_stats()
    _backward(model(ids).logits)
    stats = colrow.comm_stats(mesh)
    for phase, graph in zip(("forward", "backward"), recorder.graphs, strict=True):
        for operation in ("all_reduce", "all_gather", "reduce_scatter"):
            eager, outside = (one.where(operation=operation, phase=phase).count for one in (stats, uncounted))
            together = _summed_together(model) if (operation, phase) == ("all_reduce", "backward") else 0
            # in a graph each of them is summed by itself
            more = max(0, together - 1)
            assert graph.get(operation, 0) == eager - outside + more, (phase, operation)
            assert outside == 0 or (derived and phase == "backward")


@pytest.mark.parametrize(
    ("size", "training", "wrapped", "derived"),
    [
        (2, False, False, False),
        pytest.param(3, True, True, False, marks=pytest.mark.slow),
        (2, True, False, True),
    ],
)
def test_one_graph(
    ranks: Callable[[int], Pool], size: int, training: bool, wrapped: bool, derived: bool
) -> None:
    ranks(size).run(_one_graph, size, training, wrapped, derived, timeout=240.0)


def _inductor() -> None:
    torch._dynamo.reset()
    original, model = _llama(), _llama()
    colrow.parallelize(model, worker_mesh(2), LLAMA)
    compiled = torch.compile(model, fullgraph=True)
    expected, found = original(_ids()).logits, compiled(_ids()).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    _backward(expected)
    _backward(found)
    # inductor rounds to single precision where it computes sines: the original's gradients differ as much
    _compare_gradients(original, model, 1e-6)


@pytest.mark.slow
def test_inductor(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_inductor, timeout=400.0)


class Hooked(nn.Module):
    """Two layers that read one value and one that gives a partial sum, entered and left by hooks alone."""

    def __init__(self, ranks: Communicator) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.ranks = ranks
        self.first, self.second = nn.Linear(4, 6).double(), nn.Linear(4, 6).double()
        self.last = nn.Linear(6, 4, bias=False).double()

    def attach(self) -> Hooked:
        entry, exit = SharedEntry(self.ranks, "enter", 2), AllReduce(self.ranks, "exit")

        def enter(module: nn.Module, arguments: Any, keywords: dict[str, Tensor]) -> Any:
            return arguments, {**keywords, "input": entry(keywords["input"])}

        for module in (self.first, self.second):
            module.register_forward_pre_hook(enter, with_kwargs=True)
        self.last.register_forward_hook(lambda module, arguments, output: exit(output), always_call=True)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.sin()
        gate = self.first(input=x).sigmoid()
        return x, self.last(gate * self.second(input=x))


def _hooked(backend: str) -> dict[str, int]:
    torch._dynamo.reset()
    ranks = communicator(worker_mesh(2))
    original, model = Hooked(ranks), Hooked(ranks).attach()
    for module in (model.first, model.second):  # each rank computes three of the six features
        module.weight.data = module.weight.data.chunk(2)[ranks.rank]
        module.bias.data = module.bias.data.chunk(2)[ranks.rank]
    model.last.weight.data = model.last.weight.data.chunk(2, 1)[ranks.rank]
    recorder = Recorder()
    compiled = torch.compile(model, fullgraph=True, backend=backend or recorder.backend)
    inputs = [torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4).requires_grad_() for _ in range(2)]
    for one, x in zip((original, compiled), inputs, strict=True):
        result = one(x)
        torch.autograd.backward(result, [torch.ones_like(result[0]), torch.arange(8.0).view(2, 4).double()])
        with torch.no_grad():
            torch.testing.assert_close(one(x)[1], result[1])
    assert inputs[0].grad is not None
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0, atol=1e-12)
    return recorder.graphs[1] if recorder.graphs else {}


@pytest.mark.parametrize("backend", ["", "eager"])
def test_hooks_that_communicate(ranks: Callable[[int], Pool], backend: str) -> None:
    for backward in ranks(2).run(_hooked, backend):
        assert backward == ({} if backend else {"all_reduce": 1})


def _written_to() -> None:
    """Between two readers of an entry their value is changed: it is entered again, as in eager mode."""
    torch._dynamo.reset()
    entry = SharedEntry(communicator(worker_mesh(2)), "enter", 3)

    def read(x: Tensor) -> Tensor:
        x = x.sin()
        first = entry(x) * 3
        x.mul_(2)
        return first + entry(x) * 5 + entry(x) * 7

    recorder = Recorder()
    for function in (read, torch.compile(read, fullgraph=True, backend=recorder.backend)):
        x = torch.linspace(-1, 1, 8, requires_grad=True)
        y = function(x)
        torch.testing.assert_close(y, 27 * x.sin())
        y.sum().backward()
        torch.testing.assert_close(x.grad, 2 * 27 * x.detach().cos())
    assert recorder.graphs == [{}, {"all_reduce": 2}]


def test_a_value_written_to_between_its_readers(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_written_to)

"""``torch.compile`` of parallelized models: one graph where the original is one, with eager's collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaForCausalLM

import colrow
from colrow.plan import LLAMA
from tests.apply.comparison import assemble, largest_error
from tests.apply.double import in_double
from tests.pool import Pool, worker_mesh

VOCABULARY = 61


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=33,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
    )
    return in_double(LlamaForCausalLM(config))


def _ids(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (rows, 8), generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A backend that runs what AOTAutograd traced; counts the collectives of its forward and backward graphs."""

    def __init__(self) -> None:
        self.graphs: list[dict[str, int]] = []
        self.backend = aot_autograd(fw_compiler=self._compile, bw_compiler=self._compile)

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


def _one_graph(size: int, training: bool, wrapped: bool) -> None:
    torch._dynamo.reset()
    mesh = worker_mesh(size)
    original, model = _llama().train(training), _llama().train(training)
    colrow.parallelize(model, mesh, LLAMA)
    recorder = Recorder()
    target = Wrapper(model) if wrapped else model
    compiled = torch.compile(target, fullgraph=True, backend=recorder.backend)
    for seed in range(2):
        ids = _ids(seed)
        original.zero_grad()
        model.zero_grad()
        colrow.reset_comm_stats()
        expected, found = original(ids).logits, compiled(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        _backward(expected)
        _backward(found)
        assert colrow.comm_stats(mesh).count == 0  # what graphs move is not counted
        _compare_gradients(original, model)
    colrow.reset_comm_stats()
    _backward(model(ids).logits)
    stats = colrow.comm_stats(mesh)
    for phase, graph in zip(("forward", "backward"), recorder.graphs, strict=True):
        counts = {
            name: stats.where(operation=name, phase=phase).count for name in ("all_reduce", "all_gather")
        }
        assert graph == {name: count for name, count in counts.items() if count}, phase


@pytest.mark.parametrize(
    ("size", "training", "wrapped"), [(2, False, False), (2, True, True), (3, True, False)]
)
def test_one_graph(ranks: Callable[[int], Pool], size: int, training: bool, wrapped: bool) -> None:
    ranks(size).run(_one_graph, size, training, wrapped, timeout=240.0)

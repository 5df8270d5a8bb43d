"""``torch.compile`` with dropout, checkpointing, wrong ids, labels, and of parts of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import colrow
from colrow.plan import LLAMA, AxisSpec, HandPlan, column, row
from tests.apply.test_compile import VOCABULARY, Recorder, _backward, _compare_gradients, _ids, _llama
from tests.pool import Pool, worker_mesh

PLAN = HandPlan(
    axes={"hidden": AxisSpec()}, styles={"blocks.*.up": column("hidden"), "blocks.*.down": row("hidden")}
)


class Block(nn.Module):
    """Dropout with one probability inside its region and with another outside; gives both masks, too."""

    def __init__(self, inside: float, outside: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)
        self.inside, self.outside = inside, outside

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.up(x)
        inside = F.dropout(torch.ones_like(hidden), p=self.inside, training=self.training)
        out = self.down(hidden * inside)
        outside = F.dropout(torch.ones_like(out), p=self.outside, training=self.training)
        return x + out * outside, inside, outside


class Stack(nn.Module):
    def __init__(self, inside: float, outside: float, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([Block(inside, outside) for _ in range(2)]).double()
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        insides, outsides = [], []
        for block in self.blocks:
            if self.checkpointed:
                x, inside, outside = checkpoint(block, x, use_reentrant=False)  # type: ignore[misc]
            else:
                x, inside, outside = block(x)
            insides.append(inside)
            outsides.append(outside)
        return x, insides, outsides


def _dropout(
    inside: float, outside: float, fullgraph: bool, derived: bool = False
) -> tuple[list[Tensor], list[Tensor], int]:
    torch._dynamo.reset()
    shown = (torch.randn(5, 8, dtype=torch.float64),) if derived else PLAN
    model = colrow.parallelize(Stack(inside, outside), worker_mesh(2), shown)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=fullgraph)
    torch.manual_seed(7)
    x, insides, outsides = compiled(torch.randn(5, 8, dtype=torch.float64))
    x.sum().backward()
    # afterwards the common stream goes on
    return insides, [*outsides, x.detach(), torch.rand(3)], counter.frame_count


def _shares(masks: list[Tensor]) -> list[float]:
    return [mask.count_nonzero().item() / mask.numel() for mask in masks]


def test_dropout_outside_of_regions_is_traced(ranks: Callable[[int], Pool]) -> None:
    first, second = ranks(2).run(_dropout, 0.0, 0.5, True)
    assert first[2] == 1
    assert _shares(first[0]) == [1.0, 1.0]
    assert all(0.2 < share < 0.8 for share in _shares(first[1][:2]))
    assert not torch.equal(first[1][0], first[1][1])
    for a, b in zip(first[1], second[1], strict=True):
        assert torch.equal(a, b)


def test_dropout_inside_of_regions_breaks_the_graph(ranks: Callable[[int], Pool]) -> None:
    first, second = ranks(2).run(_dropout, 0.5, 0.5, False)
    assert first[2] > 1
    for a, b in zip(first[0], second[0], strict=True):  # each rank its own
        assert all(0.2 < share < 0.8 for share in _shares([a, b]))
        assert (a != b).double().mean() > 0.3
    for a, b in zip(first[1], second[1], strict=True):
        assert torch.equal(a, b)


def test_dropout_inside_of_derived_regions_breaks_the_graph(ranks: Callable[[int], Pool]) -> None:
    first, second = ranks(2).run(_dropout, 0.5, 0.0, False, True)
    assert first[2] > 1
    for whole in first[0]:  # what the model returns is whole
        a, b = whole.chunk(2, 1)
        assert all(0.2 < share < 0.8 for share in _shares([a, b]))
        assert (a != b).double().mean() > 0.3
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


def _refused() -> str:
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        _dropout(0.5, 0.0, True)
    return str(caught.value)


def test_dropout_inside_of_regions_is_no_full_graph(ranks: Callable[[int], Pool]) -> None:
    for message in ranks(2).run(_refused):
        assert "dropout draws random numbers inside the region of blocks.0.up" in message


def _checkpointed(backend: str, fullgraph: bool) -> None:
    torch._dynamo.reset()
    original, model = Stack(0.0, 0.0, True), Stack(0.0, 0.0, True)
    colrow.parallelize(model, worker_mesh(2), PLAN)
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for one in (original, compiled):
        _backward(one(x)[0])
    _compare_gradients(original, model)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_activation_checkpointing(ranks: Callable[[int], Pool], fullgraph: bool) -> None:
    ranks(2).run(_checkpointed, "aot_eager", fullgraph)


def _layers() -> int:
    """Each decoder layer compiled for itself, as large models are."""
    torch._dynamo.reset()
    original, model = _llama().train(), _llama().train()
    colrow.parallelize(model, worker_mesh(2), LLAMA)
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = model
    for layer in compiled.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    for one in (original, model):
        one(_ids(), labels=_ids()).loss.backward()
    _compare_gradients(original, model)
    return counter.frame_count


def test_layers_compiled_one_by_one(ranks: Callable[[int], Pool]) -> None:
    assert ranks(2).run(_layers) == [2, 2]


def _loss_of_parts() -> None:
    """The forward and the loss of logits that stay cut, in one graph."""
    torch._dynamo.reset()
    mesh = worker_mesh(2)
    original, model = _llama(), _llama()
    colrow.parallelize(model, mesh, LLAMA, logits="local")
    ids = _ids()

    def loss(ids: Tensor) -> Tensor:
        return colrow.cross_entropy(model(ids).logits[:, :-1], ids[:, 1:], mesh, vocabulary=VOCABULARY)

    recorder = Recorder()
    found = torch.compile(loss, fullgraph=True, backend=recorder.backend)(ids)
    expected = original(ids, labels=ids).loss
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    found.backward()
    expected.backward()
    _compare_gradients(original, model)
    # a lookup and two exits in each of two layers; the loss' largest logit and sums
    assert recorder.graphs == [{"all_reduce": 7}, {"all_reduce": 5}], recorder.graphs


def test_loss_of_local_logits(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_loss_of_parts)


def _wrong_ids(backend: str) -> None:
    torch._dynamo.reset()
    model: Any = colrow.parallelize(_llama(), worker_mesh(2), LLAMA)
    lookup = torch.compile(model.model.embed_tokens, backend=backend, fullgraph=True)
    ids = _ids()
    torch.testing.assert_close(lookup(ids), model.model.embed_tokens(ids), rtol=0, atol=0)
    assert lookup(ids[:0]).shape == (0, 8, 20)
    for wrong in (-1, 61):
        ids[1, 2] = wrong
        with pytest.raises(RuntimeError, match=r"ids given to model.embed_tokens must be in \[0, 61\)"):
            lookup(ids)


def test_wrong_ids_are_refused(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_wrong_ids, "aot_eager")


@pytest.mark.slow
def test_wrong_ids_are_refused_by_inductor(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_wrong_ids, "inductor")


def _labels() -> str:
    torch._dynamo.reset()
    model = colrow.parallelize(_llama(), worker_mesh(2), LLAMA)
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(model, fullgraph=True, backend="eager")(_ids(), labels=_ids())
    return str(caught.value)


def test_a_loss_with_labels_is_no_full_graph(ranks: Callable[[int], Pool]) -> None:
    for message in ranks(2).run(_labels):
        assert "give no labels and use colrow.cross_entropy" in message


class Scaled(nn.Module):
    """A number of heads written into a call: it changes within the code of the module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(8, 12).double(), nn.Linear(12, 8).double()

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(x).view(*x.shape[:-1], 6, 2)
        return self.down((heads * heads.sum(-1, keepdim=True)).flatten(-2))  # type: ignore[no-any-return]


def _calls() -> None:
    torch._dynamo.reset()
    original, model = nn.Sequential(Scaled(), Scaled()), nn.Sequential(Scaled(), Scaled())
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    colrow.parallelize(model, worker_mesh(2), (x,))
    assert colrow.state_of(model).plan.integers
    compiled = torch.compile(model, backend="aot_eager")
    for one in (original, compiled):
        _backward(one(x))
    torch.testing.assert_close(compiled(x), original(x), rtol=1e-12, atol=1e-12)
    _compare_gradients(original, model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the plan changes calls within the code of 0"):
        torch.compile(model, fullgraph=True, backend="eager")(x)


def test_call_sites_break_the_graph(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_calls)

"""A model's own loss on logits that are cut over the vocabulary, however it computes it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import colrow
from colrow.layers import loss_chunks
from colrow.plan import derive_plan
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.pool import Pool, worker_mesh

VOCABULARY, HIDDEN = 50, 16
FUSED = [
    "likelihood",
    "smoothed",
    "sum",
    "scaled",
    "moved",
    "selected",
    "shifted and selected",
    "first tokens",
]
ALL_LOGITS = ["temperature", "confidence", "two losses", "each token", "divided in place"]
WHOLE = [
    "sum of logits",
    "relu",
    "some ids",
    "largest probability",
    "accuracy",
    "largest",
    "written",
    "of another function",
    "own targets",
]
KINDS = [*FUSED, *ALL_LOGITS, *WHOLE, "scale of each id"]


class Halved(torch.autograd.Function):
    """A function of the program's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


class Model(nn.Module):
    """A language model of one block that computes its loss in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Embedding(VOCABULARY, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 41), nn.Linear(41, HIDDEN)
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY)
        self.temperature = nn.Parameter(torch.tensor(1.3))
        self.scale = nn.Parameter(torch.rand(VOCABULARY))
        self.confidence = nn.Linear(HIDDEN, 1)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, with_loss: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        h = self.table(ids)
        h = self.norm(h + self.down(torch.relu(self.up(h))))
        logits = self.head(h)
        if self.kind == "temperature":
            logits = (logits / self.temperature).tanh() * self.temperature
        elif self.kind == "scale of each id":
            logits = logits * self.scale - self.scale
        elif self.kind == "confidence":
            logits = logits * self.confidence(h).sigmoid()
        if targets is None or not with_loss:
            return None, logits
        return self.loss(logits, targets), logits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        flat, wanted = logits.view(-1, VOCABULARY), targets.view(-1)
        match self.kind:
            case "likelihood":
                return F.nll_loss(F.log_softmax(flat, dim=-1), wanted, ignore_index=3)
            case "smoothed":
                return nn.CrossEntropyLoss(label_smoothing=0.1)(flat.float(), wanted)
            case "scaled":
                return F.cross_entropy(5 * torch.tanh((flat.float() - 0.1) / 5), wanted)
            case "moved":
                return F.cross_entropy(logits.mT.contiguous().transpose(1, 2).mT, targets)
            case "selected":
                return F.cross_entropy(logits[targets > 20], targets[targets > 20], reduction="sum")
            case "shifted and selected":
                wanted = targets[:, 1:]
                return F.cross_entropy(logits[:, :-1][wanted > 20], wanted[wanted > 20])
            case "first tokens":
                return F.cross_entropy(logits[:, :2].reshape(-1, VOCABULARY), targets[:, :2].flatten())
            case "two losses":
                shifted = logits[:, 1:].flatten(0, 1)
                return F.cross_entropy(flat, wanted) + F.cross_entropy(shifted, targets[:, :-1].flatten())
            case "each token":
                return F.cross_entropy(flat, wanted, reduction="none").square().sum()
            case "divided in place":
                logits /= 2
                return F.cross_entropy(flat, wanted)
            case "sum of logits":
                return F.cross_entropy(flat, wanted) + 0.1 * logits.sum()
            case "relu":
                return F.cross_entropy(flat.relu(), wanted)
            case "some ids":
                return F.cross_entropy(flat, wanted) + logits[..., :10].square().sum()
            case "largest probability":
                return F.cross_entropy(flat, wanted) + logits.float().softmax(-1).max()
            case "accuracy":
                right = logits.argmax(-1) == targets
                return F.cross_entropy(flat, wanted) * (1 + right.double().mean())
            case "largest":
                return F.cross_entropy(flat, wanted) + logits.detach().amax()
            case "written":
                logits[..., 7] = -3.0
                return F.cross_entropy(flat, wanted)
            case "of another function":
                return F.cross_entropy(Halved.apply(flat), wanted)
            case _:
                return F.cross_entropy(flat, wanted, reduction="sum")


def _examples(kind: str) -> dict[str, Example]:
    ids = torch.arange(12).view(2, 6) * 37 % VOCABULARY
    training = {"ids": ids, "targets": ids.roll(-1, 1)}
    return {
        "training": Example((), training),
        "evaluation": Example((), training | {"with_loss": False} if kind == "own targets" else {"ids": ids}),
    }


def _verified(kind: str, ranks: int) -> Report:
    torch.manual_seed(0)
    model, examples = Model(kind), _examples(kind)
    plan = derive_plan(model, examples, ranks)
    assert plan.parameters["table.weight"].dimension == 0
    if kind in WHOLE:
        assert plan.loss is None
        assert any("logits are gathered" in note or "stays whole" in note for note in plan.notes), plan.notes
    elif kind != "scale of each id":  # which is cut as the head is
        assert plan.loss is not None
        assert (plan.loss.logits, plan.loss.labels) == ("head", "targets")
        assert plan.loss.fused == (kind in FUSED)
    return verify_on_ranks(model, examples, worker_mesh(ranks), plan)


@pytest.mark.parametrize(
    ("size", "kind"),
    [(2, kind) for kind in KINDS]
    + [(3, "selected")]
    + [pytest.param(3, kind, marks=pytest.mark.slow) for kind in ("smoothed", "two losses", "relu")],
)
def test_loss(ranks: Callable[[int], Pool], size: int, kind: str) -> None:
    report = ranks(size).run(_verified, kind, size)[0]
    report.raise_if_different()
    assert report.share_cut > (0.3 if kind in WHOLE else 0.6)


def _in_chunks() -> list[Report]:
    with patch.object(loss_chunks, "TOKENS_AT_LEAST", 2):
        return [_verified(kind, 2) for kind in ("likelihood", "moved", "selected")]


def test_predicted_collectives_of_chunks(ranks: Callable[[int], Pool]) -> None:
    for report in ranks(2).run(_in_chunks)[0]:
        report.raise_if_different()


def _local() -> None:
    """Who wants local logits gets whole ones where the model itself needs them."""
    torch.manual_seed(0)
    original = Model("sum of logits").double()
    model = copy.deepcopy(original)
    given = _examples("sum of logits")["training"].keywords
    colrow.parallelize(model, worker_mesh(2), given, logits="local")
    for one in (original, model):
        one.value, one.logits = one(**given)
        one.value.backward()
    torch.testing.assert_close(model.value, original.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.logits, original.logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.norm.weight.grad, original.norm.weight.grad, rtol=1e-9, atol=1e-12)


def test_local_logits_of_which_the_model_needs_all(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_local)


def test_notes_say_what_needs_all_logits() -> None:
    plan = derive_plan(Model("relu"), _examples("relu"), 2)
    (note,) = [note for note in plan.notes if note.startswith("head is cut")]
    assert "the model calls relu" in note
    assert "test_losses.py" in note
    assert [str(gather.place) for gather in plan.gathers] == ["output of head"]

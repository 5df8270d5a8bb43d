"""A model's own loss on logits that are cut over the vocabulary, however it computes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.plan import derive_plan
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.pool import Pool, worker_mesh

VOCABULARY, HIDDEN = 50, 16
KINDS = ["likelihood", "smoothed", "sum", "temperature", "scale of each id", "confidence", "two losses"]


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

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        h = self.table(ids)
        h = self.norm(h + self.down(torch.relu(self.up(h))))
        logits = self.head(h)
        if self.kind == "temperature":
            logits = (logits / self.temperature).tanh() * self.temperature
        elif self.kind == "scale of each id":
            logits = logits * self.scale - self.scale
        elif self.kind == "confidence":
            logits = logits * self.confidence(h).sigmoid()
        if targets is None:
            return None, logits
        flat, wanted = logits.view(-1, VOCABULARY), targets.view(-1)
        if self.kind == "likelihood":
            loss = F.nll_loss(F.log_softmax(flat, dim=-1), wanted, ignore_index=3)
        elif self.kind == "smoothed":
            loss = nn.CrossEntropyLoss(label_smoothing=0.1)(flat.float(), wanted)
        elif self.kind == "two losses":
            loss = F.cross_entropy(flat, wanted) + F.cross_entropy(
                logits[:, 1:].flatten(0, 1), targets[:, :-1].flatten()
            )
        else:
            loss = F.cross_entropy(flat, wanted, reduction="sum")
        return loss, logits


def _verified(kind: str, ranks: int) -> Report:
    torch.manual_seed(0)
    model = Model(kind)
    ids = torch.randint(VOCABULARY, (2, 6))
    examples = {
        "training": Example((), {"ids": ids, "targets": ids.roll(-1, 1)}),
        "evaluation": Example((), {"ids": ids}),
    }
    plan = derive_plan(model, examples, ranks)
    if kind != "scale of each id":  # which is cut as the head is
        assert plan.loss is not None
        assert (plan.loss.logits, plan.loss.labels) == ("head", "targets")
    return verify_on_ranks(model, examples, worker_mesh(ranks), plan)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3])
def test_loss(ranks: Callable[[int], Pool], kind: str, size: int) -> None:
    report = ranks(size).run(_verified, kind, size)[0]
    report.raise_if_different()
    assert report.share_cut > 0.6

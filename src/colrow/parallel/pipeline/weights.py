"""What the loss of each micro-batch counts, so that the step's objective is that of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.errors import PlanError
from colrow.parallel.pipeline.flow import Flow
from colrow.trace.records import Operation, Trace, Value

Weigh: TypeAlias = Callable[[Mapping[str, Any]], float]
"""Of how many terms the loss of a micro-batch is the mean."""

_MEAN = 1
_NEGATIVE_LOG_LIKELIHOOD = ("aten.nll_loss_forward", "aten.nll_loss2d_forward", "aten.nll_loss_nd")
_MEANS = {
    "aten.mse_loss": 2,
    "aten.huber_loss": 2,
    "aten.smooth_l1_loss": 2,
    "aten.binary_cross_entropy": 3,
}
"""Losses that are means over all elements if the argument at this place says so."""
_REMEDY = (
    "Pass weigh=: a function of a micro-batch that gives of how many terms its loss is the mean, such as the "
    "number of labels that count. What else it has, such as a router's part, is then that of each"
)


@dataclass(frozen=True)
class TokenCount:
    """Counts the labels of a micro-batch that are predicted.

    Attributes:
        labels: name of the input.
        shifted: whether each position predicts the next one's label.
        ignored: the label that does not count.
    """

    labels: str
    shifted: bool
    ignored: int

    def __call__(self, batch: Mapping[str, Any]) -> float:
        if not isinstance(batch.get(self.labels), Tensor):
            raise ValueError(f"the batch has no {self.labels}, by which micro-batches are weighed")
        labels: Tensor = batch[self.labels]
        return float((labels[..., 1:] if self.shifted else labels).ne(self.ignored).sum())


def equal_weight(batch: Mapping[str, Any]) -> float:
    """Micro-batches have equally many rows."""
    return 1.0


def default_weigh(trace: Trace, flow: Flow) -> Weigh | None:
    """How to weigh micro-batches, from how the model computes its loss; ``None`` if it has none.

    Raises:
        PlanError: if the loss is no mean that is known.
    """
    if flow.loss is None:
        return None
    loss = dict(trace.outputs)[flow.loss]
    maker = _maker(loss, trace)
    if maker is not None and maker.name in _NEGATIVE_LOG_LIKELIHOOD:
        target, weights, reduction, ignored = (maker.arguments[place] for place in (1, 2, 3, 4))
        if reduction == _MEAN and weights is None:
            found = _counts(trace, target, ignored)
            if len(found) == 1:
                return found[0]
            if found:
                raise PlanError(
                    "",
                    "the example's labels do not tell whether each position predicts its own label or the "
                    "next one's",
                    "Give an example with labels that differ from each other.",
                )
    elif maker is not None:
        place = _MEANS.get(maker.name)
        is_mean = maker.name == "aten.mean" and len(maker.arguments) == 1
        if is_mean or (place is not None and _argument(maker, place, _MEAN) == _MEAN):
            return equal_weight
    raise PlanError(
        "",
        "how the losses of micro-batches make up that of a batch is not known: it is no plain mean over "
        "labels or over elements",
        _REMEDY,
    )


def _maker(value: Value, trace: Trace) -> Operation | None:
    """The last operator that computed a number, apart from what only reshapes it."""
    operation = value.producer
    while operation is not None and operation.name in ("aten.view", "aten.alias", "aten.squeeze"):
        operation = operation.inputs[0].producer
    if operation is None:
        return None
    for later in reversed(trace.operations[operation.index + 1 :]):
        changed = {one.index for one in later.outputs if one.storage == value.storage}
        if changed.intersection(one.index for one in later.inputs):
            return later  # in place, as loss += ...
    return operation


def _argument(operation: Operation, place: int, default: Any) -> Any:
    return operation.arguments[place] if len(operation.arguments) > place else default


def _counts(trace: Trace, target: Value, ignored: int) -> list[TokenCount]:
    """The inputs that the target may have been made of, with or without a shift."""
    found: list[TokenCount] = []
    if target.content is None:
        return found
    wanted = target.content.flatten()
    for value in trace.values:
        if value.source.kind != "input" or value.content is None or value.dtype != target.dtype:
            continue
        labels = value.content
        if labels.dim() == 0 or "." in value.source.name or not _reaches(value, target):
            continue
        nexts = [labels[..., 1:], F.pad(labels, (0, 1), value=ignored)[..., 1:]]
        if torch.equal(labels.flatten(), wanted):
            found.append(TokenCount(value.source.name, False, ignored))
        if any(torch.equal(one.flatten(), wanted) for one in nexts):
            found.append(TokenCount(value.source.name, True, ignored))
    return found


def _reaches(source: Value, target: Value) -> bool:
    """Whether a value is computed from another."""
    left, seen = [target], set()
    while left:
        value = left.pop()
        if value is source:
            return True
        if value.index not in seen and value.producer is not None:
            seen.add(value.index)
            left += value.producer.inputs
    return False


def shares_of(weigh: Weigh, batches: Sequence[Mapping[str, Any]], counts: bool = True) -> list[float]:
    """What each micro-batch's loss counts in the mean over the whole batch.

    Args:
        counts: whether the whole batch counts at all: one of several replicas may have no label that does.

    Raises:
        ValueError: if nothing counts and should.
    """
    terms = [float(weigh(batch)) for batch in batches]
    total = sum(terms)
    if total == 0 and not counts:
        return [0.0] * len(terms)
    if not total > 0 or min(terms) < 0:
        raise ValueError(
            f"the micro-batches weigh {terms}: no label of this batch counts, or weigh= is wrong"
        )
    return [one / total for one in terms]


def divided(batch: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Micro-batches of equally many rows.

    Tensors are divided along dimension 0; those of a single row, and what is no tensor, go to all.

    Raises:
        ValueError: if the tensors differ in their number of rows, or it cannot be divided.
    """
    rows = {name: item.shape[0] for name, item in batch.items() if isinstance(item, Tensor) and item.dim()}
    several = {name: size for name, size in rows.items() if size > 1} or rows
    if len(set(several.values())) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in several.items())
        raise ValueError(f"the tensors of a batch need equally many rows, these have others ({listed})")
    size = next(iter(several.values()), 0)
    if size == 0 or size % count:
        raise ValueError(
            f"a batch of {size} rows cannot be divided into {count} equal micro-batches: "
            f"give a multiple of {count} rows, or colrow.pipeline_parallel another number of micro-batches"
        )
    parts: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, item in batch.items():
        pieces: Iterator[Any] = iter(item.split(size // count) if name in several else [item] * count)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece
    return parts

"""Trying what a traced program does with its logits on logits that are cut, before anything is cut.

What cut logits can do is said in one place, :mod:`colrow.apply.loss_functions`. So the calls of the program
are done once more as they were recorded, with such logits on the meta device. If one is refused, the logits
have to be whole; if none asks for numbers, the loss can compute them itself, for some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from colrow.apply.dry_run import DryRanks
from colrow.apply.loss import is_watched
from colrow.apply.loss_functions import answer
from colrow.apply.loss_late import late_logits
from colrow.apply.loss_tensor import Call, LocalLogits, Vocabulary
from colrow.axes.factor import Reason
from colrow.errors import PlanError
from colrow.layers.linear_functions import ColumnWeights
from colrow.layers.products import Products
from colrow.layout import Cut
from colrow.localise.arguments import changed, values_of
from colrow.modules import is_linear
from colrow.plan.plan import Loss
from colrow.trace.records import FunctionCall, ModuleCall, Operation, Trace, Value
from colrow.trace.tree import Path, tensors_of


@dataclass(frozen=True)
class LossTrial:
    """What came of it.

    Attributes:
        refused: why logits have to be whole, or ``None``.
        fused: whether the loss can do without all of them at once.
    """

    refused: Reason | None = None
    fused: bool = False


def try_loss(model: nn.Module, trace: Trace, loss: Loss, cut: Cut, layers: Sequence[ModuleCall]) -> LossTrial:
    """Follow the logits in every run in which they go into a loss.

    Args:
        model: the original.
        trace: of it.
        loss: the loss that a plan would compute from parts.
        cut: the ids of each rank.
        layers: the calls of the logits layer from which losses are computed.
    """
    layer = model.get_submodule(loss.logits)
    fused = is_linear(layer) and not is_watched(model, loss)
    for _, root in trace.runs:
        if not any(root.first <= one.first < root.last for one in layers):
            if _has_labels(root, loss):
                return LossTrial(Reason(f"it is not computed in every call that is given {loss.labels}"))
            continue
        run = _Run(trace, loss, cut)
        try:
            run.follow(root)
        except _RefusedError as refused:
            return LossTrial(refused.reason)
        fused &= run.fused
    return LossTrial(None, fused)


def _has_labels(root: ModuleCall, loss: Loss) -> bool:
    """Whether a run was given what asks for the loss."""
    names = [value.source.name for _, value in root.inputs if value.source.kind == "input"]
    return any(name.split(".")[0] == loss.labels for name in names)


class _RefusedError(Exception):
    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Run:
    """One run of the program, followed from its logits on."""

    def __init__(self, trace: Trace, loss: Loss, cut: Cut) -> None:
        self._trace, self._loss, self._cut = trace, loss, cut
        self._logits: list[LocalLogits] = []
        self._live: dict[int, LocalLogits] = {}

    @property
    @torch.no_grad()
    def fused(self) -> bool:
        """Whether nobody has asked for numbers, and no logits would be computed for several losses."""
        return all(
            one.late is not None and one.late.origin.is_late and one.vocabulary.losses in ([], [True])
            for one in self._logits
        )

    @torch.no_grad()
    def follow(self, root: ModuleCall) -> None:
        """Do all calls with logits.

        Raises:
            _RefusedError: at the first that is refused.
        """
        calls = {call.first: call for call in self._trace.calls if root.first <= call.first < root.last}
        ends = {
            module.last: module
            for module in self._trace.modules
            if module.path == self._loss.logits and root.first <= module.first < root.last
        }
        index = root.first
        while index < root.last:
            if index in ends:
                self._begin(ends[index])
            step = calls.get(index, self._trace.operations[index])
            self._do(step)
            index = step.last if isinstance(step, FunctionCall) else index + 1

    def _begin(self, module: ModuleCall) -> None:
        """The layer has given logits."""
        ranks = DryRanks(0, self._cut.ranks)
        for _, value in module.outputs:
            vocabulary = Vocabulary(ranks, self._cut, f"loss of {self._loss.logits}", answer)
            x = torch.empty((*value.shape[:-1], 1), dtype=value.dtype, device="meta")
            weight = torch.empty((self._cut.count(0), 1), dtype=value.dtype, device="meta")
            layer = ColumnWeights(ranks, "", True, Products(), True)
            logits = late_logits(x, weight, None, layer, vocabulary, self._loss.logits)
            if logits is None:
                logits = LocalLogits.of(x.expand(*x.shape[:-1], len(weight)), vocabulary, x.dim() - 1)
            self._logits.append(logits)
            self._live[value.index] = logits

    def _do(self, step: FunctionCall | Operation) -> None:
        """Do a call once more, if logits are among its arguments."""
        live = [one for one in values_of((step.arguments, step.keywords)) if one.index in self._live]
        if not live:
            return
        name = step.name if isinstance(step, FunctionCall) else step.name.rpartition(".")[2]
        outputs = values_of(step.outputs)
        chosen = prod(outputs[0].shape) / max(1, prod(live[0].shape)) if name == "__getitem__" else None

        def given(path: Path, item: Any) -> Any:
            return self._given(item, chosen)

        arguments, keywords = changed(step, given)
        logits = tuple(one for one in tensors_of((arguments, keywords)) if isinstance(one, LocalLogits))
        try:
            with torch._C.DisableTorchFunctionSubclass():
                found = tensors_of(answer(Call(step.function, name, arguments, keywords, logits)))
        except PlanError as error:
            raise self._refusal(error.cause, step) from error
        except Exception as error:  # whatever it is, it is not known what the call would do with parts
            raise self._refusal(f"{name} of a part raises {type(error).__name__}: {error}", step) from error
        shapes = [list(one.shape) for one in found]
        if shapes != [list(one.shape) for one in outputs]:
            raise self._refusal(f"{name} of a part gives {shapes}", step)
        for value, tensor in zip(outputs, found, strict=True):
            self._live.pop(value.index, None)
            if isinstance(tensor, LocalLogits):  # and not a loss, which is whole
                self._live[value.index] = tensor

    def _given(self, item: Any, chosen: float | None) -> Any:
        """An argument: logits as they have become, other tensors without numbers.

        Args:
            chosen: which share of the elements of logits is selected, if some are.
        """
        if isinstance(item, Value):
            logits = self._live.get(item.index)
            if logits is not None:
                return logits
            if item.dtype == torch.bool and chosen is not None:
                # how many elements a mask selects depends on its values
                size = prod(item.shape)
                return (torch.arange(size) < round(chosen * size)).view(item.shape)
            return torch.empty(item.shape, dtype=item.dtype, device="meta")
        if isinstance(item, torch.device):
            return torch.device("meta")
        return int(item) if isinstance(item, int) and not isinstance(item, bool) else item

    def _refusal(self, cause: str, step: FunctionCall | Operation) -> _RefusedError:
        first = self._trace.operations[step.first] if isinstance(step, FunctionCall) else step
        return _RefusedError(Reason(cause, first))

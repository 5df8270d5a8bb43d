"""Linear layers that read the whole of a sequence and keep this rank's part of it for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from colrow.collectives.statistics import current_phase
from colrow.layers.inputs import GatheredInput
from colrow.layers.siblings import Linear, Siblings, siblings_of


@dataclass(slots=True)
class _Gathered:
    """A value that has been gathered, and how many layers have read it."""

    part: Tensor
    whole: Tensor
    version: int
    again: GatheredInput
    siblings: Siblings | None = None
    reads: int = 0


class KeptParts:
    """The layers, as one node of the graph: its backward gathers the parts again.

    The gradients of weights are all that needs the whole in a backward pass. Nothing is gathered again where
    activations are recomputed, or what autograd keeps goes elsewhere, and where layers are no plain ones (see
    :func:`colrow.layers.siblings.siblings_of`), as under autocast: then each layer keeps the whole.

    Args:
        gather: gives the whole of a part, once for all that read it.
        enter: gives it anew, and has it noted.
        given_parts: whether the layers are given parts, to be gathered here, or wholes.
    """

    def __init__(
        self, gather: Callable[[Tensor], Tensor], enter: Callable[[Tensor], Tensor], given_parts: bool
    ) -> None:
        self._gather, self._enter, self._given_parts = gather, enter, given_parts
        self._layers: list[Linear] = []
        self._latest: _Gathered | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_latest": None}  # activations are not copied

    def join(self, layer: Linear) -> int:
        """See :class:`colrow.layers.entry.LayerEntry`."""
        self._layers.append(layer)
        return len(self._layers) - 1

    def forget(self) -> None:
        """Let go of the last value."""
        self._latest = None

    def note(self, part: Tensor, whole: Tensor, again: GatheredInput) -> None:
        """``whole`` was gathered from ``part``, and its gradient will be wanted."""
        self._latest = None
        if part.requires_grad and torch.is_grad_enabled() and not _may_be_recomputed():
            self._latest = _Gathered(part, whole, whole._version, again)

    def __call__(self, value: Tensor) -> Tensor:
        """The whole."""
        if not self._given_parts:
            return value
        found = None if torch.compiler.is_dynamo_compiling() else self._find(value)
        if found is None:
            return self._gather(value)
        self._count(found)
        return found.whole

    def product(self, number: int, value: Tensor) -> Tensor | None:
        """See :class:`colrow.layers.entry.LayerEntry`."""
        if not (value.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_dynamo_compiling():
            return None
        found = self._find(value)
        if found is None and self._given_parts and not _may_be_recomputed():
            self._enter(value)
            found = self._find(value)
        if found is None:
            return None
        if found.siblings is None:
            found.siblings = siblings_of(found.whole, found.part, self._layers, found.again)
        result = None if found.siblings is None else found.siblings.product(number)
        if result is not None:
            self._count(found)
        return result

    def _find(self, value: Tensor) -> _Gathered | None:
        latest = self._latest
        if latest is None or latest.whole._version != latest.version:
            return None
        return latest if value is (latest.part if self._given_parts else latest.whole) else None

    def _count(self, found: _Gathered) -> None:
        found.reads += 1
        if found.reads == len(self._layers):
            self._latest = None


def _may_be_recomputed() -> bool:
    """Whether this is run again in a backward pass, or may be: then what autograd keeps is not kept long."""
    is_elsewhere = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return is_elsewhere or current_phase() == "backward"

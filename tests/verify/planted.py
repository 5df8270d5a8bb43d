"""Planting errors: reductions that do not happen, or that sum something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from colrow.collectives import Communicator, Pending

Change = Callable[[Tensor], Tensor]


@contextmanager
def changed_reduction(label: str, change: Change | None) -> Iterator[list[str]]:
    """All-reduces whose label contains ``label`` sum changed tensors; without ``change`` they do nothing.

    Gives the labels that were met.
    """
    original, met = Communicator.start_all_reduce, list[str]()

    def start(self: Communicator, tensor: Tensor, *arguments: Any, **options: Any) -> Pending:
        if label not in options.get("label", ""):
            return original(self, tensor, *arguments, **options)
        met.append(options["label"])
        if change is None:
            return Pending.completed(tensor.clone())
        return original(self, change(tensor), *arguments, **options)

    with mock.patch.object(Communicator, "start_all_reduce", start):
        yield met

"""The ranks that hold a model, its replicas included, and how they go through a save together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from colrow.collectives import communicator
from colrow.errors import RankFailure
from colrow.mesh import root_mesh
from colrow.replicas import digest
from colrow.state import ParallelState

_MESSAGE_BYTES = 1000
_NOBODY = -(2**62)


class Holders:
    """All ranks of the mesh that a model was parallelized with, or of the mesh that this was sliced from.

    Ranks along the other dimensions than the tensor-parallel one hold replicas, or other stages of a
    pipeline. Every holder calls every method, in the same order; all of them return or raise together.

    Args:
        state: of the model.
        of_stage: only those of this rank's pipeline stages, who hold the same parameters.
    """

    def __init__(self, state: ParallelState, *, of_stage: bool = False) -> None:
        root = root_mesh(state.mesh)
        names = root.mesh_dim_names or ("",) * root.ndim
        self._groups = [
            communicator(root.get_group(dimension))
            for dimension, name in enumerate(names)
            if not (of_stage and name == "pp")
        ]
        self._device = state.mesh.device_type
        self._rank = state.communicator.global_ranks[state.communicator.rank]

    def largest(self, values: Tensor, label: str) -> Tensor:
        """Elementwise maximum over all holders, on the CPU; ``values`` has the same shape on each."""
        values = values.to(self._device)
        for group in self._groups:
            values = group.all_reduce(values, "max", label=label)
        return values.cpu()

    def differing(self, values: Tensor, label: str) -> Tensor:
        """Which elements of ``values`` are not the same on all holders: a boolean tensor of its shape."""
        largest, negative = self.largest(torch.stack([values, -values]), label)
        return largest != -negative

    def require_same(self, text: str, message: str, label: str) -> None:
        """Go on only if all holders have the same ``text``.

        Raises:
            ValueError: ``message``, on every holder.
        """
        if self.differing(torch.tensor([digest(text)]), label).any():
            raise ValueError(message)

    @contextmanager
    def together(self, label: str) -> Iterator[None]:
        """What is done in this context fails on all holders if it fails on one. It must not communicate.

        A rank whose own work failed raises its own exception; the others a ``ValueError`` if it was one,
        else an ``OSError``, with what the first failing rank reported.
        """
        error: Exception | None = None
        try:
            yield
        except RankFailure:
            raise
        except Exception as caught:
            error = caught
        self.agree(error, label)

    def agree(self, error: Exception | None, label: str) -> None:
        """Return if no holder has an ``error``; else raise as :meth:`together` does."""
        mine = torch.tensor([_NOBODY if error is None else -self._rank])
        first = int(self.largest(mine, label))
        if first == _NOBODY:
            return
        message = torch.zeros(_MESSAGE_BYTES, dtype=torch.int64)
        if error is not None and -self._rank == first:
            kind = b"V" if isinstance(error, ValueError) else b"O"
            report = kind + f"{type(error).__name__}: {error}".encode()[: _MESSAGE_BYTES - 1]
            message[: len(report)] = torch.tensor(list(report))
        reported = bytes(one for one in self.largest(message, label).tolist() if one)
        if error is not None:
            raise error
        text = f"{label} failed on rank {-first}, which reported {reported[1:].decode(errors='ignore')}"
        raise ValueError(text) if reported[:1] == b"V" else OSError(text)

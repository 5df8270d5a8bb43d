"""Where an optimizer keeps the state of a parameter: with it, or with the replica that updates it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from colrow.collectives import Communicator, communicator
from colrow.collectives.texts import all_gather_texts
from colrow.data_shards import held
from colrow.optimizer_parts import OptimizerOfParts

_LABEL = "optimizer state of replicas"


@dataclass(frozen=True)
class Source:
    """Which of some ranks has a tensor that the others lack.

    Attributes:
        ranks: all of which read it together.
        rank: the one that has it.
        device: of the collective.
    """

    ranks: Communicator
    rank: int
    device: torch.device

    def read(self, local: Tensor) -> Tensor:
        """The tensor, on all of them; those that lack it give one of its shape and dtype on meta."""
        if self.ranks.rank == self.rank:
            local = local.detach().to(self.device)
        else:
            local = torch.empty_like(local, device=self.device)
        return self.ranks.broadcast(local, self.rank, label=_LABEL)


class OptimizerState:
    """An optimizer's state by parameter, whichever replica has it.

    Args:
        optimizer: any; of a ``ZeroRedundancyOptimizer`` each replica has the state of some parameters, and an
            :class:`OptimizerOfParts` may have some parameters in one of those and others in another.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        parts = optimizer.parts if isinstance(optimizer, OptimizerOfParts) else [optimizer]
        self._parts = [_Part(one) for one in parts]
        self._by_parameter = {parameter: part for part in self._parts for parameter in part.parameters}

    def source(self, parameter: nn.Parameter) -> Source | None:
        """Who has the state of a parameter; ``None``: every replica."""
        part = self._by_parameter.get(parameter)
        return part.source(parameter) if part else None

    def of(self, parameters: Sequence[nn.Parameter]) -> list[Mapping[str, Any]]:
        """The state of each parameter by its keys. All replicas call this together.

        What another replica has is a tensor on meta here; single numbers, such as counts of steps, are real.
        """
        found: dict[nn.Parameter, Mapping[str, Any]] = {}
        for part in self._parts:
            own = [one for one in parameters if self._by_parameter.get(one) is part]
            found.update(zip(own, part.of(own), strict=True))
        return [found.get(one, {}) for one in parameters]

    def own_bytes(self) -> int:
        """What this rank has of it; single numbers, such as counts of steps, are left out."""
        found = [one for part in self._parts for one in part.own_tensors() if one.dim()]
        return sum(held(one).numel() * one.element_size() for one in found)

    def put(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Replace the state of a parameter, if this replica is to have it."""
        part = self._by_parameter.get(parameter)
        if part is not None:
            part.put(parameter, values)


class _Part:
    """An optimizer that is one, of which replicas may have parts."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._zero: Any = optimizer if isinstance(optimizer, ZeroRedundancyOptimizer) else None
        self._own: dict[Tensor, Any] = (self._zero.optim if self._zero else optimizer).state
        self.parameters: list[Tensor] = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]

    def own_tensors(self) -> list[Tensor]:
        return [one for state in self._own.values() for one in state.values() if isinstance(one, Tensor)]

    def source(self, parameter: nn.Parameter) -> Source | None:
        if self._zero is None:
            return None
        rank = self._zero._param_to_rank[parameter]
        return Source(communicator(self._zero.process_group), rank, parameter.device)

    def of(self, parameters: Sequence[nn.Parameter]) -> list[Mapping[str, Any]]:
        own = [dict(self._own.get(parameter, {})) for parameter in parameters]
        if self._zero is None:
            return list(own)
        ranks = communicator(self._zero.process_group)
        text = json.dumps([{key: _describe(value) for key, value in one.items()} for one in own])
        device = self._zero._default_device
        described = [json.loads(one) for one in all_gather_texts(ranks, text, device, label=_LABEL)]
        state: list[Mapping[str, Any]] = []
        for index, parameter in enumerate(parameters):
            source = self.source(parameter)
            if source is None or source.rank == ranks.rank:
                state.append(own[index])
            else:
                state.append({key: _stand_in(one) for key, one in described[source.rank][index].items()})
        return state

    def put(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        self._own.pop(parameter, None)
        source = self.source(parameter)
        if values and (source is None or source.ranks.rank == source.rank):
            self._own[parameter] = values


def _describe(value: object) -> Any:
    if not isinstance(value, Tensor):
        return None
    name = str(value.dtype).removeprefix("torch.")
    return [name, list(value.shape), value.item() if value.dim() == 0 else None]


def _stand_in(described: Any) -> Tensor | None:
    if described is None:
        return None
    name, shape, number = described
    dtype = getattr(torch, name)
    return torch.tensor(number, dtype=dtype) if not shape else torch.empty(shape, dtype=dtype, device="meta")

"""What a rank communicates in a step, by the dimension of the mesh along which it does."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

import colrow
from colrow.collectives.statistics import GRADIENTS_OF_REPLICAS
from colrow.data_shards import held
from colrow.mesh import replicas, replicas_of_experts, size_of
from colrow.state import placed_parameters
from colrow.train.configuration import MeshConfiguration

_COUNTED = ("pp", "ep", "cp", "tp")


class Traffic:
    """Payload bytes of this rank in one step.

    Along ``tp``, ``ep`` and ``cp`` they are counted, and along ``pp`` those of what several stages hold; the
    pipeline says what else it has sent. What replicas exchange goes past colrow's counters in part, so all of
    it is told by the sizes of what this rank trains.

    Args:
        model: what is trained.
        mesh: the ranks.
        configuration: how replicas train together.
        micro_batches: of a replica in a step.
    """

    def __init__(
        self, model: Any, mesh: DeviceMesh, configuration: MeshConfiguration, micro_batches: int
    ) -> None:
        self._model, self._mesh, self._data = model, mesh, configuration.data
        self._micro_batches = micro_batches
        self._before: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def begin(self) -> None:
        """A step begins that is to be measured."""
        self._before = self._counted()

    def end(self) -> None:
        """It has ended: from now on ``bytes`` tells what it communicated."""
        self.bytes = {name: count - self._before[name] for name, count in self._counted().items()}
        if isinstance(self._model, colrow.Pipeline):
            self.bytes["pp"] += self._model.report().bytes_sent
        if replicas(self._mesh).size() > 1:
            self.bytes["replicas"] = self._of_replicas()

    def _counted(self) -> dict[str, int]:
        return {name: self._along(name) for name in _COUNTED if size_of(self._mesh, name) > 1}

    def _along(self, name: str) -> int:
        """Without the gradients of replicas, who may be the ranks of this dimension alone."""
        found = colrow.comm_stats(self._mesh[name])
        return found.bytes - found.where(label=GRADIENTS_OF_REPLICAS).bytes

    def _of_replicas(self) -> int:
        """Gradients, and with ZeRO the parameters; FSDP gathers parameters in each forward and backward.

        Experts have fewer replicas than all else, and none if ``ep`` is the only dimension of replicas. What
        FSDP shards with the whole model it gathers in the forward alone, and so does a pipeline, which keeps
        what it has gathered from a step's first micro-batch to its last.
        """
        once, total = self._gathered_once(), 0
        sizes = replicas(self._mesh).size(), replicas_of_experts(self._mesh).size()
        for one in placed_parameters(self._model):
            ranks = sizes[one.experts is not None]
            if ranks == 1 or not one.parameter.requires_grad:
                continue
            own = held(one.parameter).numel() * one.parameter.element_size()
            if self._data != "fsdp":
                total += own * (2 if self._data == "zero1" else 1)
            elif isinstance(self._model, colrow.Pipeline):
                total += own * ranks * 2
            else:
                gathers = self._micro_batches * (1 if id(one.parameter) in once else 2)
                total += own * ranks * (gathers + 1)
        return total

    def _gathered_once(self) -> set[int]:
        """Identities of the parameters that FSDP does not let go of after the forward."""
        let_go = {
            id(parameter)
            for module in self._model.modules()
            if isinstance(module, FSDPModule) and module is not self._model
            for parameter in cast(nn.Module, module).parameters()
        }
        return {id(one) for one in self._model.parameters() if id(one) not in let_go}

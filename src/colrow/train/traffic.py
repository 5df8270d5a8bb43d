"""What a rank communicates in a step, by the dimension of the mesh along which it does."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

import colrow
from colrow.data_shards import held
from colrow.mesh import replicas, size_of
from colrow.state import placed_parameters
from colrow.train.configuration import MeshConfiguration

_COUNTED = ("tp", "ep", "cp")


class Traffic:
    """Payload bytes of this rank in one step.

    Along ``tp``, ``ep`` and ``cp`` they are counted, along ``pp`` the pipeline says what it has sent. What
    replicas exchange goes past colrow's counters: it follows from the sizes of what this rank trains.

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
        # a pipeline keeps what it has gathered from a step's first micro-batch to its last
        self._gathers = 1 if configuration.pp > 1 else 2 * micro_batches
        self._before: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def begin(self) -> None:
        """A step begins that is to be measured."""
        self._before = self._counted()

    def end(self) -> None:
        """It has ended: from now on ``bytes`` tells what it communicated."""
        self.bytes = {name: count - self._before[name] for name, count in self._counted().items()}
        if isinstance(self._model, colrow.Pipeline):
            self.bytes["pp"] = self._model.report().bytes_sent
        if replicas(self._mesh).size() > 1:
            self.bytes["replicas"] = self._of_replicas()

    def _counted(self) -> dict[str, int]:
        mesh = self._mesh
        return {name: colrow.comm_stats(mesh[name]).bytes for name in _COUNTED if size_of(mesh, name) > 1}

    def _of_replicas(self) -> int:
        """Gradients, and with ZeRO the parameters; FSDP gathers parameters in each forward and backward."""
        trained = [one.parameter for one in placed_parameters(self._model) if one.parameter.requires_grad]
        own = sum(held(one).numel() * one.element_size() for one in trained)
        if self._data == "fsdp":
            return own * replicas(self._mesh).size() * (self._gathers + 1)
        return 2 * own if self._data == "zero1" else own

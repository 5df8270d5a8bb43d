"""Random numbers: alike on all ranks outside of regions, different by rank inside.

Dropout on a replicated value must draw the same mask on every rank, dropout on a sharded value another mask
on each. There is one stream of random numbers, torch's default generator, in the same state on all ranks of
a tensor-parallel group. A region draws one number from it as it begins, and uses a stream seeded by that
number and the rank until it ends. So a region is a function of the one stream alone: saving that stream's
state saves everything, and activation checkpointing, which restores it, replays regions exactly.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from colrow.collectives import Communicator

_MASK = (1 << 63) - 1


def _mix(seed: int, position: int) -> int:
    """A seed for one position: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    value = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) & _MASK


def manual_seed(seed: int, mesh: DeviceMesh) -> None:
    """Seed torch's generators: alike within a tensor-parallel group, different between ``dp`` replicas.

    The first replica gets ``seed`` itself, as ``torch.manual_seed(seed)`` would give it. Initialise the
    replicas' weights under one seed before calling this with ``dp`` above 1.
    """
    names = mesh.mesh_dim_names or ()
    replica = mesh.get_local_rank("dp") if "dp" in names else 0
    torch.manual_seed(seed if replica == 0 else _mix(seed, replica))


class RegionRandomness:
    """Switches between the common stream and this rank's stream at the borders of regions.

    One object serves all regions of a model; they do not nest. Only training needs it: what draws no random
    numbers pays two small copies of the generator's state.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._generator: torch.Generator = torch.default_generator
        self._outside: torch.Tensor | None = None
        self._seed = 0
        self._inside: tuple[str, set[str]] = ("", set())

    def enter(self, device: torch.device, region: str, member: str) -> None:
        """Begin ``region``, unless it has begun.

        ``member`` is one of the layers that read the region's input; the first of them begins it. If the
        same one comes again, or one of another region, then the last pass was left inside the region.
        """
        if self._outside is not None:
            name, members = self._inside
            if name == region and member not in members:
                members.add(member)
                return
            self.abandon()
        self._generator = _default_generator(device)
        # drawn on the host, whatever the device: no synchronisation, and the same on all ranks
        drawn = int(torch.randint(_MASK, (1,)))
        self._seed = _mix(drawn, self._communicator.rank)
        self._outside = self._generator.get_state()
        self._generator.manual_seed(self._seed)
        self._inside = (region, {member})

    def leave(self) -> None:
        """End the region, if one has begun: the common stream goes on where it was."""
        if self._outside is not None:
            self._generator.set_state(self._outside)
            self._outside = None

    def abandon(self) -> None:
        """End a region that the last pass did not: an exception, or a recomputation that stopped early.

        Activation checkpointing has then put the common stream back itself, which shows in the seed.
        """
        if self._outside is not None and self._generator.initial_seed() == self._seed:
            self._generator.set_state(self._outside)
        self._outside = None


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator

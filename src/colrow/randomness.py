"""Random numbers: alike on all ranks outside of regions, different by rank inside.

Dropout on a replicated value must draw the same mask on every rank, dropout on a sharded value another mask
on each. There is one stream of random numbers, torch's default generator, in the same state on all ranks of
a tensor-parallel group. A region draws one number from it as it begins, and uses a stream seeded by that
number and the rank until it ends. So a region is a function of the one stream alone: saving that stream's
state saves everything, and activation checkpointing, which restores it, replays regions exactly.
"""

from __future__ import annotations

import torch
import torch._dynamo
from torch.distributed.device_mesh import DeviceMesh

from colrow.collectives import Communicator
from colrow.mesh import coordinate, root_mesh, size_of
from colrow.traced_regions import TracedRegions
from colrow.tracer import must_not_break, outside_of_graphs

_between_graphs = outside_of_graphs("random numbers that differ by rank are drawn between compiled graphs")
_MASK = (1 << 63) - 1
_SEED_BITS, _REGION_MARK = 47, 0x5C07
"""Seeds of regions begin with a mark, by which a generator's state shows that it belongs to a region."""


def _mix(seed: int, position: int) -> int:
    """A seed for one position: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    value = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) & _MASK


def manual_seed(seed: int, mesh: DeviceMesh) -> None:
    """Seed torch's generators: alike within a tensor-parallel group, different along all other dimensions.

    The first of those groups gets ``seed`` itself, as ``torch.manual_seed(seed)`` would give it. Initialise
    the weights under one seed before calling this.
    """
    mesh = root_mesh(mesh)
    index = 0
    for name in mesh.mesh_dim_names or ():
        if name != "tp":
            index = index * size_of(mesh, name) + coordinate(mesh, name)
    torch.manual_seed(seed if index == 0 else _mix(seed, index))


class RegionRandomness:
    """Switches between the common stream and this rank's stream at the borders of regions.

    One object serves all regions of a model. A region is named; the layers that read its input enter it, the
    row-parallel layer that sums over it leaves it, both within its *scope*, the module that holds them. Only
    training needs it: what draws no random numbers pays two small copies of the generator's state.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._scopes: list[str] = []
        self._open: list[str] = []
        self._outside: torch.Tensor | None = None
        self._seed = 0
        self._generator: torch.Generator | None = None
        self._partly_left: torch.Tensor | None = None
        self._paused: list[torch.Tensor] = []
        self._traced = TracedRegions()

    def begin_scope(self, region: str, is_training: bool) -> None:
        """The forward of the module that holds ``region`` begins."""
        if torch.compiler.is_dynamo_compiling():
            if is_training:
                self._traced.begin_scope(region)
            if must_not_break():
                return
        if not self._scopes and self._outside is not None:
            self.abandon()  # an earlier pass was interrupted inside a region
        self._scopes.append(region if is_training else "")

    def end_scope(self) -> None:
        """The forward ends, also by an exception: a region that is still open is left."""
        if torch.compiler.is_dynamo_compiling() and must_not_break():
            return
        if self._scopes:
            self._scopes.pop()
        if not self._scopes and self._outside is not None:
            self.abandon()

    def enter(self, device: torch.device, region: str) -> None:
        """Begin ``region`` unless it has begun, or the forward that holds it is not running."""
        if not torch.compiler.is_dynamo_compiling():
            self._enter(device, region)
        elif self._traced.has_scope(region) or (must_not_break() and region in self._scopes):
            self._traced.enter(region)
        elif not must_not_break() and (not self._scopes or region in self._scopes):
            self._enter_between_graphs(device, region)

    def _enter(self, device: torch.device, region: str) -> None:
        is_backward = torch._C._current_graph_task_id() != -1  # activation checkpointing recomputes there
        if region not in self._scopes and not is_backward:
            return
        generator = _default_generator(device)
        if self._outside is not None and generator.initial_seed() != self._seed:
            self._forget()  # a recomputation ended inside a region, and the stream was put back
        if self._outside is not None:
            if region not in self._open:
                self._open.append(region)
            return
        if generator.initial_seed() >> _SEED_BITS == _REGION_MARK:
            return  # a recomputation that began inside a region has the region's stream already
        # drawn on the host, whatever the device: no synchronisation, and the same on all ranks
        drawn = int(torch.randint(_MASK, (1,)))
        mixed = _mix(drawn, self._communicator.rank) & ((1 << _SEED_BITS) - 1)
        self._generator, self._seed = generator, (_REGION_MARK << _SEED_BITS) | mixed
        self._outside, self._open = generator.get_state(), [region]
        generator.manual_seed(self._seed)

    _enter_between_graphs = _between_graphs(_enter)

    def leave(self, region: str) -> None:
        """End ``region``, if it has begun: the common stream goes on where it was.

        Raises:
            RuntimeError: if which stream to draw from cannot be told: two regions overlapped and something
                was drawn while one of them had ended, or activation checkpointing recomputes a part that
                begins inside the region and ends outside of it.
        """
        if not torch.compiler.is_dynamo_compiling():
            self._leave(region)
        elif self._outside is not None:
            self._leave_between_graphs(region)
        else:
            drawing = self._traced.leave(region)
            if drawing:
                torch._dynamo.graph_break(
                    f"{drawing} draws random numbers inside the region of {region}. They differ by rank, so "
                    "they cannot be drawn in one graph with what lies outside of the region"
                )

    def _leave(self, region: str) -> None:
        if self._outside is None or self._generator is None:
            generator = torch.default_generator if self._generator is None else self._generator
            if generator.initial_seed() >> _SEED_BITS == _REGION_MARK:
                raise RuntimeError(
                    f"activation checkpointing recomputes a part that begins inside the region of {region} "
                    "and ends outside, so its random numbers cannot be replayed: checkpoint whole blocks"
                )
            return
        if region in self._open:
            self._open.remove(region)
        if self._open:
            self._partly_left = self._generator.get_state()
            return
        ambiguous = self._partly_left is not None and not torch.equal(
            self._partly_left, self._generator.get_state()
        )
        self.abandon()
        if ambiguous:
            raise RuntimeError(
                f"the region of {region} overlaps another, and random numbers were drawn while only one of "
                "them had ended, so it cannot be told whether all ranks should draw the same: use no dropout "
                "between the two, or compute one region after the other"
            )

    _leave_between_graphs = _between_graphs(_leave)

    def pause(self) -> None:
        """Draw from the common stream, until :meth:`resume`: for whole values within a region."""
        if self._outside is None or self._generator is None:
            if torch.default_generator.initial_seed() >> _SEED_BITS == _REGION_MARK:
                raise RuntimeError(
                    "activation checkpointing recomputes a part of a region in which random numbers are "
                    "drawn for whole values too, so they cannot be replayed: checkpoint whole blocks"
                )
            return
        self._paused.append(self._generator.get_state())
        self._generator.set_state(self._outside)

    def resume(self) -> None:
        """Go on with the region's stream."""
        if self._paused and self._generator is not None:
            self._outside = self._generator.get_state()
            self._generator.set_state(self._paused.pop())

    def abandon(self) -> None:
        """End whatever has begun, and put the common stream back unless somebody else has done so."""
        generator = self._generator
        if self._outside is not None and generator is not None and generator.initial_seed() == self._seed:
            generator.set_state(self._outside)
        self._forget()

    def _forget(self) -> None:
        self._outside = self._partly_left = None
        self._open, self._paused = [], []


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator

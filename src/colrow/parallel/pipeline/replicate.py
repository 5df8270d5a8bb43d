"""Replicas of a pipeline: gradients averaged once a step, and parameters shared among replicas if asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from colrow.collectives import communicator
from colrow.data_shards import refuse_inference_mode
from colrow.parallel.pipeline.gradients import average_over_replicas, with_gradients_anywhere
from colrow.parallel.pipeline.pipeline import Pipeline


@dataclass(frozen=True)
class Replicas:
    """Which ranks hold the same of this rank's stages.

    Attributes:
        mesh: those of all parameters but experts.
        of_experts: those of experts, which ``ep`` divides: fewer.
        experts: paths of the modules that have parts of experts.
    """

    mesh: DeviceMesh
    of_experts: DeviceMesh
    experts: tuple[str, ...] = ()


def replicate_stages(pipeline: Pipeline, replicas: Replicas, kind: str) -> None:
    """Let replicas of a pipeline train as one; see :func:`colrow.data_parallel`.

    Args:
        pipeline: changed in place.
        replicas: of this rank's stages.
        kind: ``ddp`` or ``fsdp``.
    """
    model = pipeline.model
    if kind == "ddp":
        pipeline.set_replicas(_Averaged(model, replicas))
        return
    pipeline.set_replicas(_Sharded(model, *_shard(model, pipeline.units(), replicas), replicas))


class _Averaged:
    """Every replica holds its stages; gradients are averaged in buckets after the schedule.

    Which suits schedules better than ``DistributedDataParallel``, whose reductions begin in a backward pass
    and expect each parameter in it once.
    """

    def __init__(self, model: nn.Module, replicas: Replicas) -> None:
        self._model = model
        self._all, self._of_experts = communicator(replicas.mesh), communicator(replicas.of_experts)
        modules = [model.get_submodule(path) for path in replicas.experts]
        self._experts = {id(one) for module in modules for one in module.parameters()}

    def begin(self) -> None:
        """Nothing is to be prepared."""

    def end(self) -> None:
        """Nothing is to be let go of."""

    def finish(self, syncs: bool, sum_shared: Callable[[], None], put_back: Callable[[], None]) -> None:
        """Sum what stages share, then average."""
        sum_shared()
        if syncs:
            parameters = list(self._model.parameters())
            average_over_replicas((one for one in parameters if id(one) not in self._experts), self._all)
            average_over_replicas((one for one in parameters if id(one) in self._experts), self._of_experts)


class _Sharded:
    """Replicas share the parameters of each unit, by FSDP.

    They are gathered when a step begins and let go of when it ends: for each micro-batch anew, they would be
    gathered many times.
    """

    def __init__(self, model: nn.Module, units: list[Any], experts: list[Any], replicas: Replicas) -> None:
        self._model, self._units, self._experts = model, units, experts
        self._modules = [*units, *experts]
        self._all, self._of_experts = communicator(replicas.mesh), communicator(replicas.of_experts)

    def begin(self) -> None:
        """Gather the parameters, and leave gradients where they are until the step's end."""
        refuse_inference_mode()
        for module in self._modules:
            module.set_is_last_backward(False)
            module.set_reshard_after_backward(False)
            module.set_requires_gradient_sync(False)
        for module in self._modules:
            if isinstance(module, _Together):
                module()  # what FSDP prepares with the first forward, it does for units when they are called
            module.unshard()

    def end(self) -> None:
        """Let go of what was gathered."""
        for module in self._modules:
            module.reshard()

    def finish(self, syncs: bool, sum_shared: Callable[[], None], put_back: Callable[[], None]) -> None:
        """Reduce gradients to the parts that replicas hold, then sum what stages share."""
        if not syncs:
            self.end()  # the parts again, which the gradients before were of
            put_back()
            return
        for module in self._modules:
            module.set_is_last_backward(True)
            module.set_reshard_after_backward(True)
            module.set_requires_gradient_sync(True)
        # FSDP reduces what this rank has gradients of, and would wait for ranks that have others
        parameters = [one for unit in self._units for one in unit.parameters()]
        experts = {id(one) for module in self._experts for one in module.parameters()}
        with_gradients_anywhere((one for one in parameters if id(one) not in experts), self._all)
        with_gradients_anywhere((one for one in parameters if id(one) in experts), self._of_experts)
        for unit in self._units:
            _reduce(unit)
        average_over_replicas(
            (one for one in self._model.parameters() if type(one) is nn.Parameter), self._all
        )
        sum_shared()


def _reduce(module: Any) -> None:
    """What FSDP does at the end of a backward pass, as torch's own stages have it done."""
    state = module._get_fsdp_state()
    for one in state._state_ctx.all_states:
        groups = getattr(one, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.12
            groups = [one._fsdp_param_group] if one._fsdp_param_group is not None else []
        for group in groups:
            group.post_backward()
    state._root_post_backward_final_callback()


def _shard(
    model: nn.Module, units: list[nn.Module], replicas: Replicas
) -> tuple[list[FSDPModule], list[FSDPModule]]:
    """Shard the units over replicas, those together that share a parameter; experts in them by themselves."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, slot in module._parameters.items():
            if slot is not None:
                places.setdefault(id(slot), []).append((module, leaf))
    held = {module for unit in units for module in unit.modules()}
    experts = [one for path in replicas.experts if (one := model.get_submodule(path)) in held]
    for module in experts:
        fully_shard(module, mesh=replicas.of_experts, reshard_after_forward=False)
    sharded: list[FSDPModule] = []
    for several in _sharing(units):
        unit = several[0] if len(several) == 1 else _Together(several)
        # those of experts are others by now, which no other unit reads
        found = [places[id(one)] for one in unit.parameters() if id(one) in places]
        inside = set(unit.modules())
        fully_shard(unit, mesh=replicas.mesh, reshard_after_forward=False)
        for slots in found:
            # other places of a tied parameter, whose units compute on other stages
            own_module, own_leaf = next(slot for slot in slots if slot[0] in inside)
            for module, leaf in slots:
                if module not in inside:
                    module._parameters[leaf] = own_module._parameters[own_leaf]
        assert isinstance(unit, FSDPModule)
        sharded.append(unit)
    return sharded, [one for one in experts if isinstance(one, FSDPModule)]


class _Together(nn.ModuleList):
    """Units that share parameters: FSDP wants one module that holds them. It is called to gather them."""

    def forward(self) -> None:
        """Compute nothing: the units are called by themselves."""


def _sharing(units: list[nn.Module]) -> list[list[nn.Module]]:
    """The units with parameters: those together that share some, as an embedding and the head may do."""
    found: list[tuple[set[int], list[nn.Module]]] = []
    for unit in units:
        own = {id(parameter) for parameter in unit.parameters()}
        if not own:
            continue
        joined = [one for one in found if one[0] & own]
        found = [one for one in found if not one[0] & own]
        found.append(
            (
                own.union(*(held for held, _ in joined)),
                [each for _, several in joined for each in several] + [unit],
            )
        )
    return [several for _, several in found]

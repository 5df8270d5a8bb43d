"""Applying a plan to a model, in place."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.apply.loss import ParallelLoss
from colrow.apply.shadow import PartialParameters
from colrow.collectives import Communicator, communicator
from colrow.errors import PlanError
from colrow.layers import SharedEntry, VocabParallelEmbedding, column_parallel, row_parallel
from colrow.plan import HandPlan, LocalAttribute, Plan
from colrow.randomness import RegionRandomness
from colrow.state import ParallelState, attach_state, is_parallelized


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: Plan | HandPlan,
    *,
    logits: Literal["gather", "local"] = "gather",
) -> nn.Module:
    """Cut ``model`` over the mesh's ``tp`` ranks as ``plan`` says, in place, and return it.

    The model's own forward goes on to run, on plain local tensors. Parameter objects, their names, ties,
    ``requires_grad``, dtypes and hooks stay, so that an optimizer sees plain parameters, smaller ones.
    Every rank calls this with the same weights (the same seed, or loaded from the same file).

    Given labels, the model computes its loss from logits that are cut over the vocabulary; the output then
    holds :class:`colrow.apply.loss.ShardedLogits` in place of logits.

    Args:
        model: any module whose weights are real, or all on the meta device.
        mesh: from :func:`colrow.init_mesh`.
        plan: a :class:`colrow.plan.Plan` for this number of ranks, or a :class:`colrow.plan.HandPlan`.
        logits: what the model gives without labels: ``"gather"``: all ids on every rank, as the original;
            ``"local"``: this rank's ids, for :func:`colrow.cross_entropy`.

    Raises:
        PlanError: if the plan does not fit the model or the mesh, or the ranks' weights differ.
    """
    ranks = communicator(mesh)
    if is_parallelized(model):
        raise PlanError("", "the model has been parallelized already", "Start from the original model.")
    if isinstance(plan, HandPlan):
        plan = plan.resolve(model, ranks.size)
    if plan.ranks != ranks.size:
        raise PlanError(
            "", f"the plan is for {plan.ranks} ranks, the mesh has {ranks.size}", "Make a new one."
        )
    for name in plan.parameters:
        try:
            model.get_parameter(name)
        except AttributeError as error:
            raise PlanError(name, "the model has no such parameter", "Make a new plan for it.") from error
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters(remove_duplicate=False)}
    try:
        layouts = {name: plan.tensor_layout(name, shape) for name, shape in shapes.items()}
    except ValueError as error:
        raise PlanError("", f"the plan is of another model: {error}", "Make a new one.") from error
    _check_equal_weights(model, ranks)
    _Applier(model, ranks, plan).apply(logits == "gather")
    attach_state(model, ParallelState(mesh, ranks, plan, layouts))
    return model


class _Applier:
    def __init__(self, model: nn.Module, ranks: Communicator, plan: Plan) -> None:
        self.model, self.ranks, self.plan = model, ranks, plan
        self.region = RegionRandomness(ranks)

    def apply(self, gather_logits: bool) -> None:
        plan = self.plan
        logits = plan.loss.logits if plan.loss else None
        for entry in plan.entries:
            shared = SharedEntry(self.ranks, f"enter {', '.join(entry.modules)}")
            for path in entry.modules:
                sharding = plan.parameters[f"{path}.weight"]
                opening = column_parallel(
                    self.model.get_submodule(path),
                    self.ranks,
                    layout=sharding.layout,
                    cut=plan.axes[sharding.axis].cut,
                    # a layer that enters alone overlaps the reduction with its own weight gradient
                    entry=shared if len(entry.modules) > 1 else None,
                    label=path,
                )
                if path != logits:
                    opening.begin_region(self.region, entry.modules[0])
        for exit in plan.exits:
            sharding = plan.parameters[f"{exit.module}.weight"]
            closing = row_parallel(
                self.model.get_submodule(exit.module),
                self.ranks,
                layout=sharding.layout,
                cut=plan.axes[sharding.axis].cut,
                label=exit.module,
            )
            closing.end_region(self.region)
        for lookup in plan.lookups:
            sharding = plan.parameters[f"{lookup.module}.weight"]
            embedding = self.model.get_submodule(lookup.module)
            if not isinstance(embedding, nn.Embedding):
                raise PlanError(lookup.module, "it is not an embedding", "Correct the plan.")
            cut = plan.axes[sharding.axis].cut
            VocabParallelEmbedding.from_module(
                embedding, self.ranks, layout=sharding.layout, cut=cut, label=lookup.module
            )
        self._partial_parameters()
        for attribute in plan.attributes:
            self._localise(attribute)
        if plan.loss is not None:
            cut = plan.axes[plan.loss.axis].cut
            ParallelLoss(plan.loss, self.ranks, cut, gather_logits).attach(self.model)
        # a forward that was interrupted inside a region must not leave the next one there
        self.model.register_forward_pre_hook(_AbandonRegion(self.region), prepend=True)

    def _partial_parameters(self) -> None:
        by_module: dict[str, list[str]] = {}
        for partial in self.plan.partial_parameters:
            path, _, name = partial.name.rpartition(".")
            by_module.setdefault(path, []).append(name)
        for path, names in by_module.items():
            PartialParameters(self.ranks, path, tuple(names)).attach(self.model.get_submodule(path))

    def _localise(self, attribute: LocalAttribute) -> None:
        cut = self.plan.axes[attribute.axis].cut
        module = self.model.get_submodule(attribute.module)
        *path, last = attribute.attribute.split(".")
        holder: object = module
        for name in path:
            duplicate = copy.copy(getattr(holder, name))
            setattr(holder, name, duplicate)
            holder = duplicate
        whole = getattr(holder, last)
        setattr(holder, last, whole // cut.units * cut.count(self.ranks.rank))


class _AbandonRegion:
    def __init__(self, region: RegionRandomness) -> None:
        self._region = region

    def __call__(self, module: nn.Module, arguments: object) -> None:
        self._region.abandon()


def _check_equal_weights(model: nn.Module, ranks: Communicator) -> None:
    """All ranks must slice one model: shards of different models would train, and mean nothing."""
    named = [(name, one) for name, one in model.named_parameters() if not one.is_meta]
    if ranks.size == 1 or not named:
        return
    sums: list[torch.Tensor] = []
    with torch.no_grad():
        for _, parameter in named:
            values = parameter.detach().float() if parameter.element_size() < 4 else parameter.detach()
            sums.extend((values.sum(dtype=torch.float64), values.abs().sum(dtype=torch.float64)))
    mine = torch.stack([one.to(named[0][1].device) for one in sums]).nan_to_num()
    largest, smallest = ranks.all_reduce(
        torch.stack([mine, -mine]), "max", label="compare the ranks' weights"
    ).unbind()
    differ = (largest != -smallest).view(-1, 2).any(1)
    if differ.any():
        name = named[int(differ.nonzero()[0])][0]
        raise PlanError(
            name,
            "the ranks hold different weights",
            "Call torch.manual_seed with one seed on all ranks before building the model, or load one file.",
        )

"""Applying a plan to a model, in place."""

from __future__ import annotations

import copy
from typing import Any, Literal, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.apply.check import check_plan
from colrow.apply.loss import ParallelLoss
from colrow.apply.refusals import refuse_own_save
from colrow.apply.regions import Scope, find_regions
from colrow.apply.shadow import PartialParameters
from colrow.collectives import Communicator, communicator
from colrow.errors import PlanError
from colrow.layers import SharedEntry, VocabParallelEmbedding, column_parallel, row_parallel
from colrow.layers.linear import ColumnParallel, RowParallel
from colrow.plan import HandPlan, LocalAttribute, Plan
from colrow.randomness import RegionRandomness
from colrow.replicas import check_equal_weights
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
    layouts = check_plan(plan, model)  # all of it before anything is changed
    check_equal_weights(model, ranks)
    _Applier(model, ranks, plan).apply(logits == "gather")
    refuse_own_save(model)
    attach_state(model, ParallelState(mesh, ranks, plan, layouts))
    return model


class _Applier:
    def __init__(self, model: nn.Module, ranks: Communicator, plan: Plan) -> None:
        self.model, self.ranks, self.plan = model, ranks, plan
        self.region = RegionRandomness(ranks)

    def apply(self, gather_logits: bool) -> None:
        plan = self.plan
        shared = {
            entry: SharedEntry(self.ranks, f"enter {', '.join(entry.modules)}", len(entry.modules))
            for entry in plan.entries
            # a layer that enters alone overlaps the reduction with its own weight gradient
            if len(entry.modules) > 1
        }
        for entry in plan.entries:
            for path in entry.modules:
                column_parallel(
                    self.model.get_submodule(path),
                    self.ranks,
                    entry=shared.get(entry),
                    label=path,
                    **self._placed(path),
                )
        for exit in plan.exits:
            row_parallel(
                self.model.get_submodule(exit.module),
                self.ranks,
                label=exit.module,
                **self._placed(exit.module),
            )
        for lookup in plan.lookups:
            embedding = cast(nn.Embedding, self.model.get_submodule(lookup.module))
            VocabParallelEmbedding.from_module(
                embedding, self.ranks, label=lookup.module, **self._placed(lookup.module)
            )
        for region in find_regions(plan, self.model):
            for path in region.columns:
                cast(ColumnParallel, self.model.get_submodule(path)).begin_region(self.region, region.name)
            for path in region.exits:
                cast(RowParallel, self.model.get_submodule(path)).end_region(self.region, region.name)
            scope = Scope(region.name, self.region, shared.get(region.entry))
            scope.attach(self.model.get_submodule(region.scope))
        self._partial_parameters()
        for attribute in plan.attributes:
            self._localise(attribute)
        if plan.loss is not None:
            cut = plan.axes[plan.loss.axis].cut
            ParallelLoss(plan.loss, self.ranks, cut, gather_logits).attach(self.model)

    def _placed(self, path: str) -> dict[str, Any]:
        sharding = self.plan.parameters[f"{path}.weight"]
        return {"layout": sharding.layout, "cut": self.plan.axes[sharding.axis].cut}

    def _partial_parameters(self) -> None:
        by_module: dict[str, list[str]] = {}
        for partial in self.plan.partial_parameters:
            path, _, name = partial.name.rpartition(".")
            by_module.setdefault(path, []).append(name)
        for path, names in by_module.items():
            PartialParameters(self.ranks, path, tuple(names)).attach(self.model.get_submodule(path))

    def _localise(self, attribute: LocalAttribute) -> None:
        module = self.model.get_submodule(attribute.module)
        *path, last = attribute.attribute.split(".")
        holder: object = module
        for name in path:
            duplicate = copy.copy(getattr(holder, name))
            setattr(holder, name, duplicate)
            holder = duplicate
        setattr(holder, last, attribute.values[self.ranks.rank])

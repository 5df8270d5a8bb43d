"""Dividing a model's experts over the ranks of ``ep``, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.collectives import communicator
from colrow.errors import PlanError
from colrow.layout import Cut, TensorLayout
from colrow.mesh import size_of
from colrow.modules import names_by_parameter
from colrow.parallel.experts.dispatch import Dispatch
from colrow.parallel.experts.find import Experts, find_experts
from colrow.plan import Plan
from colrow.replicas import check_equal_weights
from colrow.state import ExpertGroup
from colrow.trace import Example


def find_for(
    model: nn.Module, mesh: DeviceMesh, examples: Mapping[str, Example] | None
) -> tuple[Experts, ...]:
    """The experts of ``model`` that the ranks of a mesh divide; none if it has no ``ep``.

    Raises:
        ValueError: if there is no example to find them by.
        PlanError: if they cannot be divided; see :func:`find_experts`.
    """
    ranks = size_of(mesh, "ep")
    if ranks == 1:
        return ()
    if examples is None:
        raise ValueError(
            "experts are found by how the model computes: besides a plan give an example of a call, check=..."
        )
    found = find_experts(model, examples)
    for one in found:
        if one.count < ranks:
            raise PlanError(
                one.path, f"it has {one.count} experts for {ranks} ranks of ep", "Make ep smaller."
            )
    return found


def axes_over_experts(plan: Plan, experts: Sequence[Experts]) -> set[str]:
    """The axes of a plan that cut experts over ``tp``: they are divided over ``ep`` already."""
    paths = {one.path for one in experts}
    return {
        sharding.axis
        for name, sharding in plan.parameters.items()
        if sharding.dimension == 0 and name.rpartition(".")[0] in paths
    }


def prepare(model: nn.Module, mesh: DeviceMesh, experts: Sequence[Experts]) -> None:
    """Give the modules their forwards, before tensor parallelism puts its own around them.

    Raises:
        PlanError: if the ranks' weights differ.
    """
    if not experts:
        return
    ranks = communicator(mesh["ep"])
    check_equal_weights(model, ranks)
    for one in experts:
        cut = Cut.balanced(one.count, ranks.size)
        Dispatch(model.get_submodule(one.path), one, cut, ranks).attach()


def give_experts(
    model: nn.Module, mesh: DeviceMesh, experts: Sequence[Experts], layouts: dict[str, TensorLayout]
) -> ExpertGroup | None:
    """Leave each rank its own experts, in place.

    Args:
        model: cut over ``tp``, with the forwards of :func:`prepare`.
        mesh: with ``ep`` if there are experts.
        experts: in its modules.
        layouts: of all parameters by name; those of experts are changed.
    """
    if not experts:
        return None
    ranks = communicator(mesh["ep"])
    names = names_by_parameter(model)
    before: dict[str, dict[str, int]] = {}
    for one in experts:
        module = model.get_submodule(one.path)
        cut = Cut.balanced(one.count, ranks.size)
        low, high = cut.start(ranks.rank), cut.stop(ranks.rank)
        for parameter in module.parameters():
            known = names[id(parameter)]
            if not layouts[known[0]].window:
                parameter.data = parameter.data[low:high].clone()
                parameter.grad = None
                layouts.update({name: replace(layouts[name], window={0: (low, high)}) for name in known})
        before[one.path] = {name: getattr(module, name) for name in one.attributes}
        for name in one.attributes:
            setattr(module, name, high - low)
    return ExpertGroup(ranks, before)


def take_experts_back(model: nn.Module, group: ExpertGroup) -> None:
    """The numbers of experts that modules had; their forwards go with those of tensor parallelism."""
    for path, attributes in group.attributes.items():
        vars(model.get_submodule(path)).update(attributes)

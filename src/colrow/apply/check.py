"""Everything about a plan that can be checked without changing the model."""

from __future__ import annotations

from torch import nn

from colrow.errors import PlanError
from colrow.layout import TensorLayout
from colrow.modules import embedding_fault, is_linear, names_by_parameter
from colrow.plan import LocalAttribute, ModuleOutput, Plan

_NEW = "Make a new plan for it."


def check_plan(plan: Plan, model: nn.Module) -> dict[str, TensorLayout]:
    """The layout of every parameter, by all its names.

    Raises:
        PlanError: if the plan does not fit the model, or would compute something else than the model does.
    """
    if not plan.by_hand:
        plan.check_model(model)  # lists all that differs
    modules = dict(model.named_modules())
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters(remove_duplicate=False)}
    for name, sharding in plan.parameters.items():
        if name not in shapes:
            raise PlanError(name, "the model has no such parameter", _NEW)
        if sharding.axis not in plan.axes:
            raise PlanError(name, f"the plan has no axis {sharding.axis!r}", "Correct the plan.")
    _check_cuts(plan)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in plan.buffers:
            shapes[name] = tuple(buffer.shape)
    try:
        layouts = {name: plan.tensor_layout(name, shape) for name, shape in shapes.items()}
    except ValueError as error:
        plan.check_model(model)  # which lists all that differs
        raise PlanError("", f"the plan is of another model: {error}", "Make a new one.") from error
    if plan.by_hand:
        _check_users(plan, model, modules)
        for path in [path for entry in plan.entries for path in entry.modules] + [
            exit.module for exit in plan.exits
        ]:
            _module(path, modules)
            if not is_linear(modules[path]):
                kind = type(modules[path]).__name__
                raise PlanError(path, f"{kind} is not a plain linear layer", "Leave it out of the plan.")
    for lookup in plan.lookups:
        fault = embedding_fault(_module(lookup.module, modules))
        if fault and isinstance(lookup.place, ModuleOutput):
            raise PlanError(lookup.module, fault, "Leave it out of the plan.")
    for partial in plan.partial_parameters:
        layout = layouts.get(partial.name)
        if layout is None or (layout.is_sharded and not layout.is_shared):
            raise PlanError(partial.name, "it is not a replicated or shared parameter of the model", _NEW)
    _check_numbers(plan)
    for attribute in plan.attributes:
        _check_attribute(attribute, plan, modules)
    if plan.loss is not None:
        for path in (plan.loss.module, plan.loss.logits):
            _module(path, modules)
        if plan.loss.axis not in plan.axes:
            raise PlanError(plan.loss.logits, f"the plan has no axis {plan.loss.axis!r}", "Correct the plan.")
    return layouts


def _check_cuts(plan: Plan) -> None:
    """Every axis is dealt out to all ranks, and all of it."""
    for axis in plan.axes.values():
        counts = list(axis.cut.counts)
        if len(counts) != plan.ranks:
            raise PlanError(
                axis.name,
                f"its cut {counts} is for {len(counts)} ranks, and the plan for {plan.ranks}",
                f"Give it {plan.ranks} numbers.",
            )
        for name, sharding in (*plan.parameters.items(), *plan.buffers.items()):
            if sharding.axis == axis.name and sharding.layout.units != axis.cut.units:
                raise PlanError(
                    axis.name,
                    f"its cut {counts} adds up to {axis.cut.units} units, and dimension {sharding.dimension} "
                    f"of {name} has {sharding.layout.units} of them",
                    f"Deal out all {sharding.layout.units} units, and no more.",
                )


def _check_numbers(plan: Plan) -> None:
    """Numbers that were worked out for another cut would be wrong, some of them without an error."""
    for axis in plan.axes.values():
        if axis.fitted and axis.fitted != axis.cut.counts:
            raise PlanError(
                axis.name,
                f"this axis is cut {list(axis.cut.counts)}, but the plan's attributes and integers were "
                f"worked out for {list(axis.fitted)}",
                "Derive the plan with share= in place of an edited cut, or edit these numbers too, and what "
                "the axis is fitted to.",
            )
    for integer in plan.integers:
        if not len(integer.given) == len(integer.values) == plan.ranks:
            raise PlanError(
                integer.place.module,
                f"{integer.place} has {len(integer.values)} numbers for {plan.ranks} ranks",
                "Correct the plan.",
            )


def _module(path: str, modules: dict[str, nn.Module]) -> nn.Module:
    if path not in modules:
        raise PlanError(path, "the model has no such module", _NEW)
    return modules[path]


def _check_users(plan: Plan, model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """A parameter that is cut is cut for every module that reads it: each must be one that knows."""
    knowing = {path for entry in plan.entries for path in entry.modules}
    knowing |= {exit.module for exit in plan.exits} | {lookup.module for lookup in plan.lookups}
    knowing |= set(plan.holders)
    for names in names_by_parameter(model).values():
        cut = [name for name in names if name in plan.parameters]
        for name in names if cut else []:
            path = name.rpartition(".")[0]
            if name not in plan.parameters or path not in knowing:
                others = [other for other in names if other != name]
                tied = f" (tied to {', '.join(others)})" if others else ""
                raise PlanError(
                    name,
                    f"it is cut{tied}, but {path or 'the model'} would read it as if it were whole",
                    "Give that module a style, or leave all its users out of the plan; a module that only "
                    "holds the parameter and does not read it belongs into the plan's holders.",
                )


def _check_attribute(attribute: LocalAttribute, plan: Plan, modules: dict[str, nn.Module]) -> None:
    value: object = _module(attribute.module, modules)
    path = attribute.attribute.split(".")
    if attribute.module == "" and path[0] == "config":
        raise PlanError(
            attribute.attribute,
            "the model's own configuration is what gets saved: it must stay global",
            "Name the module that reads the number.",
        )
    for name in path:
        if not hasattr(value, name):
            raise PlanError(attribute.module, f"it has no attribute {attribute.attribute}", _NEW)
        value = getattr(value, name)
    if not isinstance(value, int) or len(attribute.values) != plan.ranks:
        raise PlanError(
            attribute.module,
            f"{attribute.attribute} = {value!r} cannot become one of {list(attribute.values)}",
            _NEW,
        )

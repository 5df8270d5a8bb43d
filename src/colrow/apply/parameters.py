"""A plan's parameters and buffers: cutting them, and what happens where replicated ones are read."""

from __future__ import annotations

from collections import defaultdict
from typing import cast

from torch import Tensor, nn

from colrow.apply.shadow import Holders, Shadow
from colrow.apply.shared import SharedPart
from colrow.apply.swapped import Swapped
from colrow.apply.together import EnterTogether
from colrow.apply.values import Change
from colrow.collectives import Communicator, FirstRankOnly
from colrow.plan import Plan


def shard(model: nn.Module, ranks: Communicator, plan: Plan) -> None:
    """Cut in place what no layer has cut: the model's own code reads it as it is."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for name in plan.parameters:
        parameter = named[name]
        layout = plan.tensor_layout(name, plan.shapes[name])
        if tuple(parameter.shape) == layout.shape != layout.local_shape(ranks.rank):
            parameter.data = layout.slice(parameter.data, ranks.rank)
            parameter.grad = None
    for name in plan.buffers:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        buffer = cast(Tensor, getattr(module, leaf))
        layout = plan.tensor_layout(name, tuple(buffer.shape))
        setattr(module, leaf, layout.slice(buffer, ranks.rank))


def change_readers(model: nn.Module, ranks: Communicator, plan: Plan) -> None:
    """Let modules read parameters whose gradients are summed, and those that one rank adds, as such."""
    found: dict[str, list[tuple[Holders, Change]]] = defaultdict(list)
    holders = {one.name: _holders(model, one.name) for one in plan.partial_parameters}
    whole = {holders[name][0]: None for name in holders if name not in plan.parameters}
    together = EnterTogether(ranks, model, whole) if whole else None
    for partial in plan.partial_parameters:
        sharding = plan.parameters.get(partial.name)
        change: Change
        if sharding is not None:
            cut = plan.axes[sharding.axis].cut
            label = f"parameter {partial.name}"
            change = SharedPart(ranks, label, sharding.dimension, sharding.layout, cut)
        else:
            assert together is not None
            change = together.change(partial.name)
        found[partial.reader].append((holders[partial.name], change))
    for once in plan.once_parameters:
        change = FirstRankOnly(ranks, f"parameter {once.name}", "I")
        found[once.reader].append((_holders(model, once.name), change))
    if not found:
        return
    read = [place for changes in found.values() for places, _ in changes for place in places]
    swapped = Swapped(list(dict.fromkeys(read)))
    swapped.attach(model)
    for reader, parameters in found.items():
        Shadow(parameters, swapped).attach(model.get_submodule(reader))


def _holders(model: nn.Module, name: str) -> Holders:
    """The modules that hold a parameter, which may be tied, with its name in each."""
    path, _, leaf = name.rpartition(".")
    parameter = model.get_submodule(path)._parameters[leaf]
    return tuple(
        (module, leaf)
        for module in model.modules()
        for leaf, own in module._parameters.items()
        if own is parameter
    )

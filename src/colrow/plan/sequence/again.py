"""Which linear layers keep this rank's part of what they read, and gather the whole again in backward passes.

Of a region's input autograd would keep the whole, on every rank, for the gradients of the weights that it is
multiplied with. In the backward pass the whole can be had once more, while the input's gradient is computed
(Korthikanti et al. 2022, section 4.2.2).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from colrow.plan.gradients import Summation
from colrow.plan.layer_inputs import layer_inputs
from colrow.plan.selection import Selection
from colrow.plan.sequence.cut import Crossing
from colrow.plan.sites import Sites


def keeping_parts(
    model: nn.Module, selection: Selection, crossings: Iterable[Crossing], logits: str | None
) -> dict[int, tuple[str, ...]]:
    """Paths of the layers that read a gathered value and keep the part, by the value's index.

    Only where such layers are all that reads the value, in every call of them and of the places where it is
    gathered.

    Args:
        selection: the axes whose regions the values enter.
        crossings: of a sequence.
        logits: path of the layer whose loss keeps nothing for the backward pass.
    """
    sites = Sites(selection)
    left = [one for one in crossings if one.way == "partial"]
    while True:
        found = layer_inputs(
            model, selection, sites, [Summation(one.value, one.operations, True) for one in left]
        )
        paths = {
            index: tuple(dict.fromkeys(where.module.path for where in layers))
            for index, layers in found.items()
        }
        at: dict[tuple[object, ...], set[tuple[str, ...]]] = defaultdict(set)
        for one in left:
            for where in one.places:
                at[where.key].add(paths.get(one.value.index, ()))
        # a place has the same layers behind it in all of its passings
        alike = [
            one
            for one in left
            if (mine := paths.get(one.value.index))
            and logits not in mine
            and all(_is_plain(model, selection, path) for path in mine)
            and all(at[where.key] == {mine} for where in one.places)
        ]
        if len(alike) == len(left):
            return paths
        left = alike


def _is_plain(model: nn.Module, selection: Selection, path: str) -> bool:
    """Whether the layer reads its parameters as they are: no gradient of a shared part is summed there."""
    module = model.get_submodule(path)
    mine = {id(one) for one in module.parameters()}
    for value in selection.trace.values:
        if value.source.kind == "parameter" and id(model.get_parameter(value.source.name)) in mine:
            chosen = selection.chosen_of(value)
            if chosen is not None and selection.sharding(value).layout.is_shared(chosen.cut):
                return False
    return not module._forward_pre_hooks

"""Entries at the linear layers that read a value, where all that reads it are such layers.

There the reduction of the value's gradient belongs to the layers' own backward, which begins it before it
computes the gradients of the weights, and adds up what comes from several layers in one piece of memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from colrow.modules import features_dimension, is_linear
from colrow.plan.gradients import Summation
from colrow.plan.selection import CannotPlaceError, Selection
from colrow.plan.sites import Sites, Where
from colrow.trace.records import ModuleCall, Value


def layer_inputs(
    model: nn.Module, selection: Selection, sites: Sites, summations: Sequence[Summation]
) -> dict[int, list[Where]]:
    """By the index of a summed value, the inputs of the linear layers that read it.

    Only values that nothing else reads, in one call of one module: the gradients of all readers are kept
    until the last of them is known, which must not be layers later. And only layers that are given nothing
    but such values: what is done at a layer's input is done in every call of it.
    """
    finder = _Finder(model, selection)
    found = {
        one.value.index: layers
        for one in summations
        if one.value.source.kind != "parameter" and (layers := finder.readers(one))
    }
    while True:
        acting: dict[tuple[object, ...], set[int]] = defaultdict(set)
        for layers in found.values():
            for where in layers:
                acting[where.key].add(where.module.index)
        incomplete = {
            index
            for index, layers in found.items()
            if any({call.index for call in sites.like(where)} != acting[where.key] for where in layers)
        }
        if not incomplete:
            return found
        found = {index: layers for index, layers in found.items() if index not in incomplete}


class _Finder:
    def __init__(self, model: nn.Module, selection: Selection) -> None:
        self._model, self._selection = model, selection
        self._weights: dict[int, Value] = {
            id(model.get_parameter(value.source.name)): value
            for value in selection.trace.values
            if value.source.kind == "parameter"
        }
        self._columns: dict[str, bool] = {}

    def readers(self, summation: Summation) -> list[Where]:
        """The inputs of the layers that read the value; empty if anything else reads it."""
        calls: dict[int, ModuleCall] = {}
        for operation in summation.operations:
            call = operation.module
            if call is None or not self._is_column(call.path):
                return []
            calls[call.index] = call
        if len({id(call.parent) for call in calls.values()}) > 1:
            return []
        places = []
        for call in calls.values():
            paths = [path for path, value in call.inputs if value is summation.value]
            if len(paths) != 1 or len(paths[0]) != 1:
                return []
            places.append(Where(call, paths[0], False))
        return places

    def _is_column(self, path: str) -> bool:
        """Whether it is a linear layer whose output features are cut."""
        if path not in self._columns:
            module = self._model.get_submodule(path)
            self._columns[path] = is_linear(module) and self._has_cut_features(module)
        return self._columns[path]

    def _has_cut_features(self, module: nn.Module) -> bool:
        weight = self._weights.get(id(module._parameters["weight"]))
        if weight is None or not self._selection.is_cut(weight):
            return False
        try:
            return self._selection.sharding(weight).dimension == features_dimension(module)
        except CannotPlaceError:
            return False

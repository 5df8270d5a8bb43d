"""Units: the modules that a stage of a pipeline has or has not."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def units_of(model: nn.Module) -> dict[str, nn.Module]:
    """The units of a model by path: outermost layers of lists of layers, and what stands beside them.

    A module that holds a list of layers, such as a decoder, is taken apart; one of several alike modules in a
    list, a layer, is not, whatever lists it holds. Of the rest every outermost module with parameters is a
    unit: embeddings, a last norm, a head; and dropout, whose random numbers only one stage may draw. A module
    that stands in several places has the first place's path.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for module in _units_in(model):
        found.setdefault(paths[id(module)], module)
    return found


def _units_in(module: nn.Module) -> Iterator[nn.Module]:
    children = list(module.children())
    for child in children:
        if not _has_parameters(child):
            if isinstance(child, _DropoutNd) and child.p > 0:
                yield child
            continue
        is_layer = isinstance(module, _LISTS) and any(
            other is not child and type(other) is type(child) and _has_parameters(other) for other in children
        )
        if _is_container(child) or (not is_layer and _holds_list(child)):
            yield from _units_in(child)
        else:
            yield child


def _is_container(module: nn.Module) -> bool:
    """Whether a module is never called itself."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def _holds_list(module: nn.Module) -> bool:
    """Whether a module is, or holds somewhere, a list of several modules with parameters."""
    return any(
        isinstance(one, _LISTS) and sum(_has_parameters(child) for child in one.children()) > 1
        for one in module.modules()
    )


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None

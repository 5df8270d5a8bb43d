"""Regions in a graph that torch.compile is tracing.

A compiled graph cannot switch between streams of random numbers as
:class:`colrow.randomness.RegionRandomness` does. It need not where nothing is drawn, and whether something is
drawn can be read from the graph. So a region is traced as if nothing were; if something was, the graph breaks
around the module that holds the region, and the streams are switched between smaller graphs.

All of this runs while torch.compile traces and leaves nothing in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.fx import GraphModule, Node

from colrow.tracer import notes, sees_module_call, traced_output, while_tracing

_PROBABILITIES = ("p", "dropout_p", "dropout")
_SWITCHES = ("train", "training")


class TracedRegions:
    """The regions of one model, in the graph that is being traced."""

    def _scopes(self) -> set[str]:
        """Regions whose modules began in this graph."""
        found: set[str] = notes("scopes").setdefault(id(self), set())
        return found

    def _open(self) -> dict[str, Node | None]:
        """The last node before each region that is open."""
        found: dict[str, Node | None] = notes("regions").setdefault(id(self), {})
        return found

    @while_tracing
    def begin_scope(self, region: str) -> None:
        """The forward of the module that holds ``region`` begins, in training, as its hook tells."""
        if sees_module_call():
            self._scopes().add(region)

    @while_tracing
    def has_scope(self, region: str) -> bool:
        """Whether the module that holds ``region`` began in this graph, so that all of it will be seen."""
        return region in self._scopes()

    @while_tracing
    def enter(self, region: str) -> None:
        """Begin ``region``."""
        self._open().setdefault(region, next(iter(reversed(traced_output().graph.nodes)), None))

    @while_tracing
    def leave(self, region: str) -> str:
        """End ``region``: the name of an operator that drew random numbers in it, empty if none did."""
        begun, output = self._open(), traced_output()
        if region not in begun:
            return ""
        last_before = begun.pop(region)
        inside = []
        for node in reversed(output.graph.nodes):
            if node is last_before:
                break
            inside.append(node)
        return _drawing(inside, output.nn_modules)


def _drawing(nodes: Iterable[Node], modules: Mapping[str, object]) -> str:
    """Name of an operator among ``nodes`` that draws random numbers; empty if none does."""
    for node in nodes:
        if node.op == "get_attr":  # the body of a higher-order operator, such as activation checkpointing
            body = modules.get(str(node.target))
            if isinstance(body, GraphModule):
                found = _drawing(body.graph.nodes, dict(body.named_modules()))
                if found:
                    return found
        elif node.op in ("call_function", "call_method") and _draws(node):
            return _name(node)
    return ""


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _draws(node: Node) -> bool:
    """Whether an operator draws random numbers: torch marks those that do, by the names they have in aten."""
    if isinstance(node.target, torch._ops.OpOverload):
        overloads = [node.target]
    else:
        packet = getattr(torch.ops.aten, _name(node), None)
        overloads = [] if packet is None else [getattr(packet, name) for name in packet.overloads()]
    random = [one for one in overloads if torch.Tag.nondeterministic_seeded in one.tags]
    if not random:
        return False
    for position, argument in enumerate(random[0]._schema.arguments):
        names = next((names for names in (_PROBABILITIES, _SWITCHES) if argument.name in names), ())
        default = argument.default_value if argument.has_default_value() else None
        value = node.args[position] if position < len(node.args) else default
        value = next((node.kwargs[name] for name in names if name in node.kwargs), value)
        if names == _PROBABILITIES and value == 0:
            return False
        if names == _SWITCHES and value is False:
            return False
    return True

"""The registry of all built-in rules."""

from __future__ import annotations

from colrow.axes.registry import Registry, rules_of
from colrow.axes.rules import (
    attention,
    contraction,
    convolution,
    creation,
    indexing,
    linear_algebra,
    loss,
    mixing,
    normalization,
    pointwise,
    spatial,
    structural,
)


def default_registry() -> Registry:
    """The built-in rules. :meth:`Registry.extended` adds one's own."""
    families = (
        structural,
        creation,
        pointwise,
        contraction,
        convolution,
        attention,
        indexing,
        mixing,
        normalization,
        spatial,
        linear_algebra,
        loss,
    )
    return Registry([rule for family in families for rule in rules_of(family)], pointwise.pointwise)

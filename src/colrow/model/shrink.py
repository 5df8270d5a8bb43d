"""Small versions of configurations: the same kinds of layers, a few of each, with a few features."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colrow.model import sizes
from colrow.model.classes import model_classes
from colrow.model.gradually import shrink_gradually
from colrow.model.inputs import MOST_RUNS, Recipe
from colrow.model.layers import LayerChoice, keep_few_layers
from colrow.model.tree import Tree
from colrow.model.trying import Attempt, try_out
from colrow.model.widths import WidthChoice, fit_rotation, narrow

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MOST_CLASSES = 3
"""So many of transformers' classes for a configuration are tried."""
FEWER_RUNS = 12
"""So many calls are tried after a first version could not be called in any way."""


@dataclass(frozen=True)
class Small:
    """A small configuration.

    Attributes:
        config: whose model has at least two layers and, most often, some ten thousand parameters.
        model_class: what it was tried with.
        recipe: a way to call the model; ``None`` if it can be built, but none was found.
        parameters: of the model.
        how: which choices led to it, for people.
        error: why no recipe was found.
    """

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    recipe: Recipe | None
    parameters: int
    how: str
    error: str = ""


@dataclass(frozen=True)
class _Choice:
    widths: WidthChoice
    layers: LayerChoice
    filled: bool


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A small version of any configuration of transformers: seconds to build, run and verify.

    Two layers, or as many as there are kinds of them; six heads, two of them for keys and values where there
    were fewer of those; odd feed-forward sizes; a short vocabulary; images of a few patches; few experts. It
    is found by trial: what does not run is made less small.

    Raises:
        ValueError: if no small version can be built; says what the last trial failed with.
    """
    return find_small(config).config


def find_small(config: PreTrainedConfig) -> Small:
    """:func:`shrink`, with what was found out about the model.

    Raises:
        ValueError: as there.
    """
    built: Small | None = None
    errors: list[str] = []
    for model_class in model_classes(config)[:MOST_CLASSES]:
        found = _at_once(config, model_class, errors) or _gradually(config, model_class, errors)
        if found is not None and found.recipe is not None:
            return found
        built = built or found
    if built is None:
        raise ValueError(
            f"{type(config).__name__} cannot be made small: "
            + (errors[0] if errors else "no model can be built")
        )
    return built


def _choices() -> Iterator[_Choice]:
    """The likeliest to succeed first."""
    widths: tuple[WidthChoice, ...] = ("standard", "proportional", "whole heads")
    layers: tuple[LayerChoice, ...] = ("kinds", "first")
    for width, filled, layer in itertools.product(widths, (False, True), layers):
        yield _Choice(width, layer, filled)


def _apply(config: PreTrainedConfig, choice: _Choice) -> PreTrainedConfig:
    tree = Tree(config)
    if choice.filled:
        sizes.fill_missing(tree)
        tree = Tree(tree.build())
    for node in tree.nodes:
        keep_few_layers(node, choice.layers)
    narrow(tree, choice.widths)
    for node in tree.nodes if choice.filled else ():
        fit_rotation(node, fill=True)
    for change in (sizes.shorten_vocabulary, sizes.shrink_images, sizes.limit_positions):
        change(tree)
    sizes.limit_experts(tree)
    sizes.limit_queries(tree)
    return tree.build()


def _at_once(config: PreTrainedConfig, model_class: type[PreTrainedModel], errors: list[str]) -> Small | None:
    seen = []
    for choice in _choices():
        try:
            small = _apply(config, choice)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}".replace("\n", " ")[:300])
            continue
        if small.to_dict() in seen:
            continue
        seen.append(small.to_dict())
        attempt = try_out(model_class, small, most=FEWER_RUNS if errors else MOST_RUNS)
        if attempt.recipe is not None:
            return _small(small, model_class, attempt, str(choice))
        errors.append(attempt.error)
        if attempt.error.startswith("ImportError"):
            return None
    return None


def _gradually(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], errors: list[str]
) -> Small | None:
    if errors and errors[-1].startswith("ImportError"):
        return None
    built: Small | None = None
    for omit in ("", "vocabulary", "images"):
        found = shrink_gradually(model_class, config, omit)
        if found is None:
            return None
        attempt = try_out(model_class, *found)
        small = _small(found[0], model_class, attempt, f"gradually, without {omit or 'nothing'}")
        if attempt.recipe is not None:
            return small
        built = built or small
    return built


def _small(config: PreTrainedConfig, model_class: type[PreTrainedModel], attempt: Attempt, how: str) -> Small:
    return Small(config, model_class, attempt.recipe, attempt.parameters, how, attempt.error)

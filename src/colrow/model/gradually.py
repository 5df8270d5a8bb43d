"""Shrinking one step after the other, each kept if the model still runs on the meta device.

Slower than making everything small at once, but it works for configurations whose fields depend on one
another in ways that their names do not tell: what cannot be made smaller stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from colrow.model import sizes, widths
from colrow.model.inputs import Recipe, find_recipe
from colrow.model.layers import LAYER_CHOICES, keep_few_layers
from colrow.model.tree import Tree, numbers
from colrow.model.trying import build, copy_of, runs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Change = Callable[[Tree], None]

DIVISORS = (64, 32, 16, 8, 4, 2)
MOST_TRIALS, MOST_STARTS = 80, 12
"""So many changes are tried, and so many calls of each model to begin with."""
LARGE = 96
"""Widths above this are still made smaller."""


def shrink_gradually(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, omit: str = ""
) -> tuple[PreTrainedConfig, Recipe] | None:
    """A smaller configuration and a way to call its model; ``None`` if even the whole one does not run.

    Args:
        omit: a step that is left out.
    """
    started = _start(model_class, config)
    if started is None:
        return None
    trials = _Trials(model_class, *started)
    for name, alternatives in _steps():
        if name != omit:
            trials.step(alternatives)
    for value in _large_widths(trials.config):
        trials.step([partial(_divide_value, value, one) for one in DIVISORS])
    return trials.config, trials.recipe


def _start(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> tuple[PreTrainedConfig, Recipe] | None:
    """With few layers if possible, and with values for what is left open if necessary."""
    few = _few_layers("kinds")
    changes: tuple[list[Change], ...] = (
        [few],
        [few, sizes.limit_queries],
        [],
        [sizes.limit_queries, sizes.fill_missing],
    )
    for some in changes:
        try:
            changed = changed_config(config, some)
            model = build(model_class, copy_of(changed), "meta")
        except Exception:
            continue
        recipe, _ = find_recipe(model, MOST_STARTS)
        if recipe is not None:
            return changed, recipe
    return None


class _Trials:
    """A configuration that becomes smaller as long as its model runs."""

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig, recipe: Recipe) -> None:
        self.model_class, self.config, self.recipe = model_class, config, recipe
        self.left = MOST_TRIALS

    def step(self, alternatives: list[Change]) -> None:
        """Make the first alternative with which the model runs; else the first for each node by itself."""
        if any(self._passes(change, None) for change in alternatives):
            return
        nodes = len(Tree(self.config).nodes)
        for node in range(nodes) if nodes > 1 else ():
            any(self._passes(change, node) for change in alternatives)

    def _passes(self, change: Change, node: int | None) -> bool:
        """Whether the model runs with a change, which is then made."""
        try:
            changed = changed_config(self.config, [change], node)
            if self.left == 0 or changed.to_dict() == self.config.to_dict():
                return False
            self.left -= 1
            model = build(self.model_class, copy_of(changed), "meta")
        except Exception:
            return False
        if not runs(model, self.recipe):
            return False
        self.config = changed
        return True


def changed_config(
    config: PreTrainedConfig, changes: list[Change], node: int | None = None
) -> PreTrainedConfig:
    """A copy with changes, of one node of its tree or of all."""
    tree = Tree(config)
    if node is not None:
        tree.nodes = tree.nodes[node : node + 1]
    for change in changes:
        change(tree)
    return tree.build()


def _few_layers(choice: str) -> Change:
    def change(tree: Tree) -> None:
        for node in tree.nodes:
            keep_few_layers(node, choice)  # type: ignore[arg-type]

    return change


def _steps() -> Iterator[tuple[str, list[Change]]]:
    yield "layers", [_few_layers(choice) for choice in LAYER_CHOICES]
    yield "vocabulary", [sizes.shorten_vocabulary]
    yield "experts", [sizes.limit_experts]
    yield "queries", [sizes.limit_queries]
    yield "images", [sizes.shrink_images, partial(sizes.shrink_images, patches=8), sizes.halve_images]
    yield "positions", [sizes.limit_positions]
    yield (
        "widths",
        [partial(widths.divide, divisor=one, heads=heads) for one in DIVISORS for heads in (True, False)],
    )


def _large_widths(config: PreTrainedConfig) -> list[int]:
    found = {
        number
        for node in Tree(config).nodes
        for _, value in node.fields("width", "inner width", "head size")
        for number in numbers(value)
        if number > LARGE
    }
    return sorted(found, reverse=True)


def _divide_value(value: int, divisor: int, tree: Tree) -> None:
    """Divide the widths of this value, wherever they occur."""
    tree.change(
        lambda old: old // divisor if old == value and old // divisor >= 8 else old,
        "width",
        "inner width",
        "head size",
    )

"""Fewer layers: those that stand for all kinds, with every list that goes along with the layers."""

from __future__ import annotations

import json
from functools import partial
from typing import Any, Literal

from colrow.model.tree import Node, map_numbers

LayerChoice = Literal["kinds", "first", "two", "all"]
LAYER_CHOICES: tuple[LayerChoice, ...] = ("kinds", "first", "two")
MOST = 8
"""So many layers are kept at most."""
LEAST_DEPTH = 0.25
"""Of networks whose depth is a multiple of a standard one."""


def keep_few_layers(node: Node, choice: LayerChoice) -> None:
    """Reduce the numbers of layers of one configuration.

    ``kinds``: one layer of each kind, at least two. ``first``: the first ones until all kinds have occurred.
    ``two``: the first two. Lists with an entry for each layer, lists of numbers of layers and dictionaries by
    the number of a layer follow.
    """
    if choice == "all":
        return
    total = node.number("num_hidden_layers")
    kept: list[int] | None = None
    if total is not None and total > 2:
        outputs = _outputs(node, total)
        if outputs:
            _space_outputs(node, total, outputs)
            return
        kept = _kept(node, total, choice)
    for name, value in node.fields("layers"):
        if kept is not None and value == total:
            node.data[name] = len(kept)
        elif not _numbers_layers(name, value, total):
            most = 1 if "first" in name or "dense" in name else 2
            node.data[name] = map_numbers(value, partial(min, most))
    for name in ("depth_coefficient", "depth_mult", "depth_multiplier"):
        if isinstance(node.data.get(name), float):
            node.data[name] = min(node.data[name], LEAST_DEPTH)
    if total is None or kept is None:
        return
    for name, value in list(node.data.items()):
        if isinstance(value, list | tuple) and len(value) == total:
            node.data[name] = [value[layer] for layer in kept]
        elif _numbers_layers(name, value, total):
            node.data[name] = [place for place, layer in enumerate(kept) if layer in value]
    by_layer = node.data.get("per_layer_config")
    if isinstance(by_layer, dict):
        numbered = {int(layer): changes for layer, changes in by_layer.items()}
        node.data["per_layer_config"] = {
            place: numbered[layer] for place, layer in enumerate(kept) if layer in numbered
        }


def _kept(node: Node, total: int, choice: LayerChoice) -> list[int]:
    if choice == "two":
        return [0, 1]
    kinds = _kinds(node, total)
    first: dict[str, int] = {}
    for layer, kind in enumerate(kinds):
        first.setdefault(kind, layer)
    derived = _last_of_derived_kinds(node, total)
    if choice == "first" or derived:
        return list(range(min(max(2, derived, max(first.values()) + 1), max(MOST, derived))))
    kept = sorted(first.values())[:MOST]
    return kept if len(kept) > 1 else [kept[0], next(n for n in range(total) if n not in kept)]


def _kinds(node: Node, total: int) -> list[str]:
    """What is told of each layer, as text."""
    told: list[list[Any]] = [[] for _ in range(total)]
    for name, value in node.data.items():
        if isinstance(value, list | tuple) and len(value) == total:
            if all(isinstance(one, str | bool) or one in (0, 1, None) for one in value):
                for layer, one in enumerate(value):
                    told[layer].append(one)
        elif _numbers_layers(name, value, total):
            for layer in range(total):
                told[layer].append(layer in value)
    by_layer = node.data.get("per_layer_config")
    if isinstance(by_layer, dict):
        for layer, changes in by_layer.items():
            if int(layer) < total:
                told[int(layer)].append(changes)
    dense = node.data.get("first_k_dense_replace")
    if isinstance(dense, int):
        for layer in range(total):
            told[layer].append(layer < dense)
    return [json.dumps(one, default=str) for one in told]


def _last_of_derived_kinds(node: Node, total: int) -> int:
    """How many layers there must be until each kind has occurred, by what the configuration computes."""
    needed = 0
    for name, one in vars(type(node.config)).items():
        if not isinstance(one, property):
            continue
        try:
            value = getattr(node.config, name)
        except Exception:
            continue
        if isinstance(value, list) and len(value) == total and all(isinstance(kind, str) for kind in value):
            needed = max(needed, max(value.index(kind) for kind in set(value)) + 1)
    return needed


def _numbers_layers(name: str, value: Any, total: int | None) -> bool:
    """Whether a field is a list of numbers of layers."""
    words = ("layer", "block", "idx", "ind")
    return (
        isinstance(value, list | tuple)
        and total is not None
        and 0 < len(value) < total
        and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
        and len(set(value)) == len(value)
        and min(value) >= 0
        and max(value) < total
        and any(word in name for word in words)
    )


def _outputs(node: Node, total: int) -> dict[str, list[int]]:
    """Lists of the layers whose results are read, whose number matters; counted from 0 or 1."""
    words = (
        "out_ind",
        "feature_layer",
        "hook",
        "extract",
        "spatial_target",
        "intermediate",
        "deepstack",
        "out_layer",
    )
    return {
        name: list(value)
        for name, value in node.data.items()
        if any(word in name for word in words)
        and isinstance(value, list | tuple)
        and value
        and all(isinstance(one, int) and 0 <= one <= total for one in value)
    }


def _space_outputs(node: Node, total: int, outputs: dict[str, list[int]]) -> None:
    """So many layers as are read, and one more."""
    count = max(2, *(len(value) for value in outputs.values()))
    for name, value in node.fields("layers"):
        if value == total:
            node.data[name] = count
    for name, value in outputs.items():
        from_one = max(value) == total
        places = range(count - len(value), count)
        order = dict(zip(sorted(value), places, strict=True))
        node.data[name] = [order[layer] + from_one for layer in value]
    for name in ("stage_names", "_out_features", "out_features"):
        node.data.pop(name, None)
    for name, value in list(node.data.items()):
        if isinstance(value, list) and len(value) == total:
            node.data[name] = value[:count]

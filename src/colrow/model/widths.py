"""Narrower models: fewer heads, fewer features, with what belongs together in proportion."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Literal

from colrow.model.tree import Node, Tree, numbers

WidthChoice = Literal["standard", "proportional", "whole heads"]

HEADS, KEY_VALUE_HEADS = 6, 2
WIDTH = 48
UNDIVIDED_WIDTH = 384
"""For models that tell nothing of their heads, which are often 64 features."""
OTHER_HEAD_SIZE = 10
"""Of heads that together are not as wide as the model."""
INNER_WIDTHS = (100, 36, 52, 68, 44, 76)
"""Not divisible by 3 or 8, but by 4: grouped products of experts want rows of whole 16 bytes."""


def narrow(tree: Tree, choice: WidthChoice) -> None:
    """Make widths and numbers of heads smaller.

    ``standard``: six heads, two of them for keys and values where there were fewer of those, and odd inner
    widths. ``proportional``: everything divided by the same powers of two, so that products and ratios stay.
    ``whole heads``: as standard, but a head keeps its features.
    """
    if choice == "proportional":
        divide(tree, _divisor(tree))
    else:
        widths: dict[int, int] = {}
        inner: dict[int, int] = {}
        for node in tree.nodes:
            _set_heads(node, widths, choice == "whole heads")
        for node in tree.nodes:
            _set_widths(node, widths, inner)
    _fit_results(tree)
    for node in tree.nodes:
        fit_rotation(node)


def _fit_results(tree: Tree) -> None:
    """What goes from one part of a model into the words of another is as wide as those."""
    text = next((node.data.get("hidden_size") for node in tree.nodes if "text" in node.key), None)
    for node in tree.nodes:
        if isinstance(text, int) and isinstance(node.data.get("out_hidden_size"), int):
            node.data["out_hidden_size"] = text


def _attention_width(node: Node) -> int | None:
    """The width that heads divide: ``hidden_size`` may be that of the results."""
    heads, inner = node.number("num_attention_heads") or node.number("num_heads"), node.number("embed_dim")
    return inner if inner and heads and inner % heads == 0 else node.number("hidden_size")


def _head_size(node: Node) -> int | None:
    size, width = node.number("head_dim"), _attention_width(node)
    heads = node.number("num_attention_heads") or node.number("num_heads")
    return width // heads if not size and width and heads else size


def _set_heads(node: Node, widths: dict[int, int], whole: bool) -> None:
    """Change numbers and sizes of heads; note in ``widths`` what follows for the model's width."""
    heads = node.number("num_attention_heads") or node.number("num_heads")
    groups, hidden, size = node.number("num_key_value_heads"), _attention_width(node), _head_size(node)
    if hidden is None:
        return
    if hidden <= WIDTH or not heads or not size:
        widths.setdefault(hidden, min(hidden, UNDIVIDED_WIDTH if whole else WIDTH))
        return
    few = min(heads, HEADS)
    few_groups = few if groups in (None, heads) else KEY_VALUE_HEADS if groups > 1 and few % 2 == 0 else 1
    # a mixer may work on twice the features
    times = heads * size // hidden if heads * size % hidden == 0 else 0
    if not node.number("head_dim"):
        times = 1
    small = size if whole else 2 * -(-WIDTH * times // few // 2) if times else OTHER_HEAD_SIZE
    ratio = small / size
    node.change(_heads_map({heads: few, groups or heads: few_groups}), "heads")
    node.change(lambda old: small if old == size else _scaled(old, ratio, 2), "head size")
    widths.setdefault(hidden, few * small // times if times else WIDTH)
    widths.setdefault(heads * size, few * small)
    results = node.number("hidden_size")
    if results is not None and results > WIDTH:
        widths.setdefault(results, WIDTH)


def _heads_map(known: dict[int, int]) -> Callable[[int], int]:
    return lambda old: known.get(old, min(old, 4))


def _set_widths(node: Node, widths: dict[int, int], inner: dict[int, int]) -> None:
    hidden = node.number("hidden_size")
    small = widths.get(hidden, WIDTH) if hidden else WIDTH
    ratio = small / hidden if hidden and hidden > WIDTH else 1 / 16

    def width(old: int) -> int:
        if old in widths or old <= 16:
            return widths.get(old, old)
        if hidden and old % hidden == 0:
            return small * (old // hidden)
        return min(old, _scaled(old, ratio, 4))

    def inner_width(old: int) -> int:
        if old <= 32:
            return old
        return inner.setdefault(old, INNER_WIDTHS[len(inner) % len(INNER_WIDTHS)])

    node.change(width, "width")
    node.change(inner_width, "inner width")


def _scaled(old: int, ratio: float, multiple: int) -> int:
    return max(multiple, round(old * ratio / multiple) * multiple)


def _divisor(tree: Tree) -> int:
    """A power of two that brings the largest width to 48 to 96."""
    largest = [size for node in tree.nodes if (size := node.number("hidden_size"))]
    if not largest:
        largest = [one for node in tree.nodes for _, value in node.fields("width") for one in numbers(value)]
    divisor = 1
    while max(largest, default=0) / divisor > 2 * WIDTH:
        divisor *= 2
    return divisor


def divide(tree: Tree, divisor: int, heads: bool = True) -> None:
    """Divide all widths: by numbers of heads, as far as they allow it and ``heads`` is set, and by sizes."""

    def width(old: int) -> int:
        return old if old < 8 else max(old // divisor, 4)

    for node in tree.nodes:
        by_number = min(_common_heads(node), divisor) if heads else 1
        by_size = divisor // by_number
        node.change(_quotient(by_number, 1), "heads")
        node.change(_quotient(by_size, 2), "head size")
        node.change(width, "width")
        node.change(lambda old: -(-width(old) // 4) * 4, "inner width")


def _quotient(divisor: int, least: int) -> Callable[[int], int]:
    return lambda old: max(old // divisor, min(old, least))


def _common_heads(node: Node) -> int:
    """The power of two by which all numbers of heads can be divided, so that two of each are left."""
    counts = [number for _, value in node.fields("heads") for number in numbers(value) if number > 1]
    power = 1
    while counts and gcd(*counts) % (2 * power) == 0 and min(counts) // (2 * power) >= 2:
        power *= 2
    return power


def fit_rotation(node: Node, fill: bool = False) -> None:
    """Sections of a rotary embedding of several coordinates add up to half of a head's features.

    ``fill``: give sections also where there are none, for models that have some by default.
    """
    size, width, heads = (node.data.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if not size and isinstance(width, int) and isinstance(heads, int):
        size = width // heads
    rotary = node.data.get("rope_parameters")
    if not isinstance(rotary, dict) or "rope_type" not in rotary or not isinstance(size, int):
        return
    sections = rotary.get("mrope_section", [1, 1, 1] if fill else None)
    if isinstance(sections, list):
        half = int(size * rotary.get("partial_rotary_factor", 1)) // 2
        fewer = [max(1, one * half // sum(sections)) for one in sections]
        rotary["mrope_section"] = [fewer[0] + half - sum(fewer), *fewer[1:]]

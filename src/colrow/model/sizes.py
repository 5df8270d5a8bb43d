"""Smaller numbers for what is no width: vocabularies, images, positions, experts."""

from __future__ import annotations

from collections.abc import Callable

from colrow.model.tree import Tree, map_numbers, numbers
from colrow.model.widths import fit_rotation

VOCABULARIES = (131, 127, 113, 109, 107, 103, 101, 97)
"""Primes, so that no number of ranks divides them."""
PATCHES = 4
"""So many patches an image has along each side."""
PIXELS = 64
"""Along each side of an image that has no patches."""
EXPERTS, CHOSEN_EXPERTS, EXPERT_GROUPS = 6, 2, 2
QUERIES = 10
POSITIONS = 128


def shorten_vocabulary(tree: Tree) -> None:
    """Fewer words and codes, alike ones alike, and numbers of special tokens among them."""
    sizes: dict[int, int] = {}

    def vocabulary(old: int) -> int:
        if old <= VOCABULARIES[0]:
            return old
        return sizes.setdefault(old, VOCABULARIES[len(sizes) % len(VOCABULARIES)])

    tree.change(vocabulary, "vocabulary")
    if not sizes:
        return
    least = min(sizes.values())
    present = {one for node in tree.nodes for _, value in node.fields("token") for one in numbers(value)}
    free = (number for number in range(least - 1, 0, -1) if number not in present)
    tokens: dict[int, int] = {}

    def token(old: int) -> int:
        if old >= least and old not in tokens:
            tokens[old] = next(free, least - 1)
        return tokens.get(old, old)

    tree.change(token, "token")


def shrink_images(tree: Tree, patches: int = PATCHES) -> None:
    """Images of so many patches along each side, with what follows from their number."""
    for node in tree.nodes:
        patch = next(numbers(node.data.get("patch_size")), None)
        new = patches * patch if patch else PIXELS
        for name, value in node.fields("image"):
            old = max(numbers(value), default=0)
            if old <= new:
                continue
            node.data[name] = map_numbers(value, _constant(new))
            if patch:
                number_of = ("num_patches", "num_position", "seq_length", "num_image_tokens")
                _replace(tree, (old // patch) ** 2, patches**2, number_of)
                _replace(tree, old // patch, patches, ("image_embedding_size", "feat_sizes", "grid"))
    for node in tree.nodes:
        for name in node.data:
            if "tokens_per_image" in name:
                node.data[name] = map_numbers(node.data[name], _at_most((patches // 2) ** 2))


def halve_images(tree: Tree) -> None:
    """Images with sides half as long."""
    tree.change(lambda old: old // 2, "image")


def limit_positions(tree: Tree) -> None:
    """Shorter tables of positions."""
    tree.change(lambda old: min(old, POSITIONS), "positions")


def limit_queries(tree: Tree) -> None:
    """Few objects that a detector looks for."""
    tree.change(lambda old: min(old, QUERIES), "queries")


def limit_experts(tree: Tree) -> None:
    """Few experts, of which two are chosen; one shared; groups of them accordingly."""
    for node in tree.nodes:
        for name, value in node.fields("experts", "expert groups"):
            most = EXPERTS if node.role(name) == "experts" else EXPERT_GROUPS
            if any(word in name for word in ("shared", "zero", "topk")):
                most = 1
            node.data[name] = map_numbers(value, _at_most(most))
    tree.change(_at_most(CHOSEN_EXPERTS), "chosen experts")


def fill_missing(tree: Tree) -> None:
    """Values for sizes that a configuration leaves open, where its model may need them."""
    for node in tree.nodes:
        heads, hidden = node.number("num_attention_heads"), node.number("hidden_size")
        for name, value in list(node.data.items()):
            if value is not None or name.startswith("_"):
                continue
            by_role = {
                "vocabulary": VOCABULARIES[0],
                "experts": EXPERTS,
                "chosen experts": CHOSEN_EXPERTS,
                "heads": heads,
                "head size": hidden // heads if hidden and heads else None,
                "inner width": hidden if "moe" in name else None,
            }
            by_name = {"prediction_length": 4, "pad_token_id": 0, "image_token_index": 3, "image_token_id": 3}
            node.data[name] = by_name.get(name, by_role.get(node.role(name)))
        fit_rotation(node, fill=True)


def _constant(new: int) -> Callable[[int], int]:
    return lambda old: new


def _at_most(most: int) -> Callable[[int], int]:
    return lambda old: min(old, most)


def _replace(tree: Tree, old: int, new: int, words: tuple[str, ...]) -> None:
    """Put one number in the place of another in fields whose names hold one of the words."""
    for node in tree.nodes:
        for name, value in list(node.data.items()):
            if any(word in name for word in words):
                node.data[name] = map_numbers(value, lambda one: new if one == old else one)

"""Nestings are walked as torch's pytree walks them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from colrow.apply.nesting import leaves, mapped

Pair = namedtuple("Pair", ["first", "second"])
NESTINGS = [
    (),
    {},
    None,
    (1, [2.0, None, "three", (True,)], {"z": 4, "a": [5]}),
    Pair(1, [2]),
    [Pair((1,), {"b": 2}), OrderedDict(x=1, a=(2, 3)), {3, 4}, torch.float32, torch.Size([1, 2])],
]


def _named(item: Any) -> Any:
    return f"<{item}>"


@pytest.mark.parametrize("item", NESTINGS, ids=repr)
def test_as_pytree(item: Any) -> None:
    assert leaves(item) == tree_leaves(item)
    found, expected = mapped(_named, item), tree_map(_named, item)
    assert found == expected
    assert type(found) is type(expected)

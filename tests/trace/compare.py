"""Whether two traces record the same."""

from __future__ import annotations

from typing import Any

import torch

from colrow.trace.integers import TracedInt
from colrow.trace.records import FunctionCall, ModuleCall, Trace, Value
from colrow.trace.tree import map_leaves


def _plain(item: Any) -> Any:
    def leaf(each: Any) -> Any:
        if isinstance(each, Value):
            return ("value", each.index)
        if isinstance(each, TracedInt):
            return ("integer", each.expression)
        return each

    return map_leaves(item, leaf)


def _index(item: ModuleCall | FunctionCall | None) -> int | None:
    return None if item is None else item.index


def assert_same(one: Trace, other: Trace) -> None:
    """Every record equal, except for which calls were copied."""
    assert len(one.operations) == len(other.operations)
    for a, b in zip(one.operations, other.operations, strict=True):
        assert a.function is b.function, (a, b)
        assert _plain(a.arguments) == _plain(b.arguments), (a, b)
        assert _plain(a.keywords) == _plain(b.keywords)
        assert _plain(a.inputs) == _plain(b.inputs)
        assert _plain(a.outputs) == _plain(b.outputs), (a, b)
        assert (_index(a.module), _index(a.call)) == (_index(b.module), _index(b.call))
    storages: dict[int, int] = {}
    for v, w in zip(one.values, other.values, strict=True):
        assert (v.index, v.shape, v.dtype, v.source) == (w.index, w.shape, w.dtype, w.source)
        assert v.differentiable == w.differentiable, v
        assert storages.setdefault(v.storage, w.storage) == w.storage, v
        assert [use.index for use in v.uses] == [use.index for use in w.uses]
        producers = [each.producer.index if each.producer is not None else None for each in (v, w)]
        assert producers[0] == producers[1]
        assert (v.content is None) == (w.content is None), v
        assert v.content is None or w.content is None or torch.equal(v.content, w.content)
    assert len(set(storages.values())) == len(storages)
    for c, d in zip(one.calls, other.calls, strict=True):
        assert c.function == d.function
        assert _plain((c.arguments, c.keywords, c.outputs)) == _plain((d.arguments, d.keywords, d.outputs)), c
        assert (c.site, c.occurrence, c.first, c.last) == (d.site, d.occurrence, d.first, d.last)
        assert c.module.index == d.module.index
    for m, n in zip(one.modules, other.modules, strict=True):
        assert (m.path, m.first, m.last, m.type_name) == (n.path, n.first, n.last, n.type_name)
        assert _index(m.parent) == _index(n.parent)
        assert _plain((m.inputs, m.outputs)) == _plain((n.inputs, n.outputs))
    assert _plain(one.outputs) == _plain(other.outputs)
    assert len(one.escapes) == len(other.escapes)
    for e, f in zip(one.escapes, other.escapes, strict=True):
        assert (e.expression, e.use, _index(e.module)) == (f.expression, f.use, _index(f.module))
        assert e.site == f.site, (str(e), str(f), e.site.code is f.site.code)

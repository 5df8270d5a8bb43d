"""Plans as nested lists and dictionaries of strings and numbers, by the types of their fields."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from colrow.layout import Cut, DimensionLayout, Segment
from colrow.plan import places as place_types
from colrow.plan.places import Call, CallArgument, CallResult, ModuleInput, ModuleOutput

if TYPE_CHECKING:
    from colrow.plan.plan import Plan

_PLACES = {"input": ModuleInput, "output": ModuleOutput, "argument": CallArgument, "result": CallResult}
_SEGMENT = re.compile(r"(\d+)x(\d+)x(\d+)( whole)?(?: span=(\d+))?(?: start=(\d+))?")


class Encoder:
    """Turns plans into data. ``calls`` collects the places in programs, by a short word for each."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self._words: dict[Call, str] = {}

    def plan(self, plan: Plan) -> dict[str, Any]:
        """The fields of a plan that are not empty."""
        return self._fields(plan)

    def _encode(self, item: Any) -> Any:
        if isinstance(item, Cut):
            return list(item.counts)
        if isinstance(item, DimensionLayout):
            return ", ".join(map(_segment_text, item.segments))
        for kind, place in _PLACES.items():
            if isinstance(item, place):
                return self._place(kind, item)
        if dataclasses.is_dataclass(item):
            return self._fields(item)
        if isinstance(item, dict):
            return [self._named(name, one) for name, one in item.items()]
        if isinstance(item, tuple):
            return [self._encode(one) for one in item]
        return item

    def _fields(self, item: Any) -> dict[str, Any]:
        found = {}
        for field in dataclasses.fields(item):
            value = getattr(item, field.name)
            if not _is_default(field, value):
                found[field.name] = self._encode(value)
        return found

    def _named(self, name: str, item: Any) -> dict[str, Any]:
        """An entry of a dictionary as a record with its name."""
        encoded = self._encode(item)
        if not isinstance(encoded, dict):
            return {"name": name, "is": encoded}
        if encoded.get("name") == name:
            return encoded
        return {"name": name, **encoded}

    def _place(self, kind: str, item: Any) -> dict[str, Any]:
        found: dict[str, Any] = {kind: item.module}
        if item.path:
            found["path"] = list(item.path)
        if isinstance(item, CallArgument | CallResult):
            found["call"] = self._call(item.call)
        return found

    def _call(self, call: Call) -> str:
        if call not in self._words:
            word = f"{call.function}@{call.line}"
            taken = sum(one.startswith(word) for one in self.calls)
            word = f"{word}#{taken + 1}" if word in self.calls else word
            self._words[call] = word
            self.calls[word] = self._fields(call)
        return self._words[call]


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(value == field.default)
    return field.default_factory is not dataclasses.MISSING and value == field.default_factory()


def _segment_text(segment: Segment) -> str:
    text = f"{segment.outer}x{segment.units}x{segment.inner}"
    text += " whole" if segment.whole else ""
    text += f" span={segment.span}" if segment.span != 1 else ""
    return text + (f" start={segment.start}" if segment.start else "")


def _layout(text: Any) -> DimensionLayout:
    segments = []
    for part in str(text).split(", "):
        matched = _SEGMENT.fullmatch(part)
        if not matched:
            raise ValueError(f"{part!r} is no part of a layout, such as 1x32x128 (outer x units x inner)")
        outer, units, inner, whole, span, start = matched.groups()
        sizes = int(outer), int(units), int(inner)
        segments.append(Segment(*sizes, bool(whole), int(span or 1), int(start or 0)))
    return DimensionLayout(tuple(segments))


class Decoder:
    """Turns data back into plans.

    Args:
        calls: places in programs by the words that stand for them.

    Raises:
        ValueError: if the data do not have the form of a plan; names the entry.
    """

    def __init__(self, calls: Any) -> None:
        self._calls = {
            word: self._dataclass(Call, one, f"calls.{word}") for word, one in (calls or {}).items()
        }

    def plan(self, data: dict[str, Any]) -> Plan:
        from colrow.plan.plan import Plan

        plan: Plan = self._dataclass(Plan, data, "")
        return plan

    def _decode(self, kind: Any, item: Any, where: str) -> Any:
        if kind is Cut:
            return Cut.from_counts(self._decode(tuple[int, ...], item, where))
        if kind is DimensionLayout:
            return _layout(item)
        if kind is Call:
            if item not in self._calls:
                raise ValueError(f"{where}: there is no call {item!r} among the calls")
            return self._calls[item]
        if kind in _PLACES.values():
            return self._place((kind,), item, where)
        if dataclasses.is_dataclass(kind):
            return self._dataclass(kind, item, where)
        origin, arguments = get_origin(kind), get_args(kind)
        if origin in (Union, types.UnionType):
            return self._union(arguments, item, where)
        if origin is Literal:
            if item not in arguments:
                raise ValueError(f"{where} must be one of {', '.join(map(str, arguments))}, not {item!r}")
            return item
        if origin is dict:
            return self._dictionary(arguments[1], item, where)
        if origin is tuple:
            return self._tuple(arguments, item, where)
        if not isinstance(item, kind) or (kind is int and isinstance(item, bool)):
            raise ValueError(f"{where} must be of type {kind.__name__}, not {item!r}")
        return item

    def _dataclass(self, kind: Any, item: Any, where: str) -> Any:
        if not isinstance(item, dict):
            raise ValueError(f"{where} must have the entries of {kind.__name__}, not {item!r}")
        fields = {field.name: field for field in dataclasses.fields(kind)}
        for name in item:
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 1)
                hint = f", did you mean {near[0]}?" if near else f"; it has {', '.join(fields)}"
                raise ValueError(f"{where or 'the plan'} has no entry {name!r}{hint}")
        hints = get_type_hints(kind, vars(place_types) if kind.__module__ == place_types.__name__ else None)
        found = {
            name: self._decode(hints[name], one, f"{where}.{name}".lstrip(".")) for name, one in item.items()
        }
        missing = [
            name
            for name, field in fields.items()
            if name not in found
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{where or 'the plan'} lacks the entry {missing[0]!r}")
        return kind(**found)

    def _union(self, kinds: tuple[Any, ...], item: Any, where: str) -> Any:
        if item is None and type(None) in kinds:
            return None
        if any(kind in _PLACES.values() for kind in kinds):
            return self._place(kinds, item, where)
        lists = [kind for kind in kinds if get_origin(kind) is tuple]
        if lists and isinstance(item, list):
            return self._decode(lists[0], item, where)
        others = [kind for kind in kinds if kind is not type(None) and kind not in lists]
        if len(others) == 1:
            return self._decode(others[0], item, where)
        if isinstance(item, tuple(others)) and not isinstance(item, bool):
            return item
        raise ValueError(f"{where} must be {' or '.join(one.__name__ for one in others)}, not {item!r}")

    def _place(self, kinds: tuple[Any, ...], item: Any, where: str) -> Any:
        words = [word for word, kind in _PLACES.items() if kind in kinds]
        named = [word for word in words if isinstance(item, dict) and word in item]
        if len(named) != 1:
            raise ValueError(f"{where} must name a place by one of {', '.join(words)}, not {item!r}")
        fields = {"module" if name == named[0] else name: one for name, one in item.items()}
        if "path" not in fields and _PLACES[named[0]] in (ModuleInput, CallArgument):
            fields["path"] = []
        return self._dataclass(_PLACES[named[0]], fields, where)

    def _dictionary(self, kind: Any, item: Any, where: str) -> dict[str, Any]:
        found = {}
        for record in self._list(item, where):
            if not isinstance(record, dict) or "name" not in record:
                raise ValueError(f"every entry of {where} needs a name, not {record!r}")
            name = record["name"]
            if name in found:
                raise ValueError(f"{where} names {name} twice")
            rest = {key: one for key, one in record.items() if key != "name"}
            if dataclasses.is_dataclass(kind):
                has_name = any(field.name == "name" for field in dataclasses.fields(kind))
                found[name] = self._dataclass(kind, record if has_name else rest, f"{where} {name}")
            elif set(rest) == {"is"}:
                found[name] = self._decode(kind, rest["is"], f"{where} {name}")
            else:
                raise ValueError(f"{where} {name} must have the one entry 'is', not {', '.join(rest)}")
        return found

    def _tuple(self, kinds: tuple[Any, ...], item: Any, where: str) -> tuple[Any, ...]:
        items = self._list(item, where)
        if len(kinds) == 2 and kinds[1] is ...:
            return tuple(self._decode(kinds[0], one, f"{where}[{at}]") for at, one in enumerate(items))
        if len(items) != len(kinds):
            raise ValueError(f"{where} must have {len(kinds)} entries, not {len(items)}")
        return tuple(self._decode(kind, one, where) for kind, one in zip(kinds, items, strict=True))

    def _list(self, item: Any, where: str) -> list[Any]:
        if not isinstance(item, list):
            raise ValueError(f"{where} must be a list, not {item!r}")
        return item

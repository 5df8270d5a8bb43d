"""Repeated layers in lists of records."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colrow.plan.repeat import compress, expand

Records = list[dict[str, Any]]


def layers(count: int, *names: str) -> Records:
    return [{"name": f"h.{layer}.{name}.weight", "size": [3]} for layer in range(count) for name in names]


def test_layers_are_written_once() -> None:
    records = [{"name": "table"}, *layers(126, "q", "k", "mlp.0", "mlp.2"), {"name": "head"}]
    short = compress(records)
    assert [one.get("repeat") for one in short] == [None, "0-125", None]
    assert [one["name"] for one in short[1]["each"]] == [
        f"h.*.{name}.weight" for name in ("q", "k", "mlp.0", "mlp.2")
    ]
    assert expand(short) == records


def test_experts_within_layers() -> None:
    records = [
        {"name": f"h.{layer}.experts.{expert}.{name}", "axis": "features"}
        for layer in range(5)
        for expert in range(100)
        for name in ("up", "down")
    ]
    short = compress(records)
    assert short == [
        {
            "repeat": "0-4",
            "each": [
                {
                    "repeat": "0-99",
                    "each": [
                        {"name": "h.*.experts.*.up", "axis": "features"},
                        {"name": "h.*.experts.*.down", "axis": "features"},
                    ],
                }
            ],
        }
    ]
    assert expand(short) == records


def test_a_first_layer_of_another_kind_stands_alone() -> None:
    records = [*layers(1, "q", "mlp"), *layers(6, "q", "experts")[2:]]
    short = compress(records)
    assert [one.get("repeat", one.get("name")) for one in short] == ["h.0.q.weight", "h.0.mlp.weight", "1-5"]
    assert expand(short) == records


def test_gaps_between_the_numbers() -> None:
    records = [{"name": f"h.{layer}.q"} for layer in (0, 1, 2, 5, 9)]
    assert compress(records) == [{"repeat": "0-2, 5, 9", "each": [{"name": "h.*.q"}]}]
    assert expand(compress(records)) == records


def test_several_names_of_a_record_move_together() -> None:
    records = [{"places": [{"input": f"h.{layer}.q"}, {"input": f"h.{layer}.k"}]} for layer in range(4)]
    assert compress(records) == [
        {"repeat": "0-3", "each": [{"places": [{"input": "h.*.q"}, {"input": "h.*.k"}]}]}
    ]
    apart = [{"places": [{"input": f"h.{layer}.q"}, {"input": f"h.{layer + 1}.k"}]} for layer in range(4)]
    assert expand(compress(apart)) == apart


def test_records_that_differ_in_more_than_names_are_apart() -> None:
    records = [{"name": f"h.{layer}.q", "size": layer // 2} for layer in range(4)]
    short = compress(records)
    assert [one["repeat"] for one in short] == ["0-1", "2-3"]
    assert expand(short) == records


def test_names_with_a_star_are_left_alone() -> None:
    records = [{"name": f"h.{layer}.*"} for layer in range(4)]
    assert compress(records) == records


@pytest.mark.parametrize("wrong", ["0-", "a", "1--2", ""])
def test_numbers_that_are_none(wrong: str) -> None:
    with pytest.raises(ValueError, match="repeat must be numbers"):
        expand([{"repeat": wrong, "each": [{"name": "h.*.q"}]}])


def test_a_repetition_without_records() -> None:
    with pytest.raises(ValueError, match="the two entries repeat and each"):
        expand([{"repeat": "0-1", "name": "h.*.q"}])


parts = st.sampled_from(["a", "b", "0", "1", "2", "03", "10"])
names = st.lists(parts, min_size=1, max_size=4).map(".".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.fixed_dictionaries({"name": names, "of": st.lists(names, max_size=2)}), max_size=24))
def test_any_records_come_back(records: Records) -> None:
    assert expand(compress(records)) == records
    thrice = [{"name": f"{layer}.{one['name']}", "of": one["of"]} for layer in range(3) for one in records]
    assert expand(compress(thrice)) == thrice

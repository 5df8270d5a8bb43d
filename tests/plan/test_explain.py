"""Plans as tables for people."""

from __future__ import annotations

import dataclasses

import pytest

from colrow.plan import Plan
from colrow.plan.patterns import merge, merge_texts
from colrow.plan.text import size
from tests.plan.samples import everything, gpt2

transformers = pytest.importorskip("transformers")


def section(text: str, title: str) -> list[list[str]]:
    """The lines under a title, split where columns are."""
    lines = text.split("\n")
    start = lines.index(title) + 1
    end = next((at for at in range(start, len(lines)) if lines[at] and lines[at][0] != " "), len(lines))
    return [[cell for cell in line.split("  ") if cell.strip()] for line in lines[start:end] if line]


def stripped(rows: list[list[str]]) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in rows]


def test_axes_with_their_members_and_savings() -> None:
    rows = stripped(section(gpt2(2).explain(), "axes"))
    assert rows[0] == ["axis", "units", "per rank", "parameters", "saved per rank", "collectives"]
    # 50257 x 48, counted once though it has two names; heads: 48 x 144 + 144 + 48 x 48 of four layers
    assert rows[1] == ["vocab", "50257", "25129 25128", "2.4 M", "1.2 M"]
    assert rows[2] == ["heads", "6", "3 3", "37.4 k", "18.7 k"]
    assert ["transformer.h.*.attn.c_attn.weight[1]", "x 4", "3 times 6 units of 8", "48 x 144"] in rows
    assert ["lm_head.weight[0] (tied to transformer.wte.weight)", "50257 units of 1", "50257 x 48"] in rows


def test_what_ranks_hold_adds_up() -> None:
    def held(words: int, heads: int, features: int) -> int:
        """Elements of four layers of 48 features, heads of 8, a context of 1024."""
        attention = (48 + 1) * 3 * 8 * heads + 8 * heads * 48 + 48
        mlp = (48 + 1) * features + features * 48 + 48
        return words * 48 + 1024 * 48 + 4 * (attention + mlp + 4 * 48) + 2 * 48

    whole = held(50257, 6, 192)
    ranks = [held(25129, 3, 96), held(12564, 2, 48), held(12564, 1, 48)]
    (elements,) = stripped(section(gpt2(3, [2, 1, 1]).explain(), "what each rank holds"))[1:]
    assert elements == [
        "elements",
        size(whole, ""),
        ", ".join(size(one, "") for one in ranks),
        ", ".join(f"{100 * one / whole:.1f} %" for one in ranks),
    ]


def test_everything_is_named() -> None:
    text = everything().explain()
    collectives = stripped(section(text, "collectives"))
    assert collectives[1] == [
        *(
            "training",
            "forward",
            "all-reduce",
            "exit transformer.h.*.mlp",
            "2 x 10 x 48",
            "3.8 kB",
            "8",
            "30.7 kB",
        )
    ]
    assert collectives[-2] == ["training: 8 collectives of 30.7 kB together"]
    axes = stripped(section(text, "axes"))
    assert ["mlp", "192", "96 96", "74.5 k", "149 kB", "8 exit forward"] in axes
    assert ["heads", "6", "3 3", "37.4 k", "74.9 kB"] in axes
    assert stripped(section(text, "what each rank holds"))[1:] == [
        ["parameters", "1.0 k", "500", "50.0 %"],
        ["bytes", "4.0 kB", "2.0 kB", "50.0 %"],
    ]
    actions = "\n".join("  ".join(row) for row in stripped(section(text, "actions")))
    for expected in (
        "entry: all-reduce backward  input hidden_states.0 of transformer.h.0.mlp, result 0 of view in ",
        "exit: all-reduce forward  result of view in package.other:31 rotate (transformer.h.0.mlp)",
        "exit: reduce-scatter forward  output of transformer.ln_f, sequence in dimension 1",
        "lookup: reduce-scatter  result of view in package.modeling:31 Attention.forward, pass 1 "
        "(transformer), cut vocab, sequence in dimension 0",
        "entry: all-gather forward  input 0 of transformer.h.1, result of view in ",
        "whole sequence: all-gather  output of transformer.ln_f, sequence in dimension 1",
        "part of a sequence  input 0 of transformer.h.0, sequence_2 in dimension 1",
        "slice: own part  argument bias of view in package.other:31 rotate (the model), cut heads",
        "gather: all parts  output of lm_head, cut heads",
        "gradients summed  transformer.h.0.norm.weight",
        "added by one rank  bias",
        "own random numbers  x 4  transformer.h.*.drop",
        "loss over the vocabulary  lm_head of the model, cut vocab",
        "hold a tied parameter  lm_head",
    ):
        assert expected in actions
    numbers = stripped(section(text, "numbers that become each rank's own"))
    assert numbers[0] == ["attribute", "transformer.h.3.attn.config.num_heads", "2 1"]
    assert numbers[1][-2:] == ["6 6 -> 3 3", "x 4"]
    assert numbers[2][-2:] == ["6 6 -> 6 (2, 1)", "x 4"]
    assert stripped(section(text, "notes"))[0] == ["features stays whole: 'it: is odd'"]


def test_entries_name_their_modules_in_short() -> None:
    from colrow.plan import Entry, ModuleInput

    places = tuple(ModuleInput(f"h.0.attn.{name}", (0,)) for name in "qkv")
    plan = dataclasses.replace(gpt2(2), entries=(Entry(places),))
    assert "input 0 of h.0.attn.{q, k, v}" in plan.explain()


def test_a_plan_that_cuts_nothing() -> None:
    assert Plan(1).explain() == "plan over 1 rank: nothing is cut"
    assert Plan(4, notes=("why",)).explain().split("\n") == [
        "plan over 4 ranks: nothing is cut",
        "",
        "notes",
        "  why",
    ]


def test_many_ranks_stay_on_the_page() -> None:
    assert max(map(len, gpt2(24).explain().split("\n"))) < 130


def test_numbers_that_all_have_in_common_stay() -> None:
    texts = ["h.0.mlp.0.weight", "h.1.mlp.0.weight", "h.2.mlp.0.weight", "head"]
    merged = merge_texts(texts)
    assert [(one.text, one.count, one.ranges) for one in merged] == [
        ("h.*.mlp.0.weight", 3, "0-2"),
        ("head", 1, ""),
    ]
    (apart, together) = merge([("h.0.q", 1), ("h.1.q", 2), ("h.3.q", 2)])
    assert (apart[0].text, apart[1]) == ("h.0.q", 1)
    assert (together[0].text, together[0].ranges, together[1]) == ("h.*.q", "1, 3", 2)


def test_stars_and_sentences_are_kept() -> None:
    merged = merge_texts(["exit of h.*.q", "output of layers.1.q, size 3", "output of layers.2.q, size 3"])
    assert [one.text for one in merged] == ["exit of h.*.q", "output of layers.*.q, size 3"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (99_960, "100 kB"),
        (999_600, "1.0 MB"),
        (2.1e15, "2100 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_numbers_of_arguments_are_not_merged() -> None:
    merged = merge_texts(
        ["input 0 of h.0.mlp", "input 1 of h.0.mlp", "input 1 of h.1.mlp", "0.weight", "1.weight"]
    )
    assert [one.text for one in merged] == ["input 0 of h.0.mlp", "input 1 of h.*.mlp", "*.weight"]

"""Examples by mode, and the same inputs at other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from colrow.trace import Example
from colrow.verify.inputs import examples_by_mode, inputs_with_gradients, other_sizes, prepared


def _sizes(**keywords: Any) -> dict[str, dict[str, list[int]]]:
    return {
        description: {name: list(one.shape) for name, one in example.keywords.items() if one is not None}
        for description, example in other_sizes(Example(keywords=keywords))
    }


def test_modes() -> None:
    model, keywords = nn.Linear(2, 2), {"x": torch.ones(1, 2)}
    assert list(examples_by_mode(model, keywords)) == ["training"]
    assert list(examples_by_mode(model.eval(), keywords)) == ["evaluation"]
    example = Example((torch.ones(1, 2),))
    assert examples_by_mode(model, example) == {"evaluation": example}
    assert examples_by_mode(model, {"training": example, "other": example}) == {
        "training": example,
        "other": example,
    }
    with pytest.raises(ValueError, match="give the model's inputs"):
        examples_by_mode(model, {})


def test_batch_and_sequence_change_together_then_alone() -> None:
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.bool)
    assert _sizes(ids=ids, mask=mask, bias=torch.ones(2, 9, 4), kind=torch.zeros(2), none=None) == {
        "batch 2 to 3, sequence 9 to 6": {"ids": [3, 6], "mask": [3, 6], "bias": [3, 6, 4], "kind": [3]},
        "batch 2 to 3": {"ids": [3, 9], "mask": [3, 9], "bias": [3, 9, 4], "kind": [3]},
        "sequence 9 to 6": {"ids": [2, 6], "mask": [2, 6], "bias": [2, 6, 4], "kind": [2]},
    }


def test_positions_have_no_batch_and_two_sequences_two_lengths() -> None:
    found = _sizes(
        ids=torch.zeros(3, 8, dtype=torch.long),
        decoder=torch.zeros(3, 5, dtype=torch.long),
        positions=torch.arange(8),
        row=torch.arange(8)[None],
    )
    assert found["batch 3 to 4, sequence 8 to 6, sequence 5 to 4"] == {
        "ids": [4, 6],
        "decoder": [4, 4],
        "positions": [6],
        "row": [1, 6],
    }


def test_images_and_features() -> None:
    assert _sizes(pixels=torch.zeros(2, 3, 8, 8)) == {"batch 2 to 3": {"pixels": [3, 3, 8, 8]}}
    assert "batch 2 to 3, sequence 7 to 5" in _sizes(x=torch.zeros(2, 7, 4))
    assert _sizes(flag=None) == {}


def test_rows_are_repeated_whole() -> None:
    ids, labels = torch.arange(6).view(2, 3), torch.tensor([10, 11])
    _, example = next(iter(other_sizes(Example(keywords={"ids": ids, "labels": labels}))))
    assert example.keywords["ids"].tolist() == [[0, 1], [3, 4], [0, 1]]
    assert example.keywords["labels"].tolist() == [10, 11, 10]


def test_prepared_inputs_are_copies_of_one_precision() -> None:
    given = {"x": torch.ones(2), "ids": torch.ones(2, dtype=torch.long), "more": [torch.ones(1), 3]}
    example = prepared(Example((torch.zeros(1),), given), torch.float64, differentiable=True)
    assert [name for name, _ in inputs_with_gradients(example)] == ["0", "x", "more.0"]
    assert example.keywords["x"].dtype == torch.float64
    assert example.keywords["ids"].dtype == torch.long
    example.keywords["ids"][0] = 7
    assert given["ids"].tolist() == [1, 1]  # type: ignore[union-attr]
    assert inputs_with_gradients(prepared(example, torch.float32, differentiable=False)) == []

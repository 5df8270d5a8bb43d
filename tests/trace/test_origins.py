"""Which reads of data are guessed, and which branches are refused: those that depend on activations."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.plan import derive_plan
from colrow.trace import Example, TraceError, trace
from colrow.verify.precision import one_precision

WIDTH, HIDDEN, EXPERTS, TOKENS = 6, 8, 4, 5


class Model(nn.Module):
    """``course(self, x, h)`` says what happens to the hidden states ``h``."""

    largest: Tensor

    def __init__(self, course: Callable[[Model, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.register_buffer("largest", torch.zeros(1))
        self.course = course

    def forward(self, x: Tensor) -> Tensor:
        return self.course(self, x, self.up(x))

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of each expert for each token, zeros but for two; and the two."""
        scores = self.router(x).softmax(-1)
        highest, chosen = scores.topk(2, -1)
        return torch.zeros_like(scores).scatter(-1, chosen, highest), chosen


def by_input(model: Model, x: Tensor, h: Tensor) -> Tensor:
    return model.down(h.softmax(-1) if x.sum() < 0 else h)  # read


def by_maximum(model: Model, x: Tensor, h: Tensor) -> Tensor:
    if h.abs().max() > h.mean():  # read
        h = h / 2
    return h


def by_norm_after_experts(model: Model, x: Tensor, h: Tensor) -> Tensor:
    gates, _ = model.gates(x)
    h = h + sum(gates[:, number, None] * h for number in range(EXPERTS))
    if h.norm() > 3:  # read
        h = h / h.norm()
    return h


def by_loss(model: Model, x: Tensor, h: Tensor) -> Tensor:
    loss = F.mse_loss(h, torch.zeros(TOKENS, HIDDEN))
    return loss * 2 if loss.item() > 3 else loss  # read


def by_count(model: Model, x: Tensor, h: Tensor) -> Tensor:
    count = (h > 0).sum().item()
    return h + 1 if count > 3 else h  # read


def by_largest_count(model: Model, x: Tensor, h: Tensor) -> Tensor:
    return h + 1 if (h > 0).sum(-1).max() > 3 else h  # read


def with_count_as_number(model: Model, x: Tensor, h: Tensor) -> Tensor:
    count = (h > 0).sum().item()
    return h / count  # read


def as_often_as_counted(model: Model, x: Tensor, h: Tensor) -> Tensor:
    for _ in range((h > 0).sum()):  # read
        h = h + 1
    return h


def by_equality(model: Model, x: Tensor, h: Tensor) -> Tensor:
    return h if torch.allclose(h, h * 2) else h + 1  # read


def by_weights(model: Model, x: Tensor, h: Tensor) -> Tensor:
    return h if model.up.weight.norm() > 1 else h + 1  # read


@pytest.mark.parametrize(
    "course",
    [
        by_input,
        by_maximum,
        by_norm_after_experts,
        by_loss,
        by_count,
        by_largest_count,
        with_count_as_number,
        as_often_as_counted,
        by_equality,
        by_weights,
    ],
)
def test_a_branch_on_activations_is_refused(course: Callable[[Model, Tensor, Tensor], Tensor]) -> None:
    lines, first = inspect.getsourcelines(course)
    offset, line = next((number, text) for number, text in enumerate(lines) if text.endswith("# read\n"))
    with pytest.raises(TraceError) as raised:
        derive_plan(Model(course), {"training": Example((torch.randn(TOKENS, WIDTH),))}, 2)
    assert f":{first + offset} in {course.__name__}" in raised.value.place
    assert f"`{line.strip()}`" in raised.value.cause
    assert "another course that the program may take would not be seen" in raised.value.cause
    assert "torch.where" in raised.value.remedy
    assert "routing" not in raised.value.remedy


def if_not_finite(model: Model, x: Tensor, h: Tensor) -> Tensor:
    h = model.down(h.tanh())
    if not torch.isfinite(h).all() or h.isnan().any() or torch.isinf(h).any():
        h = h.clamp(-1, 1)
    return h


def by_chance(model: Model, x: Tensor, h: Tensor) -> Tensor:
    return x if torch.rand([]) < 0.1 else model.down(h)


def by_state(model: Model, x: Tensor, h: Tensor) -> Tensor:
    for _ in range(2):
        if model.largest.abs().max() > 100:
            h = h + 1
        model.largest = torch.maximum(model.largest, h.detach().max())
    return model.down(h)


def by_chosen_expert(model: Model, x: Tensor, h: Tensor) -> Tensor:
    gates, chosen = model.gates(x)
    result = torch.zeros_like(h)
    for number in range(EXPERTS):
        if (chosen == number).any() and (gates[:, number] > 0).any() and gates[:, number].bool().any():
            result = result + gates[:, number, None] * h
    return result


def by_rank(model: Model, x: Tensor, h: Tensor) -> Tensor:
    scores = model.router(x)
    chosen = scores >= scores.topk(2, -1).values[..., -1:]
    for number in range(EXPERTS):
        if chosen[:, number].any():
            h = h + chosen[:, number, None] * h
    return h


def by_size_of_an_expert(model: Model, x: Tensor, h: Tensor) -> Tensor:
    _, chosen = model.gates(x)
    sizes = F.one_hot(chosen[:, 0], EXPERTS).sum(0).tolist()
    return torch.cat([part for part, size in zip(h.split(sizes), sizes, strict=True) if size > 0])


def some_rows(model: Model, x: Tensor, h: Tensor) -> Tensor:
    return h[h.sum(-1) > 0]


def as_many_rows(model: Model, x: Tensor, h: Tensor) -> Tensor:
    count = (h[:, 0] > 0).sum()
    first, second = h.split(torch.stack([count, len(h) - count]).tolist())
    return torch.cat([second, first, h[:count]])


@pytest.mark.parametrize(
    ("course", "reason"),
    [
        (if_not_finite, "all numbers are taken to be finite"),
        (by_chance, "it is drawn by chance"),
        (by_state, "it follows from buffers"),
        (by_chosen_expert, "it follows from a choice by data"),
        (by_rank, "it follows from a choice by data"),
        (by_size_of_an_expert, "it follows from a choice by data"),
        (some_rows, "the same however many are chosen"),
        (as_many_rows, "the same however many are chosen"),
    ],
)
def test_other_reads_are_guessed_and_the_plan_says_why(
    course: Callable[[Model, Tensor, Tensor], Tensor], reason: str
) -> None:
    example = Example((torch.randn(TOKENS, WIDTH),))
    notes = derive_plan(Model(course), {"training": example}, 2).notes
    assert any(f"in {course.__name__}, " in note and "guessed" in note and reason in note for note in notes)
    with pytest.raises(TraceError, match=r"routing='guess'|another course"):
        trace(Model(course), example.arguments)


def test_guesses_name_the_line_when_numbers_are_converted() -> None:
    with one_precision():
        record = trace(Model(by_chance).double(), (torch.randn(TOKENS, WIDTH),), routing="guess")
    assert "test_origins.py" in record.warnings[0]


def test_what_a_program_reads_is_whole() -> None:
    def course(model: Model, x: Tensor, h: Tensor) -> Tensor:
        """Reads of all hidden features whether they are finite."""
        finite = torch.isfinite(h).tolist()
        return model.down(h.tanh()) if all(map(all, finite)) else x

    example = {"training": Example((torch.randn(TOKENS, WIDTH),))}
    plan = derive_plan(Model(course), example, 2)
    assert "up.bias" not in plan.parameters
    assert any("reads its numbers at" in note and "test_origins.py" in note for note in plan.notes)
    assert "up.bias" in derive_plan(Model(if_not_finite), example, 2).parameters

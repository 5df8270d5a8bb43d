from __future__ import annotations

import copy
import json
import math
import operator
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colrow.trace.integers import Attribute, Expression, Size, TracedInt, evaluate, origins
from colrow.trace.modules import asking_logarithms

OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


def attribute(name: str, value: int) -> Attribute:
    return Attribute("layer", name, value)


@given(
    start=st.integers(1, 40),
    steps=st.lists(
        st.tuples(st.sampled_from(sorted(OPERATORS)), st.integers(1, 40), st.booleans(), st.booleans()),
        max_size=6,
    ),
    other=st.integers(1, 40),
)
def test_arithmetic_evaluates_to_itself_and_follows_other_attributes(
    start: int, steps: list[tuple[str, int, bool, bool]], other: int
) -> None:
    number: int = TracedInt(start, attribute("heads", start))
    again = other
    for symbol, operand, traced, reflected in steps:
        right = TracedInt(operand, attribute(f"x{operand}", operand)) if traced else operand
        function = OPERATORS[symbol]
        try:
            number, again = (
                (function(right, number), function(operand, again))
                if reflected
                else (function(number, right), function(again, operand))
            )
        except ZeroDivisionError:
            return
    assert isinstance(number, TracedInt)
    assert evaluate(number.expression, lambda origin: origin.value) == number
    changed = evaluate(
        number.expression,
        lambda origin: other if isinstance(origin, Attribute) and origin.path == "heads" else origin.value,
    )
    assert changed == again


def test_remaining_integer_operations_keep_the_origin() -> None:
    n = TracedInt(12, Size(3, 1, 12))
    for result, expected in [
        (-n, -12),
        (divmod(n, 5)[0], 2),
        (divmod(n, 5)[1], 2),
        (divmod(100, n)[0], 8),
        (abs(-n), 12),
        (math.ceil(n), 12),
        (round(n), 12),
        (math.prod([n, 2]), 24),
        (sum([n, n]), 24),
        (max(n, 3), 12),
    ]:
        assert result == expected
        assert isinstance(result, TracedInt)
        assert {origin.value for origin in origins(result.expression)} == {12}


def test_it_is_an_ordinary_integer_for_everything_else() -> None:
    n = TracedInt(12, attribute("heads", 12))
    assert json.dumps({"n": n}) == '{"n": 12}'
    assert f"{n} {n:3d} %d" % n == "12  12 12"
    assert {12: "a"}[n] == "a"
    assert [0] * n == [0] * 12
    assert list(range(20))[n] == 12
    for plain in (copy.copy(n), copy.deepcopy(n), pickle.loads(pickle.dumps(n))):
        assert type(plain) is int
        assert plain == 12
    assert torch.zeros(n, n // 2).shape == (12, 6)
    assert torch.Size([n])[0] is n
    assert torch.zeros(24).view(n, -1).shape == (12, 2)


@pytest.mark.parametrize(
    ("use", "function"),
    [
        ("float()", lambda n: math.sqrt(n)),
        ("float()", lambda n: float(n)),
        ("int()", lambda n: int(n)),
        ("**", lambda n: n**-0.5),
        ("**", lambda n: 2**n),
        ("/", lambda n: n / 3),
        ("/", lambda n: 1 / n),
        ("*", lambda n: n * 0.5),
        ("+", lambda n: n + 0.5),
        ("<<", lambda n: 1 << n),
        ("&", lambda n: n & 3),
        ("math.log", lambda n: math.log(n)),
        ("math.log2", lambda n: math.log2(n)),
        ("math.isqrt", lambda n: math.isqrt(n)),
    ],
)
def test_uses_as_a_number_are_reported_and_right(use: str, function: object) -> None:
    heard: list[tuple[Expression, str]] = []
    n = TracedInt(12, attribute("heads", 12), lambda expression, use: heard.append((expression, use)))
    assert callable(function)
    expected = function(12)
    with asking_logarithms():
        assert function(n) == expected
    assert heard == [(n.expression, use)]
    assert math.log.__module__ == "math"

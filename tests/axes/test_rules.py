"""Every rule of the registry against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from colrow.axes import default_registry
from tests.axes import (  # noqa: F401
    cases_contraction,
    cases_indexing,
    cases_linear_algebra,
    cases_mixing,
    cases_pointwise,
    cases_structural,
)
from tests.axes.brute_force import check_cuts, check_linear
from tests.axes.drawing import CASES, Draw, overload

REGISTRY = default_registry()
QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


def check(name: str, data: st.DataObject) -> None:
    draw = Draw(data)
    for builder in CASES[name]:
        case = builder(draw, overload(name))
        check_cuts(case, draw.cut, REGISTRY)
        check_linear(case, REGISTRY)


@pytest.mark.parametrize("name", sorted(CASES))
@settings(QUIET, max_examples=6, phases=[Phase.generate])
@given(data=st.data())
def test_rule_against_brute_force(name: str, data: st.DataObject) -> None:
    check(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
@settings(QUIET, max_examples=200)
@given(data=st.data())
def test_rule_against_brute_force_deeply(name: str, data: st.DataObject) -> None:
    check(name, data)


def test_stand_in_for_grouped_products_is_the_operator() -> None:
    """On small integers, which half precision holds exactly."""
    first, second = torch.randint(3, (8, 16)).bfloat16(), torch.randint(3, (3, 16, 8)).bfloat16()
    ends = torch.tensor([2, 3, 8], dtype=torch.int32)
    true = torch.ops.aten._grouped_mm.default(first, second, ends)
    assert torch.equal(cases_contraction.product_by_group(first, second, ends), true)


def test_every_rule_has_a_case() -> None:
    tested = set(CASES) | {"_".join(name.split("_")) for name in CASES}
    tested |= {".".join(name.split(".")[:2]).rstrip("_") for name in CASES}
    missing = [name for name in REGISTRY if name not in tested]
    assert not missing, missing

"""Cases for decompositions, inverses and systems of equations."""

from __future__ import annotations

from typing import Any

import torch

from tests.axes.brute_force import Case
from tests.axes.drawing import Draw, case


def matrices(draw: Draw, size: int, *batch: int) -> torch.Tensor:
    """Symmetric, positive definite, with well separated eigenvalues: every decomposition is unique."""
    values = draw.tensor(*batch, size, size)
    return values @ values.mT + torch.diag(torch.arange(1.0, size + 1, dtype=torch.float64) * 10)


@case("aten.linalg_inv_ex", "aten.linalg_cholesky_ex", "aten.linalg_qr", "aten._linalg_svd")
@case("aten._linalg_eigh", "aten._linalg_det", "aten._linalg_slogdet", "aten.linalg_lu_factor_ex")
@case("aten.linalg_matrix_exp", "aten.linalg_pinv")
def of_matrices(draw: Draw, function: Any) -> Case:
    batch = draw.sizes(1, 2)
    given = matrices(draw, 3, *batch) / 50
    return Case(function, [given, *[1e-9] * (function._schema.name == "aten::linalg_pinv")], free=len(batch))


@case("aten.linalg_solve_triangular", "aten._linalg_solve_ex")
def solve(draw: Draw, function: Any) -> Case:
    batch, size, count = draw.sizes(1, 2), 3, draw.size()
    left = draw.flag()
    sides = draw.tensor(*batch, size, count) if left else draw.tensor(*batch, count, size)
    keywords: dict[str, Any] = {"left": left}
    if function._schema.name == "aten::linalg_solve_triangular":
        keywords["upper"] = draw.flag()
    return Case(function, [matrices(draw, size, *batch), sides], keywords, free=len(batch) + 1)

"""What makes two models comparable: one precision, no chance, parameters that hide nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.verify.chance import WithoutChance
from colrow.verify.models import build_pair, spread
from colrow.verify.precision import OnePrecision, cast, one_precision


class _Rounding(nn.Module):
    """Goes through lower precisions in every way that models use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.table = torch.linspace(0, 1, 4)  # no buffer

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        half = x.to(torch.float16) + x.half() + x.bfloat16() + x.type("torch.FloatTensor")
        soft = F.softmax(x, -1, dtype=torch.float32) + torch.softmax(half, dim=-1, dtype=torch.float32)
        made = torch.zeros(4, dtype=torch.float32) + torch.arange(4) * 0.1 + torch.tensor(0.3)
        norm = (self.weight * x.float()).pow(2).mean(-1, keepdim=True).type_as(x)
        return {"half": half, "soft": soft, "made": made, "norm": norm, "table": self.table}


def test_one_precision() -> None:
    model = cast(_Rounding(), torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with one_precision():
        found = model(x)
    assert {one.dtype for one in found.values()} == {torch.float64}
    exact = torch.softmax(x, -1) + torch.softmax(4 * x, -1)
    torch.testing.assert_close(found["soft"], exact, rtol=1e-14, atol=1e-14)
    assert torch.get_default_dtype() == torch.float32
    assert model(x)["half"].dtype == torch.float32  # as it is without


def test_single_precision_keeps_double() -> None:
    with OnePrecision(torch.float32):
        assert torch.ones(2, dtype=torch.float64).dtype == torch.float64
        assert torch.ones(2).half().dtype == torch.float32
        assert torch.ones(2, dtype=torch.float64).float().dtype == torch.float32
        bits = torch.ones(2).view(torch.int32)
    assert bits.tolist() == [1065353216] * 2


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.complex(torch.ones(3), torch.ones(3)))
        self.bias = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        self.turn = torch.polar(torch.ones(3), torch.arange(3.0))  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real((x.cfloat() * self.filter + self.bias) * self.turn.to(torch.complex64))


def test_complex_numbers_stay_complex() -> None:
    model = cast(_Complex(), torch.float64)
    assert {one.dtype for one in (model.filter, model.bias, model.turn)} == {torch.complex128}
    assert (model.filter.imag == 1).all()
    with one_precision():
        assert model(torch.ones(3)).dtype == torch.float64
    spread(model, 3)
    assert model.bias.real.all(), "a bias of zeros, added twice, does not show"
    assert model.bias.imag.all()


class _Chance(nn.Module):
    """Drops elements in every way that models use."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x) + F.dropout(x, 0.5, self.training) + F.alpha_dropout(x, 0.5, self.training)
        x = x + F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.recurrent(x)[0]  # type: ignore[no-any-return]


def test_nothing_is_dropped() -> None:
    model, x = _Chance(), torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = model.eval()(x)
        with WithoutChance(0):
            found = model.train()(x)
        assert not torch.allclose(model(x), expected)
    torch.testing.assert_close(found, expected)


def test_draws_depend_on_their_place_alone() -> None:
    def draw(extra: bool) -> list[Tensor]:
        with WithoutChance(5):
            if extra:
                torch.rand(3)
            return [torch.rand(2) if index else torch.empty(2).bernoulli_(0.5) for index in range(4)]

    first, second = draw(False), draw(True)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first[1], first[2])


def _norms() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Embedding(3, 4))


def test_equal_numbers_are_spread_and_others_stay() -> None:
    model = _norms()
    matrix = model[0].weight.detach().clone()  # type: ignore[operator, union-attr]
    spread(model, 3)
    assert torch.equal(model[0].weight, matrix)
    for vector in (model[1].weight, model[1].bias, model[2].running_mean, model[2].running_var):
        assert vector.std() > 0.01  # type: ignore[operator, union-attr]
    assert (model[2].running_var > 0).all()  # type: ignore[operator, arg-type]


def test_pairs_are_equal_and_apart() -> None:
    for source in (_norms, _norms()):
        original, model = build_pair(source, torch.float64, 1)
        assert {one.dtype for one in model.parameters()} == {torch.float64}
        pairs = zip(original.parameters(), model.parameters(), strict=True)
        assert all(one is not other and torch.equal(one, other) for one, other in pairs)

"""Where gradients flow and where they do not: frozen parameters, unused outputs, values read and returned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from colrow import parallelize
from colrow.plan import derive_plan
from colrow.state import state_of
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.pool import Pool, worker_mesh

WIDTH = 12


class Adapted(nn.Module):
    """Two feed-forward blocks with low-rank adapters on the second: all else is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, 20) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(20, WIDTH) for _ in range(2))
        self.requires_grad_(False)
        self.into = nn.Linear(WIDTH, 3, bias=False)
        self.out = nn.Linear(3, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.one_hot(ids, WIDTH).to(self.into.weight.dtype)
        x = x + self.down[0](self.up[0](x).relu())
        return x + self.down[1]((self.up[1](x) + self.out(self.into(x))).relu())


class Unheard(nn.Module):
    """Two streams of which only one is returned: the other's last block gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 20), nn.ReLU(), nn.Linear(20, WIDTH)) for _ in range(4)
        )
        self.spare = nn.Linear(WIDTH, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        left, right = x + self.blocks[0](x), x + self.blocks[1](x)
        left, right = left + self.blocks[2](right), right + self.blocks[3](left)
        return left


class Scores(nn.Module):
    """Attention between two sequences with one head, cut within it; its weights are used and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.scale = 0.01

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.bmm(self.query(x), self.key(y).transpose(1, 2)).softmax(-1)
        return self.out(torch.bmm(weights, self.value(y))), weights


class Reading(nn.Module):
    """Reads what attention returns besides its result."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.first, self.mixes = Scores(), mixes
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mixed, weights = self.first(x, y)
        return mixed + self.mix(weights @ y) if self.mixes else mixed


class Handing(nn.Module):
    """A block that returns what it was given besides its result."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"mixed": x + self.down(self.up(y).relu()), "given": y}


class Handed(nn.Module):
    """Goes on with what a block has handed back: partly as it is, partly in another block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = Handing(), Handing(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found = self.first(x, self.norm(x))
        return self.second(found["mixed"], found["given"])["mixed"] + found["given"] * 2


class Filling(nn.Module):
    """A block that reads a dictionary and a list of the caller's, and writes into both."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, batch: dict[str, Tensor], hidden: list[Tensor]) -> None:
        batch["mixed"] = self.down(self.up(batch["x"]).relu())
        hidden.append(self.down(self.up(hidden[0]).tanh()))


class Filled(nn.Module):
    """Goes on with what it has given a block, and with what that has written."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Filling(), Filling()

    def forward(self, x: Tensor) -> Tensor:
        batch, hidden = {"x": x * 1.0}, [x * 2.0]
        self.first(batch, hidden)
        result = batch["x"] * 3 + batch["mixed"] + hidden[0] + hidden[1]
        self.second(batch=batch, hidden=hidden)
        return result + batch["x"].sin() + batch["mixed"] + hidden[0].cos() + hidden[2]


class Tapped(nn.Module):
    """Feed-forward layers side by side; what they give is returned in a list, and read by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, 20) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(20, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [down(up(x).relu()).flatten(0, 1) for up, down in zip(self.up, self.down, strict=True)]


class Keeping(nn.Module):
    """Two feed-forward layers whose sum is returned; of one, result and features are kept as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, 20) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(20, WIDTH) for _ in range(2))
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.up[0](x).relu()
        left, right = self.down[0](self.features), self.down[1](self.up[1](x).tanh())
        self.kept = [left, self.features.abs().sum()]
        return x + left + right


class Kept(nn.Module):
    """Reads what another module has kept."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Attending(nn.Module):
    """Attention of a kind between two sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(WIDTH, 20), nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.out(self.query(x).tanh() * self.key(memory).mean(1, keepdim=True).sin())


class BothWays(nn.Module):
    """Gives a module the same argument by position and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.norm = Attending(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.norm(x), self.norm(y)
        return (
            (x + self.attend(x, y)).sum(1)
            + (y + self.attend(y, memory=x)).sum(1)
            + self.attend(x=x, memory=y).sum(1)
        )


class Routed(nn.Module):
    """Experts of which the last two do nothing, in a loop over those that were chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 6, bias=False)
        self.up = nn.Parameter(torch.randn(4, 20, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(4, WIDTH, 20) / 4)
        # which a trace does not know: the first expert gets no token
        self.correction = nn.Buffer(torch.tensor([-9.0, 0, 0, 0, 0, 0]))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = (self.router(x).softmax(-1) + self.correction).topk(2)
        result = torch.zeros_like(x)
        for expert in torch.unique(chosen).tolist():
            token, place = torch.where(chosen == expert)
            mixed = x[token]
            if expert < len(self.up):
                mixed = nn.functional.linear(mixed, self.up[expert]).relu()
                mixed = nn.functional.linear(mixed, self.down[expert])
            result.index_add_(0, token, mixed * weights[token, place, None])
        return result


class Assembled(nn.Module):
    """Heads that are put together in new memory, from a head's own features and some that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5 * 8), nn.Linear(5 * 20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        own = self.up(x).unflatten(-1, (5, 8))
        both = own.new_empty(*own.shape[:-1], 8 + WIDTH)
        both[..., :8] = own
        both[..., 8:] = self.norm(x).sin()[:, :, None]
        return self.down(both.tanh().flatten(2))


def _pair() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 5, WIDTH), "y": torch.randn(2, 7, WIDTH)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "adapters": lambda: (Adapted(), {"ids": torch.randint(WIDTH, (2, 5))}),
    "unheard": lambda: (Unheard(), {"x": torch.randn(2, 5, WIDTH)}),
    "handed-back": lambda: (Handed(), {"x": torch.randn(2, 5, WIDTH)}),
    "filled-by-a-module": lambda: (Filled(), {"x": torch.randn(2, 5, WIDTH)}),
    "tapped": lambda: (nn.Sequential(nn.Linear(WIDTH, WIDTH), Tapped()), {"input": torch.randn(2, 5, WIDTH)}),
    "by-position-and-name": lambda: (BothWays(), _pair()),
    "idle-experts": lambda: (Routed(), {"x": torch.randn(9, WIDTH)}),
    "written-into": lambda: (Assembled(), {"x": torch.randn(2, 7, WIDTH)}),
    "returned": lambda: (Reading(mixes=False), _pair()),
    "returned-and-read": lambda: (Reading(mixes=True), _pair()),
}


def _verified(name: str, ranks: int) -> Report:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    examples = {"evaluation": Example((), inputs)}
    model.eval()
    return verify_on_ranks(model, examples, worker_mesh(ranks))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [2, 3])
def test_gradients_and_predicted_collectives(ranks: Callable[[int], Pool], name: str, size: int) -> None:
    report = ranks(size).run(_verified, name, size, timeout=60)[0]
    report.raise_if_different()
    assert report.share_cut > 0.4
    assert any(check.kind == "collectives" for check in report.checks)


def test_frozen_parameters_are_not_communicated_for() -> None:
    """Only the second block's gradient is needed, and only by the adapters."""
    model, inputs = MODELS["adapters"]()
    plan = derive_plan(model, {"evaluation": Example((), inputs)}, 2)
    assert plan.prediction is not None
    backward = [one for one in plan.prediction.collectives if one.direction == "backward"]
    model.requires_grad_(True)
    plan = derive_plan(model, {"evaluation": Example((), inputs)}, 2)
    assert plan.prediction is not None
    trained = [one for one in plan.prediction.collectives if one.direction == "backward"]
    assert sum(one.count for one in backward) < sum(one.count for one in trained)


def test_what_no_example_uses_is_named() -> None:
    model, inputs = MODELS["unheard"]()
    plan = derive_plan(model, {"evaluation": Example((), inputs)}, 2)
    [note] = [note for note in plan.notes if "no example uses" in note]
    assert note.startswith("spare, with ")


def _kept() -> tuple[float, tuple[str, ...]]:
    torch.manual_seed(0)
    model, x = Kept(Keeping()).double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    cut = parallelize(copy.deepcopy(model), worker_mesh(2), {"x": x})
    values: list[list[Tensor]] = []
    for one in (model, cut):
        inner = one.get_submodule("inner")
        assert isinstance(inner, Keeping)
        loss = one(x).square().sum()
        for each in inner.kept:  # as a training loop does with losses that its layers keep
            loss = loss + each.square().sum()
        loss.backward()
        bias = inner.get_parameter("down.0.bias").grad
        assert bias is not None
        values.append([inner.features.detach(), *(each.detach() for each in inner.kept), bias])
    errors = [float((a - b).abs().max()) for a, b in zip(*values, strict=True)]
    return max(errors), state_of(cut).plan.notes


def test_what_is_kept_is_whole(ranks: Callable[[int], Pool]) -> None:
    error, notes = ranks(2).run(_kept)[0]
    assert error < 1e-12
    assert any("the attribute features of inner would get a part of it" in note for note in notes)


class Enclosing(nn.Module):
    """Leaves the features of a layer in a variable of a function, or in that of a hook's."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.up, self.down, self.hooked = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH), hooked
        store: list[Tensor] = []
        if hooked:
            self.up.register_forward_hook(lambda module, given, result: store.append(result))

    def forward(self, x: Tensor) -> Tensor:
        features = self.up(x)
        if not self.hooked:
            self.again = partial(lambda scale: features * scale, 2)
        return self.down(features.relu())


@pytest.mark.parametrize("hooked", [True, False])
def test_what_functions_enclose_is_whole(hooked: bool) -> None:
    plan = derive_plan(Enclosing(hooked), {"evaluation": Example((torch.randn(2, 5, WIDTH),))}, 2)
    assert "up.bias" not in plan.parameters
    name = "a forward hook of up" if hooked else "the attribute again of the model"
    assert any(f"{name} would get a part of it" in note for note in plan.notes)

"""Programs that need data: the error names the line, the module and the way out."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow.sources import short_path
from colrow.trace import TraceError, trace


def branch(self: Inner, x: Tensor) -> Tensor:
    if (x @ self.weight).sum() > 0:  # branch
        return x
    return -x


def item(self: Inner, x: Tensor) -> Tensor:
    return x * self.weight.max().item()  # item


def positions(self: Inner, x: Tensor) -> Tensor:
    return x[torch.where(self.weight[0] > 0)]  # positions


def mask(self: Inner, x: Tensor) -> Tensor:
    return x[self.weight > 0]  # mask


def listed(self: Inner, x: Tensor) -> Tensor:
    return x * self.weight[0].tolist()[0]  # listed


def array(self: Inner, x: Tensor) -> Tensor:
    return x * float(self.weight.detach().numpy()[0, 0])  # array


def loop(self: Inner, x: Tensor) -> Tensor:
    for _ in range(int(x.sum())):  # loop
        x = x + 1
    return x


class Inner(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Outer(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = Inner(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("function", [branch, item, positions, mask, listed, array, loop])
def test_reads_of_unknown_data(function: Callable[..., Any]) -> None:
    lines = inspect.getsource(sys.modules[__name__]).splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.endswith(f"# {function.__name__}"))
    with pytest.raises(TraceError) as raised:
        trace(Outer(function), (torch.ones(4, 4),))
    assert raised.value.place == f"{short_path(__file__)}:{line} in {function.__name__}"
    assert raised.value.module == "inner"
    assert "torch.where" in raised.value.remedy
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_guessed_routing_is_asked_for_and_noted() -> None:
    record = trace(Outer(positions), (torch.ones(4, 4),), routing="guess")
    assert len(record.warnings) == 1
    assert "guessed what nonzero() or where() finds in a tensor [4]" in record.warnings[0]
    assert record.guessed == {"inner"}
    assert record.outputs[0][1].shape[1:] == (4,)


def test_operators_without_meta_implementation() -> None:
    with torch.library._scoped_library("colrow_test", "FRAGMENT") as library:
        library.define("unknown(Tensor x) -> Tensor")
        library.impl("unknown", lambda x: x.clone(), "CPU")
        with pytest.raises(TraceError, match="colrow_test::unknown has no implementation for meta") as raised:
            trace(Outer(lambda self, x: torch.ops.colrow_test.unknown(x)), (torch.ones(4, 4),))
    assert "register_fake" in raised.value.remedy


def test_distributions_do_not_check_what_is_not_there() -> None:
    def entropy(self: Outer, x: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=x).entropy()

    assert trace(Outer(entropy), (torch.ones(4, 4),)).outputs[0][1].shape == (4,)
    with pytest.raises(ValueError, match="invalid values"):
        torch.distributions.Categorical(logits=torch.full((2,), torch.nan))


def test_generators_of_random_numbers_are_not_copied() -> None:
    model = Outer(lambda self, x: x + torch.rand(x.shape, generator=self.generator))
    model.inner.generator = torch.Generator().manual_seed(3)
    state = model.inner.generator.get_state()
    trace(model, (torch.ones(4, 4),))
    assert torch.equal(model.inner.generator.get_state(), state)


def test_models_that_cannot_be_copied() -> None:
    model = Outer(branch)
    model.handle = (each for each in range(3))
    with pytest.raises(TypeError):
        copy.deepcopy(model)
    with pytest.raises(TraceError, match="cannot be copied to the meta device") as raised:
        trace(model, (torch.ones(4, 4),))
    assert 'torch.device("meta")' in raised.value.remedy.replace("'", '"')


def test_tensors_that_belong_to_nobody_are_noted() -> None:
    hidden = torch.ones(4, device="meta")
    record = trace(Outer(lambda self, x: x + hidden), (torch.ones(4, 4),))
    assert "is no parameter, buffer or attribute" in record.warnings[0]
    known = torch.ones(4)
    record = trace(Outer(lambda self, x: x + known), (torch.ones(4, 4),))
    assert not record.warnings
    (constant,) = [value for value in record.values if value.source.kind == "constant"]
    assert constant.content is not None


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_modules_within_transforms(transform: Callable[..., Any]) -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = transform(self.inner)(x)
            return result

    with pytest.raises(TraceError, match=r"within torch.vmap, torch.func.grad") as raised:
        trace(Mapped(), (torch.ones(4, 4),))
    assert raised.value.module == "inner"
    assert "test_errors.py" in raised.value.place


class Branching(nn.Module):
    """Code that TorchScript takes."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            x = x + 1
        return x


def test_scripted_modules() -> None:
    class Holding(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = torch.jit.script(inner)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x)
            return result

    record = trace(Holding(nn.Linear(4, 4)), (torch.ones(4, 4),))
    assert "inner is scripted" in record.warnings[0]
    for model, path in ((Holding(Branching()), "inner"), (torch.jit.script(nn.Linear(4, 4)), "")):
        with pytest.raises(TraceError, match="is scripted") as raised:
            trace(model, (torch.ones(4, 4),))
        assert raised.value.module == path
        assert "that it was made from" in raised.value.remedy

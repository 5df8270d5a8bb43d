"""What a plan does at modules, by forwards of their own: with hooks, copies, wrappers, torch's layers."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.fx import symbolic_trace
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import colrow
from colrow.apply.values import ModuleTable
from colrow.errors import PlanError
from colrow.forwards import OwnForward
from colrow.plan import ModuleInput, ModuleOutput
from colrow.state import state_of
from colrow.trace import Example
from tests.apply.comparison import assemble, largest_error
from tests.pool import Pool, worker_mesh

WIDTH = 12


class Pair(nn.Module):
    """A layer and a product read its input, and its output is the sum of two that give partial sums."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, 25), nn.Linear(WIDTH, 25)
        self.down, self.side = nn.Linear(25, WIDTH), nn.Linear(25, WIDTH)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        # a product outside of its layer: the input is entered at the border of this module
        hidden = torch.tanh(F.linear(x, self.up.weight, self.up.bias)) * self.gate(x)
        result: Tensor = self.down(hidden) + scale * self.side(hidden)
        return result


class Net(nn.Module):
    """Calls its blocks by position and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.blocks = nn.LayerNorm(WIDTH), nn.ModuleList([Pair(), Pair()])
        self.run: Callable[..., Tensor] = lambda block, *arguments, **names: block(*arguments, **names)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.run(self.blocks[0], self.norm(x))
        return x + self.run(self.blocks[1], x=self.norm(x), scale=0.5)


def _input(rows: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _pair(build: Callable[[], nn.Module] = Net) -> tuple[Any, Any]:
    torch.manual_seed(0)
    original = build().double()
    return original, copy.deepcopy(original)


def _cut(model: Any, size: int) -> Any:
    colrow.parallelize(model, worker_mesh(size), (_input(),))
    if isinstance(model, Net):
        plan = state_of(model).plan
        entered = [place for entry in plan.entries for place in entry.places]
        assert entered == [ModuleInput("blocks.0", (0,)), ModuleInput("blocks.1", ("x",))]
        assert [one.place for one in plan.exits] == [ModuleOutput("blocks.0"), ModuleOutput("blocks.1")]
    return model


def _same(original: nn.Module, cut: nn.Module) -> None:
    """Outputs and all gradients are those of the original."""
    inputs = [_input().requires_grad_() for _ in range(2)]
    outputs = [model(x) for model, x in zip((original, cut), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)
    for model, output in zip((original, cut), outputs, strict=True):
        model.zero_grad()
        output.backward(_input(seed=2))
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-10, atol=1e-10)
    gradients = assemble(cut, {n: p.grad for n, p in cut.named_parameters() if p.grad is not None})
    for name, parameter in original.named_parameters():
        assert parameter.grad is not None
        assert largest_error(gradients[name], parameter.grad) < 1e-10, name


# ---------------------------------------------------------------- callers and copies


def _called(size: int) -> None:
    original, cut = _pair()
    _cut(cut, size)
    for module, other in zip(cut.modules(), original.modules(), strict=True):
        if not isinstance(module, nn.ModuleList | nn.Linear):
            assert inspect.signature(module.forward) == inspect.signature(other.forward)
            assert module.forward.__name__ == "forward"
    assert isinstance(cut.blocks[0].forward, OwnForward)
    assert not cut.blocks[0]._forward_hooks
    assert not cut.blocks[0]._forward_pre_hooks
    _same(original, cut)


def _copied(size: int) -> None:
    original, cut = _pair()
    block = cut.blocks[0]
    block.forward = MethodType(Pair.forward, block)  # as some libraries do
    _cut(cut, size)
    twin = copy.deepcopy(cut)
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.zero_()
    _same(original, twin)
    assert all(parameter.grad is None for parameter in cut.parameters())
    # a copy is made the original again by itself
    colrow.unshard(twin)
    assert twin.blocks[0].forward.__self__ is twin.blocks[0]
    assert "forward" not in vars(twin.blocks[1])
    torch.testing.assert_close(twin(_input()), original(_input()), rtol=1e-10, atol=1e-10)
    assert isinstance(cut.blocks[0].forward, OwnForward)


# ---------------------------------------------------------------- hooks


def _hooks(size: int) -> None:
    """Hooks of others, set before or after, see what they see of the original: values of the whole."""
    original, cut = _pair()
    seen: dict[str, list[Tensor]] = {"original": [], "cut": []}

    def hook(model: Any, name: str, of_gradients: bool) -> None:
        def before(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
            seen[name].append(arguments[0] if arguments else keywords["x"])

        def after(module: nn.Module, arguments: Any, output: Tensor) -> None:
            seen[name].append(output)

        def backward(module: nn.Module, inputs: Any, outputs: Any) -> None:
            seen[name].extend((*inputs, *outputs))

        for block in model.blocks:
            block.register_forward_pre_hook(before, with_kwargs=True)
            block.register_forward_hook(after)
        if of_gradients:
            model.blocks[0].register_full_backward_hook(backward)

    hook(original, "original", False)
    hook(original, "original", True)
    hook(cut, "cut", False)
    _cut(cut, size)
    seen["cut"].clear()
    hook(cut, "cut", True)
    _same(original, cut)
    assert len(seen["cut"]) == len(seen["original"]) == 10
    for found, expected in zip(seen["cut"], seen["original"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- other libraries


def _wrap(module: Any) -> list[str]:
    """As accelerate does: keep the forward in the module, and call it from a partial function."""
    calls: list[str] = []
    module._old_forward = module.forward

    def forward(module: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.append("wrapped")
        return module._old_forward(*arguments, **keywords)

    module.forward = functools.update_wrapper(functools.partial(forward, module), module._old_forward)
    return calls


def _wrap_by_closure(module: nn.Module) -> list[str]:
    calls: list[str] = []
    inner = module.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        calls.append("wrapped")
        return inner(*arguments, **keywords)

    module.forward = forward
    return calls


def _wrap_by_method(module: nn.Module) -> list[str]:
    calls: list[str] = []

    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        calls.append("wrapped")
        return type(self).forward(self, *arguments, **keywords)

    forward.__signature__ = inspect.signature(type(module).forward)  # type: ignore[attr-defined]
    module.forward = MethodType(forward, module)
    return calls


def _wrapped(size: int, wrap: Callable[[nn.Module], list[str]], before: bool) -> None:
    original, cut = _pair()
    if before:
        calls = wrap(cut.blocks[0])
        _cut(cut, size)
    else:
        _cut(cut, size)
        calls = wrap(cut.blocks[0])
    calls.clear()
    wrapper = vars(cut.blocks[0])["forward"]
    _same(original, cut)
    assert len(calls) == 1
    colrow.unshard(cut)
    forward = vars(cut.blocks[0])["forward"]
    assert (forward is not wrapper) == before
    assert not isinstance(forward, OwnForward)
    torch.testing.assert_close(cut(_input()), original(_input()), rtol=1e-10, atol=1e-10)
    assert len(calls) == 2
    if before or wrap is _wrap:
        # cut again, whatever is left in the wrapper does nothing
        _same(original, _cut(cut, size))


def _replaced(size: int) -> None:
    _, cut = _pair()
    _cut(cut, size)
    block = cut.blocks[1]
    block.__dict__["forward"] = Pair.forward.__get__(block)  # as some libraries of kernels do
    with pytest.raises(PlanError, match=r"blocks\.1: its forward has been replaced"):
        cut(_input())


def _refused(size: int) -> None:
    """What cannot be done with a cut model, and says so."""
    _, cut = _pair()
    _cut(cut, size)
    x = _input()
    for transform in (
        lambda: torch.func.vmap(cut)(x[None]),
        lambda: torch.func.grad(lambda value: cut(value).sum())(x),
        lambda: torch.func.jvp(cut, (x,), (x,)),
    ):
        with pytest.raises(PlanError, match=r"a transform of torch\.func .* cannot go through collectives"):
            transform()
    with pytest.raises(PlanError, match=r"torch\.jit\.trace cannot record collectives"):
        torch.jit.trace(cut, x)
    with pytest.raises(TypeError, match=r"cannot be pickled whole.*colrow\.save_pretrained"):
        torch.save(cut, io.BytesIO())
    assert torch.func.functional_call(cut, dict(cut.named_parameters()), (x,)).isfinite().all()


def _checkpointed(size: int) -> None:
    original, cut = _pair()
    _cut(cut, size)
    for reentrant in (False, True):
        cut.run = functools.partial(checkpoint, use_reentrant=reentrant)
        if reentrant:  # which takes no keywords
            cut.run = lambda block, *given, **names: checkpoint(
                block, *given, *names.values(), use_reentrant=True
            )
        _same(original, cut)


def _data_parallel(sharded: bool) -> None:
    """dp x tp over a derived plan, by DDP and by FSDP2; the latter changes the classes of the modules."""
    mesh = worker_mesh(tp=2, dp=2)
    original, model = _pair()
    colrow.parallelize(model, mesh, (_input(),))
    if sharded:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        assert isinstance(model.blocks[0].forward, OwnForward)
    wrapped = model if sharded else DistributedDataParallel(model, process_group=mesh.get_group("dp"))
    replica = mesh.get_local_rank("dp")
    whole, cotangent = _input(4), _input(4, 2)
    mine = slice(2 * replica, 2 * replica + 2)
    expected = original(whole)
    expected.backward(cotangent / 2)
    for _ in range(2):
        model.zero_grad()
        found = wrapped(whole[mine])
        torch.testing.assert_close(found, expected[mine], rtol=1e-10, atol=1e-10)
        found.backward(cotangent[mine])
    layouts, rank = state_of(model).layouts, state_of(model).communicator.rank
    for (name, parameter), reference in zip(model.named_parameters(), original.parameters(), strict=True):
        gradient, whole_gradient = parameter.grad, reference.grad
        assert gradient is not None
        assert whole_gradient is not None
        if sharded:
            gradient = gradient.full_tensor()
        assert largest_error(gradient, layouts[name].slice(whole_gradient, rank)) < 1e-10, name


# ---------------------------------------------------------------- forwards in which calls are changed


class Counted(nn.Module):
    """Four heads, whose number stands in the program's text."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.softmax(self.up(x).view(len(x), 4, 6), -1)
        result: Tensor = self.down(heads.flatten(1))
        return result


def _calls(size: int) -> None:
    """Copied, unsharded and wrapped, as those with changed inputs and outputs are."""
    original, cut = _pair(Counted)
    cut.forward = MethodType(Counted.forward, cut)
    _cut(cut, size)
    assert state_of(cut).plan.integers
    assert isinstance(cut.forward, OwnForward)
    twin = copy.deepcopy(cut)
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.zero_()
    _same(original, twin)
    colrow.unshard(twin)
    assert twin.forward.__self__ is twin
    torch.testing.assert_close(twin(_input()), original(_input()), rtol=1e-10, atol=1e-10)


def _wrapped_calls(size: int) -> None:
    original, cut = _pair(Counted)
    _cut(cut, size)
    calls = _wrap(cut)
    _same(original, cut)
    colrow.unshard(cut)
    torch.testing.assert_close(cut(_input()), original(_input()), rtol=1e-10, atol=1e-10)
    assert len(calls) == 2
    _same(original, _cut(cut, size))
    cut.__dict__["forward"] = Counted.forward.__get__(cut)
    del cut._old_forward
    with pytest.raises(PlanError, match=r"\(the model itself\): its forward has been replaced"):
        cut(_input())


# ---------------------------------------------------------------- modules of other kinds


class Traced(nn.Module):
    """A block that torch.fx has written: its copies leave hooks and forwards behind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.block = nn.LayerNorm(WIDTH), symbolic_trace(Pair())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(self.norm(x))


def _of_fx(size: int) -> None:
    original, cut = _pair(Traced)
    _cut(cut, size)
    assert state_of(cut).plan.entries[0].places[0] == ModuleInput("block", (0,))
    _same(original, copy.deepcopy(cut))
    _same(original, cut)


class Bare(nn.Module):
    """A pair of matrices, without layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(25, WIDTH))
        self.down = nn.Parameter(torch.randn(WIDTH, 25))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up.t()) @ self.down.t()


class Mixed(nn.Module):
    """Calls a module, and then the module's forward past it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(WIDTH, WIDTH), Bare()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.block.forward(self.block(x))


def _mixed(size: int) -> None:
    original, cut = _pair(Mixed)
    _cut(cut, size)
    plan = state_of(cut).plan
    assert "block.up" not in plan.parameters
    assert any("the forward of block is called directly" in note for note in plan.notes)
    assert any("test_forwards.py:" in note for note in plan.notes)
    _same(original, cut)


class Encoder(nn.Module):
    """torch's own transformer layers, which have a fused operator for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


def _fused(size: int, forbid: list[str]) -> None:
    original, cut = _pair(Encoder)
    with torch.no_grad():
        for one, other in zip(original.parameters(), cut.parameters(), strict=True):
            one.add_(torch.randn_like(one) / 8)
            other.copy_(one)
    x = _input(10).view(2, 5, WIDTH)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    examples = {"evaluation": Example((x,)), "padded": Example((x, padding))}
    colrow.parallelize(cut, worker_mesh(size), examples, forbid=forbid)
    assert state_of(cut).plan.parameters
    for training in (True, False):
        original.train(training)
        cut.train(training)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                torch.testing.assert_close(cut(x), original(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cut(x, padding), original(x, padding), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        with pytest.raises(PlanError, match="enable_nested_tensor=False"):
            cut(x, padding)
        for model in (original, cut):
            model.encoder.use_nested_tensor = False
        kept = ~padding
        torch.testing.assert_close(cut(x, padding)[kept], original(x, padding)[kept], rtol=1e-10, atol=1e-10)
    colrow.unshard(cut)
    assert not any(module._forward_pre_hooks for module in cut.modules())


WORK: list[Callable[[int], None]] = [
    _called,
    _copied,
    _hooks,
    functools.partial(_wrapped, wrap=_wrap, before=True),
    functools.partial(_wrapped, wrap=_wrap, before=False),
    functools.partial(_wrapped, wrap=_wrap_by_method, before=True),
    functools.partial(_wrapped, wrap=_wrap_by_closure, before=False),
    _replaced,
    _refused,
    _checkpointed,
    _calls,
    _wrapped_calls,
    _of_fx,
    _mixed,
    functools.partial(_fused, forbid=[]),
    functools.partial(
        _fused, forbid=[f"encoder.layers.{layer}.self_attn.in_proj_weight" for layer in (0, 1)]
    ),
]


@pytest.mark.parametrize("number", range(len(WORK)))
@pytest.mark.parametrize("size", [2, 3])
def test_forwards(ranks: Callable[[int], Pool], number: int, size: int) -> None:
    ranks(size).run(WORK[number], size)


@pytest.mark.parametrize("sharded", [False, True])
def test_data_parallel(ranks: Callable[[int], Pool], sharded: bool) -> None:
    ranks(4).run(_data_parallel, sharded)


# ---------------------------------------------------------------- without ranks


def _negated(value: Tensor) -> Tensor:
    return -value


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, first: Tensor, /, second: Tensor, *rest: Tensor, third: Tensor) -> Tensor:
        return self.factor * (first + 10 * second + 100 * sum(rest) + 1000 * third)


def _changed_inputs(model: nn.ModuleDict) -> nn.ModuleDict:
    table = ModuleTable(model)
    for name in (0, "second", 2, "third"):
        table.at("part").change_input((name,), _negated)
    table.attach()
    return model


def _ones(count: int) -> list[Tensor]:
    return [torch.ones(()) for _ in range(count)]


def test_arguments_by_position_and_by_name() -> None:
    part = _changed_inputs(nn.ModuleDict({"part": Twice()}))["part"]
    first, second, rest, third = _ones(4)
    given = {"third": third}
    assert part(first, second, rest, **given) == -2222
    assert given == {"third": third}
    assert part(first, second, rest, rest, third=third) == -2022
    with pytest.raises(ValueError, match="part is called without argument 2"):
        part(first, second=second, third=third)


def test_pickled() -> None:
    model: Any = _changed_inputs(nn.ModuleDict({"part": Twice()}))
    twin = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        model["part"].factor.zero_()
    first, second, rest, third = _ones(4)
    assert twin["part"](first, second, rest, third=third) == -2222
    forward = pickle.loads(pickle.dumps(model["part"].forward))
    assert forward(first, second, rest, third=third) == 0
    assert inspect.signature(forward) == inspect.signature(Twice().forward)

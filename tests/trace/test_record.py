"""What a trace says of models of our own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from colrow.trace import Example, Trace, trace, trace_all
from colrow.trace.integers import Attribute, Size, TracedInt, evaluate
from colrow.trace.records import FunctionCall, Value
from colrow.trace.tree import map_leaves
from tests.trace import models
from tests.trace.compare import assert_same
from tests.trace.models import Nano, ids


def line_of(mark: str) -> int:
    """The line of models.py with a mark."""
    lines = inspect.getsource(models).splitlines()
    return next(number for number, line in enumerate(lines, 1) if mark in line)


def integers(call: FunctionCall) -> list[TracedInt]:
    found: list[TracedInt] = []
    map_leaves(
        (call.arguments, call.keywords), lambda leaf: isinstance(leaf, TracedInt) and found.append(leaf)
    )
    return found


def named(record: Trace, name: str) -> Value:
    return next(value for value in record.values if value.source.name == name)


class Function(nn.Module):
    """A model that is one function, with a parameter."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.function = function

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.function(self, *arguments, **keywords)


def test_values_operators_and_modules() -> None:
    record = trace(Nano(), (ids(),))
    assert named(record, "ids").content is not None
    assert named(record, "ids").source.kind == "input"
    assert named(record, "blocks.1.attention.triangle").source.kind == "buffer"
    tied = named(record, "tokens.weight")
    assert not any(value.source.name == "head.weight" for value in record.values)
    assert [use.name for use in tied.uses] == ["aten.embedding", "aten.t"]
    assert [use.module.path for use in tied.uses if use.module is not None] == ["tokens", "head"]
    for index, operation in enumerate(record.operations):
        assert operation.index == index
        assert operation.module is not None
        assert operation.module.first <= index < operation.module.last
        assert operation.call is None or operation.call.first <= index < operation.call.last
        assert all(operation in value.uses for value in operation.inputs)
    paths = [call.path for call in record.modules]
    assert paths[:4] == ["", "tokens", "positions", "blocks.0"]
    assert record.modules[0].last == len(record.operations)
    assert [(path, value.shape) for path, value in record.outputs] == [((0,), (2, 7, 40))]
    head = next(call for call in record.modules if call.path == "head")
    assert [path for path, _ in head.inputs + head.outputs] == [(0,), ()]
    assert head.outputs[0][1] is record.outputs[0][1]
    positions = next(o for o in record.operations if o.name == "aten.arange").outputs[0]
    assert positions.content is not None
    assert positions.content.tolist() == list(range(7))


def test_integers_evaluate_to_what_they_were_given_as() -> None:
    record = trace(Nano(), (ids(),))
    views = [
        call for call in record.calls if call.name == "view" and call.module.path == "blocks.1.attention"
    ]
    assert len(views) == 4
    assert views[0].site.line == line_of("k = k.view")
    batch, length, heads, width = integers(views[0])
    assert heads.expression == Attribute("blocks.1.attention", "heads", 3)
    assert isinstance(batch.expression, Size)
    assert record.values[batch.expression.value_index].shape == (2, 7, 24)
    # with 6 heads and a width of 48
    number = evaluate(width.expression, lambda origin: 6 if isinstance(origin, Attribute) else 48)
    assert (length, width, number) == (7, 8, 8)
    for call in record.calls:
        for integer in integers(call):
            assert evaluate(integer.expression, lambda origin: origin.value) == integer


def test_call_sites_do_not_depend_on_how_often_they_ran() -> None:
    model = Nano(layers=1)
    first = trace(model, (ids(),))
    for _ in range(20):
        assert_same(trace(model, (ids(),)), first)


def test_sites_inside_torch_have_an_origin_outside() -> None:
    record = trace(Nano(), (ids(),))
    linear = next(call for call in record.calls if call.name == "linear")
    assert linear.site.file.endswith("linear.py")
    assert linear.origin.file == models.__file__
    assert linear.origin.line == line_of("q, k, v = self.fused")


def test_occurrences_count_passes_of_one_place() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x @ self.weight
        return x

    record = trace(Function(forward), (torch.randn(2, 4),))
    assert [call.occurrence for call in record.calls] == [0, 1, 2]
    assert len({call.site for call in record.calls}) == 1


def test_escapes_name_the_line() -> None:
    record = trace(Nano(layers=2), (ids(),))
    assert [(each.use, each.site.line) for each in record.escapes] == [("float()", line_of("# ESCAPE"))] * 2
    assert record.escapes[1].module is not None
    assert record.escapes[1].module.path == "blocks.1.attention"


@pytest.mark.parametrize(
    ("use", "function"),
    [
        ("aten.div", lambda self, x: x / x.size(1)),
        ("aten.mul", lambda self, x: x.size(1) * x),
        ("aten.eq", lambda self, x: x == x.shape[-1]),
        ("aten.full", lambda self, x: torch.full((2,), x.shape[-1])),
        ("torch.tensor", lambda self, x: x * torch.tensor(x.shape[-1])),
        ("torch.tensor", lambda self, x: x.new_tensor([x.shape[-1]]) * x),
        ("/", lambda self, x: x * (1 / x.numel())),
        ("**", lambda self, x: x * x.shape[1] ** -0.5),
    ],
)
def test_numeric_uses_of_sizes_are_escapes(use: str, function: Callable[..., Any]) -> None:
    record = trace(Function(function), (torch.randn(3, 4),))
    assert [each.use for each in record.escapes] == [use]


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x.view(x.size(1), -1),
        lambda self, x: torch.arange(x.size(1)) + x,
        lambda self, x: x[:, : x.shape[1] // 2],
        lambda self, x: F.one_hot(torch.arange(2), num_classes=x.size(1)),
        lambda self, x: x.new_zeros(x.shape[0], x.shape[1] * 2),
        lambda self, x: x.expand(x.shape[1], *x.shape),
    ],
)
def test_extents_are_no_escapes(function: Callable[..., Any]) -> None:
    assert not trace(Function(function), (torch.randn(3, 4),)).escapes


def test_known_content_follows_constants_and_integer_inputs() -> None:
    def forward(self: Function, ids: Tensor, mask: Tensor) -> Tensor:
        if mask.all():
            ids = ids * 2
        table = torch.tensor([3, 1, 2], device=ids.device)
        positions = table[[2, 0]].tolist()
        count = int(mask.sum())
        chosen = ids[mask.bool()]
        rows = torch.nonzero(ids > 4)
        mask[0] = 0
        assert not mask.all()
        assert rows.numpy().shape[1] == 2
        return self.weight[positions].sum() + count + chosen.sum()

    numbers = torch.tensor([[1, 2, 3], [4, 5, 6]])
    mask = torch.ones(2, 3, dtype=torch.long)
    record = trace(Function(forward), (numbers, mask))
    doubled = next(o for o in record.operations if o.name == "aten.mul").outputs[0]
    assert doubled.content is not None
    assert doubled.content.tolist() == [[2, 4, 6], [8, 10, 12]]
    chosen = next(o for o in record.operations if o.name == "aten.index" and o.outputs[0].shape == (6,))
    assert chosen.outputs[0].content is not None
    assert mask.all()
    assert numbers.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_content_is_forgotten_when_overwritten_with_unknown_data() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        board = torch.zeros(4, 4)
        row = board[1]
        board += x @ self.weight
        return row + torch.rand(4)

    record = trace(Function(forward), (torch.randn(4, 4),))
    board = next(o for o in record.operations if o.name == "aten.zeros").outputs[0]
    row = next(o for o in record.operations if o.name == "aten.select").outputs[0]
    added = next(o for o in record.operations if o.name == "aten.add_")
    assert board.content is None
    assert row.content is None
    assert added.outputs == (board,)
    assert row.storage == board.storage
    assert row.producer is not None
    assert next(o for o in record.operations if o.name == "aten.rand").outputs[0].content is None


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.sin().cos()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def test_gradients_follow_no_grad_detach_and_custom_functions() -> None:
    def forward(self: Function, x: Tensor, ids: Tensor) -> Tensor:
        with torch.no_grad():
            scale = (self.weight * 3).tanh()
        detached = (x * 5).detach()
        y = Twice.apply(x @ self.weight)
        return y * scale + detached.exp() + self.frozen.sigmoid() + ids.float()

    model = Function(forward)
    model.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    record = trace(model, (torch.randn(4, 4), torch.ones(4, 4, dtype=torch.long)))
    flags = {o.name.removeprefix("aten."): o.outputs[0].differentiable for o in record.operations}
    for name in ("mm", "sin", "cos", "add"):
        assert flags[name], name
    for name in ("tanh", "detach", "exp", "sigmoid", "_to_copy"):
        assert not flags[name], name
    assert named(record, "weight").differentiable
    assert not named(record, "frozen").differentiable
    assert named(record, "0").differentiable


def test_what_is_written_into_a_constant_carries_its_gradient() -> None:
    def function(self: Function, x: Tensor) -> Tensor:
        y = x @ self.weight
        best, places = y.topk(2)
        scattered = torch.full_like(y, -1.0).scatter_(1, places, best)
        added, sliced = torch.zeros_like(y), torch.zeros_like(y)
        added.add_(y)
        sliced[:, :2] = y[:, :2]
        return scattered + added + sliced + torch.zeros_like(y)

    record = trace(Function(function), (torch.randn(3, 4),))
    made = [one for one in record.operations if one.name in ("aten.full_like", "aten.zeros_like")]
    assert [one.outputs[0].differentiable for one in made] == [True, True, True, False]


def test_nothing_is_left_behind() -> None:
    class Failing(Nano):
        def forward(self, ids: Tensor, labels: Tensor | None = None, fail: bool = False) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            self.register_buffer("cache", torch.ones(3))
            self.settings["heads"] += 1
            self.sizes.append(7)
            result = super().forward(ids, labels)
            if fail:
                raise RuntimeError("on purpose")
            return result

    with torch.device("meta"):
        model = Failing()
    model.settings = {"heads": 12}
    model.sizes = [3, 4]
    model.train()
    call, log = nn.Module.__call__, math.log
    fast = torch.backends.mha.get_fastpath_enabled()
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    trace(model, (ids(),))
    with pytest.raises(RuntimeError, match="on purpose") as raised:
        trace(model, (ids(),), {"fail": True}, mode="training")
    assert "while colrow recorded" in raised.value.__notes__[0]
    for path, module in model.named_modules():
        assert vars(module) == before[path]
        assert all(type(item) is not TracedInt for item in vars(module).values())
    assert model.settings == {"heads": 12}
    assert type(model.settings["heads"]) is int
    assert model.sizes == [3, 4]
    assert all(type(size) is int for size in model.sizes)
    assert list(model.buffers()) == [block.attention.triangle for block in model.blocks]
    assert nn.Module.__call__ is call
    assert math.log is log
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.overrides._get_current_function_mode_stack() == []
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert torch.ones(2).tolist() == [1, 1]


def test_a_real_model_is_not_touched_and_its_copy_holds_no_data() -> None:
    torch.manual_seed(0)
    model = Nano()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    record = trace(model, (ids(),), {"labels": ids()}, mode="training")
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.data_ptr() == pointers[name]
    assert model.head.weight is model.tokens.weight
    with torch.device("meta"):
        meta = Nano()
    meta.head.weight = meta.tokens.weight
    assert_same(record, trace(meta, (ids(),), {"labels": ids()}, mode="training"))


def test_detached_results() -> None:
    def forward(self: Function, x: Tensor) -> tuple[Tensor, ...]:
        y = x @ self.weight
        return y.detach(), y[1:].detach(), x.data, y.softmax(-1)

    record = trace(Function(forward), (torch.randn(4, 4),))
    assert not record.warnings
    assert [o.name for o in record.operations].count("aten.detach") == 3
    assert record.modules[0].last == len(record.operations)
    assert [value.differentiable for _, value in record.outputs] == [False, False, False, True]
    assert record.outputs[0][1].storage == record.operations[0].outputs[0].storage


def test_compiled_and_checkpointed_parts_are_recorded_as_written() -> None:
    class Checkpointed(Nano):
        def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
            x = self.tokens(ids)
            for index, block in enumerate(self.blocks):
                x = block(x) if self.plain else checkpoint(block, x, use_reentrant=bool(index % 2))
            return self.head(x), None

    model = Checkpointed(layers=2)
    model.plain = True
    plain = trace(model, (ids(),), copy_layers=False)
    model.plain = False
    record = trace(model, (ids(),))
    expected = [operation.name for operation in plain.operations]
    assert [operation.name for operation in record.operations] == expected
    for one, other in zip(record.operations, plain.operations, strict=True):
        assert [v.differentiable for v in one.outputs] == [v.differentiable for v in other.outputs], one
    model.blocks[1].compile()
    model.head = torch.compile(model.head)
    assert [o.name for o in trace(model, (ids(),)).operations] == expected


def test_modes() -> None:
    class Dropping(Nano):
        def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
            logits, loss = super().forward(ids, labels)
            return F.dropout(logits, 0.1, self.training), loss

    examples = {"training": Example((ids(),), {"labels": ids()}), "evaluation": Example((ids(),))}
    records = trace_all(Dropping(), examples)
    names = {mode: {o.name for o in record.operations} for mode, record in records.items()}
    assert "aten.nll_loss_forward" in names["training"]
    assert "aten.bernoulli_" in names["training"]
    assert not names["evaluation"] & {"aten.nll_loss_forward", "aten.bernoulli_"}
    assert [path for path, _ in records["training"].outputs] == [(0,), (1,)]


def test_attention_module_is_seen_call_by_call() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    record = trace(Encoder(), (torch.randn(2, 5, 16),))
    first = [call for call in record.calls if call.module.path == "layers.layers.0.self_attn"]
    assert {"linear", "view", "scaled_dot_product_attention"} <= {call.name for call in first}
    heads = [
        integer
        for call in first
        for integer in integers(call)
        if integer.expression == Attribute("layers.layers.0.self_attn", "num_heads", 4)
    ]
    assert heads
    assert all(call.origin.file == __file__ for call in first)
    assert not any("_transformer_encoder_layer_fwd" in o.name for o in record.operations)
    assert any(call.copy_of is not None for call in record.modules)


def test_printed() -> None:
    text = str(trace(Nano(), (ids(),)))
    assert text.startswith("Trace (evaluation): ")
    assert "blocks.1: Block, as blocks.0, " in text
    assert "%0[40, 24] tokens.weight" in text
    assert f"[models.py:{line_of('k = k.view')}]" in text
    assert "3:blocks.0.attention.heads" in text
    assert "escape: float() of " in text


def test_shapes_changed_in_place_are_new_values() -> None:
    def function(self: Function, x: Tensor) -> Tensor:
        y = x * self.weight[0]
        y.unsqueeze_(1).transpose_(0, 2)
        known = torch.arange(4)
        known.unsqueeze_(1)
        return y + known[:, :, None]

    record = trace(Function(function), (torch.ones(3, 4),))
    (product,) = (operation for operation in record.operations if operation.name == "aten.mul")
    (value,) = product.outputs
    reshaped = [operation for operation in record.operations if operation.name.endswith("_")]
    assert [operation.outputs[0].shape for operation in reshaped] == [(3, 1, 4), (4, 1, 3), (4, 1)]
    assert reshaped[1].inputs == reshaped[0].outputs
    assert [operation.arguments[0] for operation in reshaped] == [
        operation.inputs[0] for operation in reshaped
    ]
    assert value.shape == (3, 4)
    assert {operation.outputs[0].storage for operation in reshaped[:2]} == {value.storage}
    assert reshaped[2].outputs[0].content is not None
    assert reshaped[2].outputs[0].content.shape == (4, 1)
    assert record.outputs[0][1].shape == (4, 1, 3)


def test_functions_of_single_elements_are_recorded_on_all_at_once() -> None:
    def function(self: Function, x: Tensor) -> Tensor:
        mask = torch.vmap(
            lambda q: torch.vmap(lambda k: (q >= k) & q.new_ones((), dtype=torch.bool))(columns)
        )
        columns = torch.arange(4)
        return x @ self.weight.masked_fill(~mask(torch.arange(4)), 0)

    record = trace(Function(function), (torch.ones(3, 4),))
    (compared,) = (operation for operation in record.operations if operation.name == "aten.ge")
    assert compared.outputs[0].shape == (4, 4)

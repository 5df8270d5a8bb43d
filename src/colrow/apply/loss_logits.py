"""Logits that are cut over the vocabulary, between the layer that computes them and the model's loss.

:class:`LocalLogits` holds this rank's ids and knows which dimension is the vocabulary. To the model it
is like the whole: its shape is that of all ids, and sizes that the model gives (``view(-1, vocab_size)``) are
those of the whole. Each function that is allowed follows the vocabulary's dimension by the shapes of the
whole, which all ranks have in common, so that all ranks decide alike. What would mix the vocabulary is an
error that names the function, because on a shard it would give wrong numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from colrow.collectives import AllGather, Communicator, Enter, Slice
from colrow.errors import PlanError
from colrow.layers import cross_entropy
from colrow.layout import Cut

# the same elements in the same shape; only the first argument's elements are taken
_SAME = {
    "contiguous", "clone", "detach", "to", "cpu", "cuda", "type", "type_as", "float", "double", "half",
    "bfloat16", "data", "real",
}  # fmt: skip
# the same elements in the same order, in a shape that arguments may give
_SHAPES = {
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel",
}  # fmt: skip
_EXPANSIONS = {"expand", "expand_as", "broadcast_to"}
# some of the elements, or in another order of dimensions
_MOVES = {
    "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "T", "mT", "H", "mH",
    "adjoint", "__getitem__", "narrow", "split", "chunk", "unbind", "select", "index_select",
}  # fmt: skip
# functions of each element alone
_ELEMENTWISE = {
    "add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub", "mul", "__mul__", "__rmul__", "div",
    "true_divide", "__truediv__", "__rtruediv__", "__rdiv__", "neg", "__neg__", "tanh", "clamp",
    "masked_fill",
}  # fmt: skip
_IN_PLACE = {
    "add_", "__iadd__", "sub_", "__isub__", "mul_", "__imul__", "div_", "__idiv__", "__itruediv__", "neg_",
    "tanh_", "clamp_", "masked_fill_",
}  # fmt: skip
_SIZES = {"shape", "size", "numel", "nelement", "__len__", "nbytes"}
_QUERIES = {
    "dim", "ndimension", "stride", "is_contiguous", "is_floating_point", "is_complex", "get_device",
    "requires_grad_", "element_size", "data_ptr", "storage_offset", "__hash__", "__repr__", "__format__",
    "register_hook", "retain_grad",
    "is_same_size", "backward",  # by activation checkpointing, with gradients of this rank's part
}  # fmt: skip


@dataclass
class Vocabulary:
    """What the logits of one forward have in common.

    Attributes:
        ranks: the group over which the vocabulary is cut.
        cut: its ids on each rank.
        label: names errors and collectives.
        computed: whether a loss has been computed from logits.
    """

    ranks: Communicator
    cut: Cut
    label: str
    computed: bool = False

    def error(self, cause: str) -> PlanError:
        """A :class:`PlanError` that names the logits."""
        return PlanError(
            self.label,
            cause,
            "Leave the logits layer out of the plan, or compute the loss outside of the model.",
        )


class LocalLogits(Tensor):
    """This rank's ids of logits that look whole.

    Functions that it does not know, or that would need the other ranks' ids, raise :class:`PlanError`.
    """

    vocabulary: Vocabulary
    dimension: int
    # they stand for their log-softmax, which only a loss can be computed from without the other ranks
    normalised: bool = False

    @staticmethod
    def of(local: Tensor, vocabulary: Vocabulary, dimension: int) -> LocalLogits:
        """``local``, [..., this rank's ids, ...], whose ``dimension`` is the vocabulary."""
        logits: LocalLogits = local.as_subclass(LocalLogits)
        logits.vocabulary, logits.dimension = vocabulary, dimension
        return logits

    @property
    def plain(self) -> Tensor:
        """This rank's part as an ordinary tensor, through which gradients flow."""
        with torch._C.DisableTorchFunctionSubclass():
            local: Tensor = self.as_subclass(Tensor)
            return local

    def gather_on(self, label: str) -> AllGather:
        """The collective that makes :attr:`plain` whole on every rank."""
        return AllGather(self.vocabulary.ranks, label, self.dimension, self.vocabulary.cut.counts, "I")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(function, args, kwargs or {})


@dataclass(frozen=True)
class _Call:
    """One function that the model calls with logits among its arguments."""

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    logits: tuple[LocalLogits, ...]

    @property
    def vocabulary(self) -> Vocabulary:
        return self.logits[0].vocabulary

    @property
    def size(self) -> int:
        """Ids over all ranks."""
        return self.vocabulary.cut.units

    @property
    def operand(self) -> object:
        return self.args[0] if self.args else self.kwargs.get("input", self.kwargs.get("self"))

    def run(self, change: Callable[[Any], Any]) -> Any:
        """The function's result with each argument changed."""
        args, kwargs = tree_map(change, (self.args, self.kwargs))
        return self.function(*args, **kwargs)

    def refused(self) -> PlanError:
        return self.vocabulary.error(
            f"between its logits and its loss the model calls {self.name}, which would see this rank's part "
            "of the vocabulary only"
        )

    def cuts(self, shape: torch.Size | None) -> PlanError:
        result = "its result has" if shape is None else f"{list(shape)} has"
        return self.vocabulary.error(
            f"{self.name} cuts the vocabulary of the logits: {result} no dimension of all {self.size} ids"
        )


def _call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(function, "__name__", str(function))
    getter = name == "__get__"
    if getter:
        name = function.__self__.__name__
    found = tuple(one for one in tree_leaves((args, kwargs)) if isinstance(one, LocalLogits))
    call = _Call(function, name, args, kwargs, found)
    if function is F.cross_entropy:
        return _loss(call, *args, **kwargs)
    if function is F.nll_loss:
        return _likelihood(call, *args, **kwargs)
    if name == "log_softmax":
        return _log_softmax(call)
    if kwargs.get("out") is not None:
        raise call.refused()
    normalised = any(one.normalised for one in found)
    if normalised and name in _ELEMENTWISE | _IN_PLACE:
        raise call.refused()
    for names, rule in _RULES:
        if name in names:
            return tree_map(_as_normalised, rule(call)) if normalised else rule(call)
    if getter:  # device, dtype, requires_grad and the like
        value = function(*args)
        if not isinstance(value, Tensor):
            return value
    raise call.refused()


def _as_normalised(value: Any) -> Any:
    if isinstance(value, LocalLogits):
        value.normalised = True
    return value


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, LocalLogits) else value


def _shape(value: Tensor, size: int) -> tuple[int, ...]:
    """The shape of logits if there were ``size`` ids; of other tensors as it is."""
    shape = list(value.shape)
    if isinstance(value, LocalLogits):
        shape[value.dimension] = size
    return tuple(shape)


def _twin(size: int) -> Callable[[Any], Any]:
    """Replaces logits by tensors without memory that have ``size`` ids."""

    def twin(value: Any) -> Any:
        if isinstance(value, LocalLogits):
            return torch.empty(_shape(value, size), dtype=value.dtype, device="meta")
        if isinstance(value, Tensor):
            # how many elements a mask selects depends on its values; all else on shapes only
            return value.cpu() if value.dtype in (torch.bool, torch.uint8) else value.to("meta")
        return value

    return twin


def _query(call: _Call) -> Any:
    return call.run(lambda value: value)


def _sizes(call: _Call) -> Any:
    return call.run(_twin(call.size))


def _same(call: _Call) -> Any:
    result = call.run(_plain)
    if isinstance(call.operand, LocalLogits) and isinstance(result, Tensor):
        return LocalLogits.of(result, call.vocabulary, call.operand.dimension)
    return result  # another tensor was given the type or device of logits


def _reshape(call: _Call) -> Any:
    with torch.no_grad():
        whole = call.run(_twin(call.size)) if isinstance(call.operand, LocalLogits) else None
    if whole is None:  # another tensor gets the shape of logits
        return call.run(lambda value: _twin(call.size)(value) if isinstance(value, LocalLogits) else value)
    operand = call.operand
    assert isinstance(operand, LocalLogits)
    if whole.dtype != operand.dtype:  # view(dtype) gives other elements
        raise call.refused()
    if call.name in _EXPANSIONS:
        found = [whole.dim() - operand.dim() + operand.dimension]
    else:
        inner = math.prod(operand.shape[operand.dimension + 1 :])
        found = [
            dimension
            for dimension in reversed(range(whole.dim()))
            if whole.shape[dimension] == call.size and math.prod(whole.shape[dimension + 1 :]) == inner
        ]
    if not found or whole.shape[found[0]] != call.size:
        raise call.cuts(whole.shape)
    shape = list(whole.shape)
    shape[found[0]] = operand.plain.shape[operand.dimension]
    if call.name in _EXPANSIONS:
        result = operand.plain.expand(shape)
    else:
        # view must fail where it would for the whole: where memory would have to be copied
        result = operand.plain.view(shape) if call.name.startswith("view") else operand.plain.reshape(shape)
    return LocalLogits.of(result, call.vocabulary, found[0])


def _move(call: _Call) -> Any:
    """Follow the vocabulary by shapes alone: it is the dimension that has one id less if the whole has."""
    if not isinstance(call.operand, LocalLogits) or len(call.logits) > 1:
        raise call.refused()
    with torch.no_grad():
        whole = tree_leaves(call.run(_twin(call.size)))
        try:
            smaller = tree_leaves(call.run(_twin(call.size - 1)))
        except Exception as error:  # whatever it is, it came with the number of ids
            raise call.cuts(None) from error
    dimensions = []
    for one, less in zip(whole, smaller, strict=False):
        differing = [d for d, (a, b) in enumerate(zip(one.shape, less.shape, strict=False)) if a != b]
        if len(differing) != 1 or one.dim() != less.dim() or one.shape[differing[0]] != call.size:
            raise call.cuts(one.shape)
        dimensions.append(differing[0])
    if len(whole) != len(smaller):
        raise call.cuts(None)
    parts, structure = tree_flatten(call.run(_plain))
    tracked = [LocalLogits.of(part, call.vocabulary, d) for part, d in zip(parts, dimensions, strict=True)]
    return tree_unflatten(tracked, structure)


def _elementwise(call: _Call) -> Any:
    tensors = [one for one in tree_leaves((call.args, call.kwargs)) if isinstance(one, Tensor)]
    shapes = [_shape(one, call.size) for one in tensors]
    shape = torch.broadcast_shapes(*shapes)  # raises for the whole, on all ranks, what it would raise
    # dimensions are counted from the last, where broadcasting aligns them
    from_last = call.logits[0].dim() - call.logits[0].dimension
    if any(one.dim() - one.dimension != from_last for one in call.logits):
        raise call.refused()
    in_place = call.name in _IN_PLACE
    if in_place and not isinstance(call.operand, LocalLogits):
        raise call.refused()

    ranks, label = call.vocabulary.ranks, f"{call.vocabulary.label} {call.name}"

    def local(value: Any) -> Any:
        if isinstance(value, LocalLogits):
            return value if in_place and value is call.operand else value.plain
        if isinstance(value, Tensor) and value.dim() >= from_last and value.shape[-from_last] != 1:
            cut = call.vocabulary.cut  # one value for each id
            return Slice(ranks, label, value.dim() - from_last, cut.counts, "I")(value)
        # one value for all ids: each rank finds the gradient that comes from its own
        return Enter(ranks, label)(value) if isinstance(value, Tensor) else value

    result = call.run(local)
    return result if in_place else LocalLogits.of(result, call.vocabulary, len(shape) - from_last)


_RULES: tuple[tuple[set[str], Callable[[_Call], Any]], ...] = (
    (_QUERIES, _query),
    (_SIZES, _sizes),
    (_SAME, _same),
    (_SHAPES | _EXPANSIONS, _reshape),
    (_MOVES, _move),
    (_ELEMENTWISE | _IN_PLACE, _elementwise),
)


def _log_softmax(call: _Call) -> Any:
    """The logits again, to be normalised by the loss: it needs their sum over all ranks anyway."""
    logits = call.operand
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    if not isinstance(logits, LocalLogits) or not isinstance(given, int):
        raise call.refused()
    if given % logits.dim() != logits.dimension:
        raise call.refused()
    dtype = next(
        (one for one in (*call.args[2:], call.kwargs.get("dtype")) if isinstance(one, torch.dtype)), None
    )
    result = logits.plain if dtype is None else logits.plain.to(dtype)
    # another tensor object: the logits themselves may go into the model's output
    return _as_normalised(LocalLogits.of(result.view_as(result), call.vocabulary, logits.dimension))


def _likelihood(
    call: _Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: object = None,
    ignore_index: int = -100,
    reduce: object = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """``F.nll_loss``, of logits that stand for their log-softmax."""
    if not isinstance(input, LocalLogits) or not input.normalised:
        raise call.vocabulary.error("the model calls nll_loss on what is no log_softmax of its logits")
    return _loss(call, input, target, weight, size_average, ignore_index, reduce, reduction)


def _loss(
    call: _Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: object = None,
    ignore_index: int = -100,
    reduce: object = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy``."""
    vocabulary = call.vocabulary
    if size_average is not None or reduce is not None:
        raise PlanError(vocabulary.label, "size_average and reduce are deprecated", "Use reduction.")
    # F.cross_entropy takes [classes], [tokens, classes] or [tokens, classes, ...]
    classes = 1 if input.dim() > 1 else 0
    if not isinstance(input, LocalLogits) or len(call.logits) > 1 or input.dimension != classes:
        raise vocabulary.error("the model calls cross_entropy with classes that are not the vocabulary")
    vocabulary.computed = True
    return cross_entropy(
        input.plain.movedim(classes, -1),
        target,
        vocabulary.ranks,
        vocabulary=vocabulary.cut,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        label=vocabulary.label,
    )

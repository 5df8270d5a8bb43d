"""What functions of torch give when the model calls them with logits that are cut over the vocabulary.

Each function that is allowed follows the vocabulary's dimension by the shapes of the whole, which all ranks
have in common, so that all ranks decide alike. What would mix the vocabulary is an error that names the
function, because on a shard it would give wrong numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from colrow.apply.loss_followed import (
    SHAPES,
    Rule,
    followed_cast,
    followed_change,
    followed_part,
    followed_same,
    rows_of_loss,
)
from colrow.apply.loss_tensor import Call, LocalLogits
from colrow.apply.nesting import leaves, mapped
from colrow.collectives import Enter, Slice
from colrow.errors import PlanError
from colrow.layers import cross_entropy

# the same elements in the same shape; only the first argument's elements are taken
_SAME = {
    "contiguous", "clone", "detach", "to", "cpu", "cuda", "type", "type_as", "float", "double", "half",
    "bfloat16", "data", "real",
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
# what is asked of the tensor itself, whether it has numbers or not
_QUERIES = {
    "dim", "ndimension", "is_floating_point", "is_complex", "get_device", "element_size", "__hash__",
    "is_same_size",  # by activation checkpointing
}  # fmt: skip
# what is asked of its memory, its numbers or their gradients
_OF_NUMBERS = {
    "stride", "is_contiguous", "requires_grad_", "data_ptr", "storage_offset", "__repr__", "__format__",
    "register_hook", "retain_grad",
    "backward",  # by activation checkpointing, with gradients of this rank's part
}  # fmt: skip


def answer(call: Call) -> Any:
    """The result of a function that is called with logits.

    Raises:
        PlanError: if the function would need the other ranks' ids, or is not known.
    """
    if call.function is F.cross_entropy:
        return _loss(call, *call.args, **call.kwargs)
    if call.function is F.nll_loss:
        return _likelihood(call, *call.args, **call.kwargs)
    if call.name == "log_softmax":
        return _log_softmax(call)
    if call.kwargs.get("out") is not None:
        raise call.refused()
    normalised = any(one.normalised for one in call.logits)
    if normalised and call.name in _ELEMENTWISE | _IN_PLACE:
        raise call.refused()
    for names, rule, follow in _RULES:
        if call.name in names:
            result = follow(call, rule) if follow is not None else None
            if result is None:  # numbers are needed
                result = rule(call)
            return mapped(_as_normalised, result) if normalised else result
    if call.is_getter:  # device, dtype, requires_grad and the like
        value = call.run(_as_is)
        if not isinstance(value, Tensor):
            return value
        if call.name == "_base":  # FSDP asks whether it is a view, not of what
            return value.to("meta")
    raise call.refused()


def _as_normalised(value: Any) -> Any:
    if isinstance(value, LocalLogits):
        value.normalised = True
    return value


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, LocalLogits) else value


def _with_numbers(value: Any) -> Any:
    """Logits as they are; late ones with their numbers."""
    is_late = isinstance(value, LocalLogits) and value.late is not None
    return value.plain if is_late else value


def _as_is(value: Any) -> Any:
    """Logits as they are; those whose numbers came later with these."""
    has_numbers = isinstance(value, LocalLogits) and value.late is not None and value.late.is_there
    return value.plain if has_numbers else value


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


def _query(call: Call) -> Any:
    return call.run(_with_numbers if call.name in _OF_NUMBERS else _as_is)


def _sizes(call: Call) -> Any:
    return call.run(_twin(call.size))


def _same(call: Call) -> Any:
    result = call.run(_plain)
    if isinstance(call.operand, LocalLogits) and isinstance(result, Tensor):
        return LocalLogits.of(result, call.vocabulary, call.operand.dimension)
    return result  # another tensor was given the type or device of logits


def _reshape(call: Call) -> Any:
    operand = call.operand
    if not isinstance(operand, LocalLogits):  # another tensor gets the shape of logits
        return call.run(lambda value: _twin(call.size)(value) if isinstance(value, LocalLogits) else value)
    whole = _asked_shape(call, operand)
    if whole is None:
        with torch.no_grad():
            twin = call.run(_twin(call.size))
        if twin.dtype != operand.dtype:  # view(dtype) gives other elements
            raise call.refused()
        whole = tuple(twin.shape)
    if call.name in _EXPANSIONS:
        found = [len(whole) - operand.dim() + operand.dimension]
    else:
        inner = math.prod(operand.shape[operand.dimension + 1 :])
        found = [
            dimension
            for dimension in reversed(range(len(whole)))
            if whole[dimension] == call.size and math.prod(whole[dimension + 1 :]) == inner
        ]
    if not found or whole[found[0]] != call.size:
        raise call.cuts(whole)
    shape = list(whole)
    shape[found[0]] = operand.plain.shape[operand.dimension]
    if call.name in _EXPANSIONS:
        result = operand.plain.expand(shape)
    else:
        # view must fail where it would for the whole: where memory would have to be copied
        result = operand.plain.view(shape) if call.name.startswith("view") else operand.plain.reshape(shape)
    return LocalLogits.of(result, call.vocabulary, found[0])


def _asked_shape(call: Call, operand: LocalLogits) -> tuple[int, ...] | None:
    """The shape of all ids that ``view`` or ``reshape`` is given in numbers; ``None``: torch must find it."""
    sizes = call.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    if call.name not in ("view", "reshape") or call.kwargs or not all(type(one) is int for one in sizes):
        return None
    elements = math.prod(_shape(operand, call.size))
    if sizes.count(-1) == 1:
        others = -math.prod(sizes)
        if others > 0 and elements % others == 0:
            sizes = tuple(elements // others if one == -1 else one for one in sizes)
    # what does not fit is for torch to refuse
    return sizes if all(one >= 0 for one in sizes) and math.prod(sizes) == elements else None


def _move(call: Call) -> Any:
    """Follow the vocabulary by shapes alone: it is the dimension that has one id less if the whole has."""
    if not isinstance(call.operand, LocalLogits) or len(call.logits) > 1:
        raise call.refused()
    with torch.no_grad():
        whole = leaves(call.run(_twin(call.size)))
        try:
            smaller = leaves(call.run(_twin(call.size - 1)))
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


def _elementwise(call: Call) -> Any:
    tensors = [one for one in leaves((call.args, call.kwargs)) if isinstance(one, Tensor)]
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
            return value if in_place and value.late is None and value is call.operand else value.plain
        if isinstance(value, Tensor) and value.dim() >= from_last and value.shape[-from_last] != 1:
            cut = call.vocabulary.cut  # one value for each id
            return Slice(ranks, label, value.dim() - from_last, cut.counts, "I")(value)
        # one value for all ids: each rank finds the gradient that comes from its own
        return Enter(ranks, label)(value) if isinstance(value, Tensor) else value

    if isinstance(call.operand, LocalLogits) and in_place and call.operand.late is not None:
        call.operand.late.origin.get_all()
    result = call.run(local)
    return call.operand if in_place else LocalLogits.of(result, call.vocabulary, len(shape) - from_last)


# names; what such a function gives; the same without numbers, where there is a way
_RULES: tuple[tuple[set[str], Rule, Callable[[Call, Rule], Any] | None], ...] = (
    (_QUERIES | _OF_NUMBERS, _query, None),
    (_SIZES, _sizes, None),
    (_SAME, _same, followed_same),
    (SHAPES | _EXPANSIONS, _reshape, followed_part),
    (_MOVES, _move, followed_part),
    (_ELEMENTWISE, _elementwise, followed_change),
    (_IN_PLACE, _elementwise, None),
)


def _log_softmax(call: Call) -> Any:
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
    found = followed_cast(call, _log_softmax, dtype)
    if found is not None:
        return _as_normalised(found)
    result = logits.plain if dtype is None else logits.plain.to(dtype)
    # another tensor object: the logits themselves may go into the model's output
    return _as_normalised(LocalLogits.of(result.view_as(result), call.vocabulary, logits.dimension))


def _likelihood(
    call: Call,
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
    call: Call,
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
    rows = rows_of_loss(input, target, reduction)
    vocabulary.losses.append(rows is not None)
    if input.is_meta:  # only shapes are asked for
        return _loss_of_shapes(call)
    options: dict[str, Any] = {
        "vocabulary": vocabulary.cut,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "label": vocabulary.label,
    }
    if rows is not None:
        assert input.late is not None
        return input.late.origin.loss(
            rows, target, class_weight=weight, change=input.late.change(), **options
        )
    local = input.plain.movedim(classes, -1)
    return cross_entropy(local, target, vocabulary.ranks, weight=weight, **options)


def _loss_of_shapes(call: Call) -> Tensor:
    """What the loss of all ids would give, without numbers."""

    def shaped(value: Any) -> Any:
        return _twin(call.size)(value).to("meta") if isinstance(value, Tensor) else value

    loss: Tensor = call.run(shaped)
    return loss

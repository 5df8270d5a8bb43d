"""The dispatch mode: every operator runs on meta tensors, on known contents alongside, and is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from colrow.trace import content
from colrow.trace.errors import TraceError
from colrow.trace.functions import is_integer
from colrow.trace.origins import selects
from colrow.trace.recorder import Recorder
from colrow.trace.records import Operation, Source, Value
from colrow.trace.sites import user_site
from colrow.trace.tree import map_leaves, tensors_of

aten = torch.ops.aten

_INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
_MASKS = (torch.bool, torch.uint8)
_USES = {"_local_scalar_dense": "item(), or a branch on a tensor,", "nonzero": "nonzero() or where()"}
_NUMBERS = ("__bool__", "__int__", "__index__", "__float__", "__complex__")
"""Reads of a tensor's number of which nobody sees what becomes of it."""


class OperatorMode(TorchDispatchMode):
    """Records operators."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if self.recorder.paused:
            return function(*args, **keywords)
        given = tensors_of((args, keywords))
        inputs = tuple(self.recorder.value_of(tensor) for tensor in given)
        if function is aten.lift_fresh.default:
            return self.recorder.table.twin(given[0])
        with self.recorder.pause():
            return self._operate(function, args, keywords, given, inputs)

    def _operate(
        self,
        function: torch._ops.OpOverload,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        given: list[Tensor],
        inputs: tuple[Value, ...],
    ) -> Any:
        contents = {id(tensor): value.content for tensor, value in zip(given, inputs, strict=True)}
        written = content.written(function, arguments, keywords)
        if _reshapes(function):
            # what stood for the tensor goes on to stand for what it was
            contents = {key: known if known is None else known.clone() for key, known in contents.items()}
            for tensor in written:
                if self.recorder.table.twin(tensor) is not tensor:
                    function(*arguments, **keywords)
        real: Any = None
        if content.reads_data(function) and function not in _INDEXING:
            real = content.compute(function, arguments, keywords, contents)
            if real is None:
                return self._guess(function, arguments, keywords, inputs, written)
            result = content.to_meta(real)
            if not tensors_of(result):
                return result
        else:
            result = self._run_on_meta(function, *self._on_meta(function, arguments, keywords, inputs))
            if content.is_small(result):
                real = content.compute(function, arguments, keywords, contents)
        if function is aten.detach.default:
            if not given[0].requires_grad:
                self.recorder.table.alias(inputs[0], result)
                return result
            # autograd detaches what it keeps for the backward: recorded only if the program uses it
            self.recorder.unrecorded[id(result)] = lambda: self._record(
                function, arguments, keywords, inputs, written, result, real
            )
            return result
        if written:
            # operators that write return what they were given, not its twin
            originals = {id(self.recorder.table.twin(tensor)): tensor for tensor in written}
            result = map_leaves(
                result, lambda leaf: originals.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf
            )
        self._record(function, arguments, keywords, inputs, written, result, real)
        return result

    def _on_meta(
        self,
        function: torch._ops.OpOverload,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        inputs: tuple[Value, ...],
    ) -> tuple[Any, Any]:
        """The arguments with twins for tensors with data and the meta device for others."""
        table = self.recorder.table

        def change(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return table.twin(leaf)
            return torch.device("meta") if isinstance(leaf, torch.device) else leaf

        if function in _INDEXING:
            positions: list[Any] = []
            for index in arguments[1]:
                if isinstance(index, Tensor) and index.dtype in _MASKS:
                    positions += content.to_meta(self._positions(index)).unbind(1)
                else:
                    positions.append(index)
            arguments = (arguments[0], positions, *arguments[2:])
        return map_leaves((arguments, keywords), change)

    def _positions(self, mask: Tensor) -> Tensor:
        """The coordinates of a mask's true elements: shape [elements, dimensions]."""
        value = self.recorder.value_of(mask)
        if value.content is not None:
            return value.content.nonzero()
        self.recorder.guess("indexing with a mask", value, counts=True)
        return content.some_positions(self.recorder.imagination.content_of(value).nonzero(), value.shape)

    def _guess(
        self,
        function: torch._ops.OpOverload,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        inputs: tuple[Value, ...],
        written: list[Tensor],
    ) -> Any:
        """The result of an operator on data that is not known, as far as guesses are asked for."""
        recorder = self.recorder
        name = function._schema.name.removeprefix("aten::")
        use = _USES.get(name, f"the operator {name}")
        unknown = max(
            (one for one in inputs if one.content is None), key=recorder.origins.of, default=inputs[0]
        )
        recorder.guess(use, unknown, counts=selects(function) or self._reads_extent(unknown))
        guess = recorder.imagination.compute(function, *recorder.snapshot((arguments, keywords)))
        if guess is None:
            raise recorder.data_needed(use, unknown)
        if function is aten.nonzero.default:
            guess = content.some_positions(guess, inputs[0].shape)
        result = content.to_meta(guess)
        if tensors_of(result):
            self._record(function, arguments, keywords, inputs, written, result, None)
            for tensor, made_up in zip(tensors_of(result), tensors_of(guess), strict=True):
                recorder.imagination.remember(recorder.value_of(tensor), made_up)
        return result

    def _reads_extent(self, value: Value) -> bool:
        """Whether a torch function reads an integer to have a size or a position, not the program itself."""
        call = self.recorder.call
        return is_integer(value.dtype) and call is not None and call.name not in _NUMBERS

    def _run_on_meta(self, function: torch._ops.OpOverload, arguments: Any, keywords: Any) -> Any:
        if function is aten._grouped_mm.default:
            # its meta kernel takes bfloat16 only, its other kernels do not
            return _grouped_mm(*arguments, **keywords)
        try:
            return function(*arguments, **keywords)
        except NotImplementedError as error:
            name = function._schema.name
            raise TraceError(
                self.recorder.module_path,
                str(user_site()),
                f"the operator {name} has no implementation for meta tensors ({str(error).splitlines()[0]})",
                "Register one with torch.library.register_fake",
            ) from error

    def _record(
        self,
        function: torch._ops.OpOverload,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        inputs: tuple[Value, ...],
        written: list[Tensor],
        result: Any,
        real: Any,
    ) -> None:
        recorder = self.recorder
        trace, table = recorder.trace, recorder.table
        # before a tensor that is given another shape in place stands for something new
        given_arguments, given_keywords = recorder.snapshot((arguments, keywords))
        overwritten = [recorder.value_of(tensor) for tensor in written]
        results = tensors_of(result)
        numbers = (*arguments, *keywords.values())
        origins = recorder.origins.results(function, numbers, inputs, [one.dtype for one in results])
        contents: list[Tensor | None] = [*tensors_of(real)] if real is not None else [None] * len(results)
        fresh: list[Value] = []
        outputs: list[Value] = []
        for tensor, known, origin in zip(results, contents, origins, strict=True):
            value = table.find(tensor)
            if value is None or _reshapes(function):
                value = table.add(tensor, Source("result"), known)
                fresh.append(value)
            outputs.append(value)
            recorder.origins.record(value, origin, value in overwritten)
        if real is None:
            for value in overwritten:
                for alias in table.aliases(value):
                    alias.content = None
        operation = Operation(
            len(trace.operations),
            function,
            given_arguments,
            given_keywords,
            inputs,
            tuple(outputs),
            recorder.module,
            recorder.call,
        )
        trace.operations.append(operation)
        for value in fresh:
            value.producer = operation
        for value in inputs:
            value.uses.append(operation)
        recorder.gradients.follow(inputs, operation.outputs)


def _reshapes(function: torch._ops.OpOverload) -> bool:
    """Whether the operator gives a tensor another shape in place, as ``squeeze_`` does."""
    return torch.Tag.inplace_view in function.tags


def _grouped_mm(
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The result's shape: groups come from whichever operand has three dimensions, or from the offsets."""
    dtype = out_dtype or left.dtype
    if left.dim() == 2 and right.dim() == 2:
        assert offs is not None
        return left.new_empty(offs.shape[0], left.shape[0], right.shape[1], dtype=dtype)
    if left.dim() == 3 and right.dim() == 3:
        return left.new_empty(left.shape[0], left.shape[1], right.shape[2], dtype=dtype)
    if left.dim() == 3:
        return left.new_empty(left.shape[1], right.shape[1], dtype=dtype)
    return left.new_empty(left.shape[0], right.shape[2], dtype=dtype)

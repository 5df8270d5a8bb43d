"""The model's own loss call on logits that are cut over the vocabulary.

A model that is given labels computes its loss with ``F.cross_entropy``, somewhere between its last layer and
the end of its forward. In that window, and only there, the call is replaced by the parallel cross-entropy;
other functions may reshape the logits or act on each of them alone. Anything that would mix the vocabulary is
an error that names the function, because on a shard it would give wrong numbers.

Without labels the logits are gathered, so that callers see what the original model gives.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, Literal
from weakref import ref

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from colrow.collectives import AllGather, Communicator
from colrow.errors import PlanError
from colrow.layers import cross_entropy
from colrow.layout import Cut
from colrow.plan import Loss

# what may happen to logits between the last layer and the loss: moves of elements, functions of each alone
_MOVES = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "movedim",
    "swapaxes", "contiguous", "clone", "detach", "__getitem__", "narrow", "split", "chunk", "select",
    "index_select", "to", "type", "type_as", "float", "double", "half", "bfloat16",
    "view_as", "expand", "t",
}  # fmt: skip
_ELEMENTWISE = {
    "add", "add_", "__add__", "__radd__", "sub", "__sub__", "mul", "mul_", "__mul__", "__rmul__", "div",
    "div_", "true_divide", "__truediv__", "tanh", "tanh_", "clamp", "clamp_", "neg", "__neg__",
}  # fmt: skip
_QUERIES = {
    "__get__", "size", "dim", "ndimension", "numel", "stride", "is_contiguous", "is_floating_point",
    "get_device", "requires_grad_", "__len__", "nelement", "element_size", "data_ptr", "__hash__",
    "__repr__", "storage_offset", "register_hook", "retain_grad", "has_torch_function",
}  # fmt: skip


class ShardedLogits:
    """Stands for logits that were not gathered because the model was given labels.

    Attributes:
        local: [..., this rank's ids], this rank's part.
    """

    def __init__(self, local: Tensor, gather: AllGather) -> None:
        self.local = local
        self._gather = gather

    def gather(self) -> Tensor:
        """[..., all ids]: the whole logits on every rank; every rank must call this."""
        return self._gather(self.local)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the logits are cut over the vocabulary and were not gathered, because the model computed its "
            f"loss from the parts; use .local, or .gather() on every rank, before .{name}"
        )

    def __repr__(self) -> str:
        return f"ShardedLogits(local={list(self.local.shape)})"


class _LossWindow(TorchFunctionMode):
    """Active from the last layer to the end of the model's forward."""

    def __init__(self, logits: Tensor, ranks: Communicator, cut: Cut, label: str) -> None:
        super().__init__()
        self._ranks, self._cut, self._label = ranks, cut, label
        self._width = logits.shape[-1]
        self._tracked: dict[int, ref[Tensor]] = {}
        self.computed = False
        self._track(logits)

    def _track(self, tensor: Tensor) -> None:
        self._tracked[id(tensor)] = ref(tensor)

    def is_sharded(self, value: object) -> bool:
        """Whether a value holds logits of this rank's ids only."""
        found = self._tracked.get(id(value))
        return found is not None and found() is value

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(self.is_sharded(value) for value in tree_iter((args, kwargs))):
            return function(*args, **kwargs)
        name = getattr(function, "__name__", str(function))
        if function is F.cross_entropy:
            self.computed = True
            return self._loss(*args, **kwargs)
        if name not in _MOVES | _ELEMENTWISE | _QUERIES:
            raise PlanError(
                self._label,
                f"between its logits and its loss the model calls {name}, which would see this rank's part "
                "of the vocabulary only",
                "Leave the logits layer out of the plan, or compute the loss outside of the model.",
            )
        result = function(*args, **kwargs)
        if name not in _QUERIES:
            for value in tree_iter(result):
                if isinstance(value, Tensor):
                    if self._width not in value.shape:
                        raise PlanError(
                            self._label,
                            f"{name} cuts the vocabulary of the logits: {list(value.shape)} has no dimension "
                            f"of the {self._width} ids of this rank",
                            "Leave the logits layer out of the plan.",
                        )
                    self._track(value)
        return result

    def _loss(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: object = None,
        ignore_index: int = -100,
        reduce: object = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        if size_average is not None or reduce is not None:
            raise PlanError(self._label, "size_average and reduce are deprecated", "Use reduction.")
        # F.cross_entropy takes [classes], [tokens, classes] or [tokens, classes, ...]
        classes = 1 if input.dim() > 1 else 0
        return cross_entropy(
            input.movedim(classes, -1),
            target,
            self._ranks,
            vocabulary=self._cut,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            label=self._label,
        )


class ParallelLoss:
    """Hooks on the logits layer and on the module that computes the loss."""

    def __init__(self, loss: Loss, communicator: Communicator, cut: Cut, gather: bool) -> None:
        self._loss, self._ranks, self._cut, self._gathers = loss, communicator, cut, gather
        self._window: _LossWindow | None = None
        self._has_labels = False
        self._logits: ref[Tensor] | None = None
        self._saved: dict[str, Any] = {}

    def attach(self, model: nn.Module) -> None:
        """Hook ``model``'s two modules."""
        module = model.get_submodule(self._loss.module)
        module.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        module.register_forward_hook(self._end, always_call=True)
        model.get_submodule(self._loss.logits).register_forward_hook(self._after_logits)

    def _gather(self, logits: Tensor) -> AllGather:
        label = f"gather {self._loss.logits}"
        return AllGather(self._ranks, label, logits.dim() - 1, self._cut.counts, "I")

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._close(module)  # an earlier forward may have been interrupted
        labels = kwargs.get(self._loss.labels)
        if labels is None and args:
            parameters = list(inspect.signature(module.forward).parameters)
            if self._loss.labels in parameters[: len(args)]:
                labels = args[parameters.index(self._loss.labels)]
        self._has_labels = labels is not None
        if self._has_labels:
            self._localise_sizes(module)

    def _localise_sizes(self, module: nn.Module) -> None:
        """A model that reshapes its logits by a size from its configuration must find the local one."""
        local = self._cut.count(self._ranks.rank)
        for path in self._loss.sizes:
            first, _, rest = path.partition(".")
            original = getattr(module, first)
            if first not in self._saved:
                self._saved[first] = original
            if not rest:
                setattr(module, first, local)
                continue
            changed = copy.copy(original)
            setattr(module, first, changed)
            *inner, last = rest.split(".")
            for name in inner:
                duplicate = copy.copy(getattr(changed, name))
                setattr(changed, name, duplicate)
                changed = duplicate
            setattr(changed, last, local)

    def _after_logits(self, module: nn.Module, args: Any, logits: Tensor) -> Tensor | None:
        if self._has_labels:
            window = _LossWindow(logits, self._ranks, self._cut, f"loss of {self._loss.logits}")
            window.__enter__()
            self._window, self._logits = window, ref(logits)
            return None
        return self._gather(logits)(logits) if self._gathers else None

    def _close(self, module: nn.Module) -> None:
        if self._window is not None:
            self._window.__exit__(None, None, None)
            self._window = None
        for name, value in self._saved.items():
            setattr(module, name, value)
        self._saved = {}

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        window = self._window
        self._close(module)
        self._has_labels = False
        if window is None or output is None:  # no labels, or the forward raised
            return None
        if not window.computed:
            raise PlanError(
                self._loss.module,
                "it was given labels but did not pass its logits to F.cross_entropy",
                "Compute the loss with colrow.cross_entropy, or leave the logits layer out of the plan.",
            )
        return self._without_sharded(output, window)

    def _without_sharded(self, output: Any, window: _LossWindow) -> Any:
        """The output with each sharded tensor replaced by what cannot be mistaken for whole logits."""

        def replaced(value: Any) -> Any:
            return ShardedLogits(value, self._gather(value)) if window.is_sharded(value) else value

        if isinstance(output, tuple) and not hasattr(output, "_fields"):
            return tuple(replaced(value) for value in output)
        if isinstance(output, dict):
            for name, value in list(output.items()):
                if window.is_sharded(value):
                    output[name] = replaced(value)
        return output

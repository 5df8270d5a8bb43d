"""Parameters whose gradients are partial, entered together: one reduction sums the gradients of all."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from colrow.collectives import AllReduce, Communicator, Enter


class _EnterAll(torch.autograd.Function):
    """I → R for several tensors. Backward, when all gradients are there, one all-reduce per dtype."""

    @staticmethod
    def forward(ctx: Any, reduce: AllReduce, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.reduce = reduce
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        alike: dict[torch.dtype, list[int]] = defaultdict(list)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                alike[gradient.dtype].append(index)
        found = list(gradients)
        for indices in alike.values():
            given = [gradient for index in indices if (gradient := gradients[index]) is not None]
            flat = ctx.reduce(torch.cat([one.reshape(-1) for one in given]))
            pieces = flat.split([one.numel() for one in given])
            for index, piece, one in zip(indices, pieces, given, strict=True):
                found[index] = piece.view(one.shape)
        return None, *found


class EnterTogether:
    """Enters parameters while a model's forward runs, all in one place of the graph.

    In backward passes their gradients are summed when the last of them is known, in one all-reduce in place
    of one for each norm: what small messages cost is their number. Where a part of the model is called by
    itself, where parameters are not there when the model's forward begins (FSDP), and in graphs of
    torch.compile, each is entered by itself.

    Args:
        communicator: the tensor-parallel group.
        model: whose forward it is.
        places: the modules that hold the parameters, with their names there.
    """

    def __init__(
        self, communicator: Communicator, model: nn.Module, places: dict[tuple[nn.Module, str], None]
    ) -> None:
        self._reduce = AllReduce(communicator, "parameters read in regions")
        self._places = list(places)
        self._entered: dict[int, tuple[Tensor, Tensor]] = {}
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_entered": {}}

    def change(self, name: str) -> _EnterOne:
        """What enters the parameter ``name``."""
        return _EnterOne(self, Enter(self._reduce.communicator, f"parameter {name}"))

    def _begin(self, module: nn.Module, arguments: Any) -> None:
        self._entered = {}
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        # those of another pipeline stage are not there
        found = {
            id(one): one for holder, name in self._places if (one := holder._parameters.get(name)) is not None
        }
        wanting = [one for one in found.values() if one.requires_grad and type(one) is nn.Parameter]
        if wanting:
            entered = _EnterAll.apply(self._reduce, *wanting)
            self._entered = {id(one): (one, result) for one, result in zip(wanting, entered, strict=True)}

    def _end(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._entered = {}

    def find(self, parameter: Tensor) -> Tensor | None:
        """The parameter as it was entered with the others; ``None`` if it was not."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        known = self._entered.get(id(parameter))
        return known[1] if known is not None and known[0] is parameter else None


class _EnterOne:
    """Enters one parameter, with the others if they are."""

    def __init__(self, together: EnterTogether, alone: Enter) -> None:
        self._together, self._alone = together, alone

    def __call__(self, parameter: Tensor) -> Tensor:
        """The entered parameter."""
        entered = self._together.find(parameter)
        if entered is not None:
            return entered
        if torch.compiler.is_compiling():
            return self._alone(parameter)
        if torch._C._current_graph_task_id() != -1 and torch._C._len_torch_dispatch_stack():
            # recomputed, by what asks for the operators of the forward pass, where this was none
            with _disable_current_modes():
                return self._alone(parameter)
        return self._alone(parameter)

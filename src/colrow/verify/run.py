"""Running one of the two models: a forward, and a backward of a number that every output has a part in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from colrow.apply import ShardedLogits
from colrow.collectives import CommStats, Communicator, Tally, comm_stats
from colrow.trace import Example
from colrow.trace.tree import attributes_of, is_object, is_record
from colrow.verify.chance import WithoutChance, seed_everything
from colrow.verify.exchange import Exchange, RanksRaised
from colrow.verify.inputs import inputs_with_gradients, prepared
from colrow.verify.precision import one_precision

T = TypeVar("T")

Objective = Literal["outputs", "loss"]


@dataclass
class Outputs:
    """The floating-point tensors that a forward returned, by their path.

    Attributes:
        values: what callers see: whole on every rank. Logits that were not gathered are so by now.
        kept: what lies within other objects, such as a cache of keys and values: each rank may have its part.
        loss_name: the path of the model's own loss, if it returned one.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    loss_name: str = ""


@contextmanager
def comparable(dtype: torch.dtype, seed: int) -> Iterator[None]:
    """A context in which both models compute alike: in one precision, without chance, as written."""
    with ExitStack() as stack:
        stack.enter_context(one_precision(dtype))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        seed_everything(seed)
        stack.enter_context(WithoutChance(seed))
        yield


def forward(model: nn.Module, example: Example) -> Any:
    """The model's result for an example."""
    return model(*example.arguments, **dict(example.keywords))


def outputs_of(result: Any, *, gather: bool) -> Outputs:
    """The tensors of a result.

    Args:
        result: what a forward returned.
        gather: also logits that were not gathered; then every rank calls this. Else they are left out.
    """
    outputs = Outputs()
    seen: set[int] = set()

    def collect(path: tuple[str, ...], item: Any, is_kept: bool) -> None:
        if isinstance(item, ShardedLogits):
            if not gather:
                return
            item = item.gather()
        if isinstance(item, Tensor):
            if item.is_floating_point() or item.is_complex():
                (outputs.kept if is_kept else outputs.values)[".".join(path) or "output"] = item
        elif isinstance(item, tuple | list):
            for index, each in enumerate(item):
                collect((*path, str(index)), each, is_kept)
        elif isinstance(item, Mapping):
            for key, each in item.items():
                collect((*path, str(key)), each, is_kept)
        elif (is_record(item) or is_object(item)) and id(item) not in seen:
            seen.add(id(item))
            # what the model gives is no cache, nor is what is there to hold named values
            within = is_kept or (bool(path) and not is_record(item))
            for key, each in attributes_of(item).items():
                collect((*path, key), each, within)

    collect((), result, False)
    numbers = [name for name, one in outputs.values.items() if one.numel() == 1 and one.requires_grad]
    # the one that is called so, or the first that may be
    outputs.loss_name = "loss" if "loss" in numbers else next(iter(numbers), "")
    return outputs


def objective_of(outputs: Outputs, objective: Objective, seed: int) -> Tensor | None:
    """The number whose gradient is taken; None if no output has one.

    ``loss``: the model's own. ``outputs``: the sum of all outputs with random weights, as equal weights would
    not tell swapped elements.
    """
    if objective == "loss":
        return outputs.values[outputs.loss_name].sum()
    total: Tensor | None = None
    for index, value in enumerate(outputs.values.values()):
        if not value.requires_grad or not value.numel():
            continue
        generator = torch.Generator().manual_seed(seed + index)
        weights = torch.randn(value.shape, generator=generator, dtype=torch.float64) / value.numel() ** 0.5
        if value.numel() == 1:
            weights = torch.ones(value.shape)
        finite = torch.where(value.isfinite(), value, 0.0) if not value.isfinite().all() else value
        part = (finite * weights.to(value.device, value.real.dtype)).sum()
        part = part.real + part.imag if part.is_complex() else part
        total = part if total is None else total + part
    return total


@dataclass
class Run:
    """What one model gave.

    Attributes:
        outputs: of the forward.
        gradients: of the parameters, each once, by its first name; of the inputs, as ``input NAME``.
        counted: collectives in forward and backward.
    """

    outputs: Outputs
    gradients: dict[str, Tensor]
    counted: CommStats


class RunRaised(Exception):
    """A model raised, on some rank; on every rank alike.

    Attributes:
        direction: in which pass.
        raised: what and where.
    """

    def __init__(self, direction: Literal["forward", "backward"], raised: RanksRaised) -> None:
        self.direction, self.raised = direction, raised
        super().__init__(str(raised))


@dataclass(frozen=True)
class Runner:
    """How both models are run.

    Attributes:
        exchange: with the other ranks.
        ranks: the group whose collectives are counted.
        dtype: of everything.
        seed: of random numbers and of the outputs' weights.
    """

    exchange: Exchange
    ranks: Communicator
    dtype: torch.dtype
    seed: int

    def run(self, model: nn.Module, example: Example, objective: Objective, *, differentiable: bool) -> Run:
        """A forward and a backward of ``model`` on every rank.

        Args:
            model: either of the two.
            example: copied.
            objective: what the gradients are of.
            differentiable: whether floating-point inputs want a gradient.

        Raises:
            RunRaised: if the model raises on some rank.
        """
        together = self.exchange.together
        inputs = prepared(example, self.dtype, differentiable=differentiable)
        before = comm_stats(self.ranks)
        model.zero_grad(set_to_none=True)
        try:
            result = together(lambda: self._alike(lambda: forward(model, inputs)), model)
            outputs = together(lambda: outputs_of(result, gather=objective == "outputs"), model)
        except RanksRaised as raised:
            raise RunRaised("forward", raised) from raised
        try:
            together(lambda: self._alike(lambda: self._backward(outputs, objective)), model)
        except RanksRaised as raised:
            raise RunRaised("backward", raised) from raised
        counted = difference_of(comm_stats(self.ranks), before)
        gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        for name, tensor in inputs_with_gradients(inputs):
            if tensor.grad is not None:
                gradients[f"input {name}"] = tensor.grad
        return Run(outputs, gradients, counted)

    def _alike(self, work: Callable[[], T]) -> T:
        with comparable(self.dtype, self.seed):
            return work()

    def _backward(self, outputs: Outputs, objective: Objective) -> None:
        total = objective_of(outputs, objective, self.seed)
        if total is not None:
            # what backward itself calls: modes are off while backward runs, as in every function that they
            # can change, but what is recomputed in it must be as it was in the forward
            ones = torch.ones_like(total)
            _engine_run_backward(
                (total,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
            )


def difference_of(after: CommStats, before: CommStats) -> CommStats:
    """What was communicated between two readings of a group's statistics."""
    result = CommStats()
    for key, tally in after.tallies.items():
        earlier = before.tallies.get(key, Tally())
        if tally.count > earlier.count:
            result.tallies[key] = Tally(tally.count - earlier.count, tally.bytes - earlier.bytes)
    return result

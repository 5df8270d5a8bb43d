"""Calls of ``torch.utils.checkpoint`` while a model is recorded: what a backward pass will run again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from colrow.trace.listening import CHECKPOINTS, REENTRANT_CHECKPOINTS, Proceed, listening
from colrow.trace.recorder import Recorder
from colrow.trace.records import Recomputation
from colrow.trace.tree import tensors_of

_PLAIN = torch.utils.checkpoint._checkpoint_without_reentrant_generator


@contextmanager
def recorded_checkpoints(recorder: Recorder) -> Iterator[None]:
    """Record what is checkpointed in this context."""

    def plain(given: tuple[Any, ...], keywords: dict[str, Any], proceed: Proceed) -> Any:
        stops_early = _stops_early(given, keywords)
        return _around(recorder, stops_early, proceed(*given, **keywords))

    def reentrant(given: tuple[Any, ...], keywords: dict[str, Any], proceed: Proceed) -> Any:
        function, arguments = given[0], given[2:]  # behind whether random numbers are replayed
        if not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors_of(arguments))):
            return proceed(*given, **keywords)
        return _run_again(recorder, function, arguments)

    with listening(CHECKPOINTS, plain), listening(REENTRANT_CHECKPOINTS, reentrant):
        yield


def _stops_early(given: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether what is recomputed ends with the last tensor that the backward pass needs."""
    everywhere: bool | None = torch.utils.checkpoint._enable_checkpoint_early_stop
    if everywhere is not None:
        return everywhere
    names = list(inspect.signature(_PLAIN).parameters)
    if "early_stop" not in names:
        return True  # of PyTorch's earlier releases, which ask the context manager only
    position = names.index("early_stop")
    return bool(keywords.get("early_stop", given[position] if len(given) > position else True))


def _around(
    recorder: Recorder, stops_early: bool, call: Generator[None, None, None]
) -> Generator[None, None, None]:
    """PyTorch's generator, which yields once while the function runs; notes what that leaves for autograd."""
    first = len(recorder.trace.operations)
    next(call)  # which keeps the arguments, for a checkpoint around this one
    if not torch.is_grad_enabled():
        yield
    else:
        with _keeping(recorder) as last_kept:
            yield
            repeated, last = max(first, last_kept(first)), len(recorder.trace.operations)
        if not stops_early and repeated > first:
            repeated = last
        recorder.trace.recomputed.append(Recomputation(recorder.module, first, last, repeated, False))
    yield from call


def _run_again(recorder: Recorder, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Run a function as the backward pass will, with autograd, which the forward pass leaves out."""
    operations = recorder.trace.operations
    first = len(operations)
    with _keeping(recorder):
        result = function(*arguments)
    last = len(operations)
    recorder.trace.recomputed.append(Recomputation(recorder.module, first, last, last, True))
    # its arguments are kept when it has run
    recorder.kept_after.append((last, recorder.checkpoints))
    return result


@contextmanager
def _keeping(recorder: Recorder) -> Iterator[Callable[[int], int]]:
    """Notes in this context after how many operators something is kept for a backward pass.

    What is kept within a checkpoint belongs to it, and not to the checkpoints around it.
    """
    operations, kept = recorder.trace.operations, recorder.kept_after

    def keep(tensor: Tensor) -> Tensor:
        kept.append((len(operations), recorder.checkpoints))
        return tensor

    def last_kept(first: int) -> int:
        """The last such number since ``first``; ``first`` if there is none."""
        own = recorder.checkpoints
        return max((after for after, depth in kept if depth == own and after >= first), default=first)

    recorder.checkpoints += 1
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            yield last_kept
    finally:
        recorder.checkpoints -= 1

"""Calls of ``torch.utils.checkpoint`` while a model is recorded: what a backward pass will run again."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from colrow.trace.listening import CHECKPOINTS, REENTRANT_CHECKPOINTS, Proceed, listening
from colrow.trace.recorder import Recorder
from colrow.trace.records import Recomputation


@contextmanager
def recorded_checkpoints(recorder: Recorder) -> Iterator[None]:
    """Record what is checkpointed in this context."""

    def plain(given: tuple[Any, ...], keywords: dict[str, Any], proceed: Proceed) -> Any:
        return _around(recorder, proceed(*given, **keywords))

    def reentrant(given: tuple[Any, ...], keywords: dict[str, Any], proceed: Proceed) -> Any:
        first = len(recorder.trace.operations)
        result = proceed(*given, **keywords)
        if torch.is_grad_enabled():
            last = len(recorder.trace.operations)
            recorder.trace.recomputed.append(Recomputation(recorder.module, first, last, last, True))
        return result

    with listening(CHECKPOINTS, plain), listening(REENTRANT_CHECKPOINTS, reentrant):
        yield


def _around(recorder: Recorder, call: Generator[None, None, None]) -> Generator[None, None, None]:
    """PyTorch's generator, which yields once while the function runs; notes what that leaves for autograd."""
    operations = recorder.trace.operations
    first = len(operations)

    def keep(tensor: Tensor) -> Tensor:
        recorder.kept_after.append(len(operations))
        return tensor

    next(call)
    if torch.is_grad_enabled():
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        repeated = max(first, recorder.kept_after[-1]) if recorder.kept_after else first
        recorder.trace.recomputed.append(
            Recomputation(recorder.module, first, len(operations), repeated, False)
        )
    else:
        yield
    yield from call

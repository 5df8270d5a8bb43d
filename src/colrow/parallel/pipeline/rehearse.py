"""Finding out the shapes of what stages send, once for each shape of a batch.

They follow from the model's code and from how it is cut over tensor-parallel ranks, so each stage runs a
micro-batch forward with zeros for what it receives, in order, and tells all others what came out.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colrow.collectives import Communicator
from colrow.errors import PlanError, RankFailure
from colrow.parallel.experts.dispatch import rehearsal
from colrow.parallel.pipeline.layout import StageLayout
from colrow.parallel.pipeline.stage import StageModule
from colrow.trace.tree import Path

_LABEL = "shapes between the stages of a pipeline"


@dataclass(frozen=True)
class Sent:
    """A tensor that crosses a boundary."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def blank(self, device: torch.device | str) -> Tensor:
        """A tensor of zeros like it."""
        zeros = torch.zeros(self.shape, dtype=self.dtype, device=device)
        return zeros.requires_grad_(self.requires_grad)

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class BatchShapes:
    """What follows from the shapes of a micro-batch.

    Attributes:
        sent: by stage, what it sends to the next one.
        returned: what units return, by the index of the call and the path in its result.
        lengths: of the sequences that are cut over tensor-parallel ranks, by name.
        passed: attentions and losses in each stage, where sequences are cut over ranks of ``cp``.
    """

    sent: tuple[tuple[Sent, ...], ...]
    returned: Mapping[tuple[int, Path], tuple[tuple[int, ...], torch.dtype]]
    lengths: Mapping[str, int]
    passed: tuple[tuple[int, int], ...]


def rehearse(
    layout: StageLayout,
    modules: Mapping[int, StageModule],
    ranks: Communicator,
    batch: Mapping[str, Any],
    device: torch.device,
) -> BatchShapes:
    """The shapes for a micro-batch. All ranks of the pipeline call this.

    Args:
        layout: of the stages.
        modules: this rank's, by stage.
        ranks: along ``pp``.
        batch: the micro-batch.
        device: of the model.

    Raises:
        PlanError: if a stage cannot run; on all ranks.
    """
    sent: list[tuple[Sent, ...]] = []
    lengths: dict[str, int] = {}
    passed: list[tuple[int, int]] = []
    returned: dict[tuple[int, Path], tuple[tuple[int, ...], torch.dtype]] = {}
    for stage in layout.stages:
        message: Any = None
        failure: Exception | None = None
        if stage.index in modules:
            module = modules[stage.index]
            module.shapes, module.known_lengths, module.passed = returned, lengths, passed
            for sequence in module.sequences.values():
                sequence.forget()
            received = tuple(one.blank(device) for one in (sent[-1] if sent else ()))
            try:
                with _untouched(module), rehearsal(module.model):
                    run, _ = module.run(received, batch)
                    own = tuple(Sent(tuple(one.shape), one.dtype, one.requires_grad) for one in run.sent())
                seen = {name: one.latest for name, one in module.sequences.items() if one.latest}
                message = (own, run.returned, seen, module.course)
            except RankFailure:
                raise
            except Exception as error:
                failure, message = error, f"{type(error).__name__}: {error}"
        told = _broadcast(ranks, message, layout.rank_of[stage.index], device)
        if failure is not None:
            raise failure
        if isinstance(told, str):
            raise PlanError(
                "", f"stage {stage.index} of the pipeline cannot run: {told}", "See its own error."
            )
        sent.append(told[0])
        returned.update(told[1])
        lengths.update(told[2])
        passed.append(told[3])
    return BatchShapes(tuple(sent), returned, lengths, tuple(passed))


def _broadcast(ranks: Communicator, message: Any, source: int, device: torch.device) -> Any:
    """An object of one rank on all of them."""
    data = pickle.dumps(message) if ranks.rank == source else b""
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    size = int(ranks.broadcast(length, source, label=_LABEL))
    if ranks.rank == source:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    else:
        content = torch.empty(size, dtype=torch.uint8, device=device)
    content = ranks.broadcast(content, source, label=_LABEL)
    return message if ranks.rank == source else pickle.loads(bytes(content.cpu().numpy()))


@contextmanager
def _untouched(module: StageModule) -> Iterator[None]:
    """Random numbers and buffers are as before after this context."""
    buffers = [(one, one.clone()) for one in module.model.buffers() if not one.is_meta]
    devices = [torch.cuda.current_device()] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)


def signature(batch: Mapping[str, Any], model_is_training: bool, device_type: str) -> tuple[Any, ...]:
    """What shapes and dtypes between stages depend on."""
    items: Sequence[Any] = sorted(batch.items())
    described = tuple(
        (name, tuple(item.shape), item.dtype) if isinstance(item, Tensor) else (name, repr(item))
        for name, item in items
    )
    cast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return (described, model_is_training, torch.is_grad_enabled(), cast)

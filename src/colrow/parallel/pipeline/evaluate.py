"""Running a pipeline forward only, and one result of those of its micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.collectives import Communicator
from colrow.collectives.position import compute_meanwhile
from colrow.parallel.pipeline.layout import StageLayout
from colrow.parallel.pipeline.rehearse import BatchShapes
from colrow.parallel.pipeline.stage import StageModule
from colrow.trace.tree import Path, attributes_of, tensors_by_path


def run_forward(
    layout: StageLayout,
    modules: Mapping[int, StageModule],
    ranks: Communicator,
    shapes: BatchShapes,
    micro_batches: int,
) -> None:
    """All micro-batches through this rank's stages, one stage after the other, without gradients.

    Args:
        layout: of the stages.
        modules: this rank's, by stage; their step has begun.
        ranks: along ``pp``.
        shapes: of what is sent.
        micro_batches: how many.
    """
    rank_of, sending = layout.rank_of, []
    handed: dict[int, tuple[Tensor, ...]] = {}
    for index, module in sorted(modules.items()):
        given, handed = handed, {}
        for number in range(micro_batches):
            received = given.get(number, ())
            if index and rank_of[index - 1] != ranks.rank:
                received = tuple(
                    torch.empty(one.shape, dtype=one.dtype, device=module.device)
                    for one in shapes.sent[index - 1]
                )
                source = ranks.global_ranks[rank_of[index - 1]]
                # all at once: what several operations of a pair of ranks wait for may come in any order
                for work in [dist.irecv(one, src=source, group=ranks.group) for one in received]:
                    if work is not None:
                        work.wait()
            sent = compute_meanwhile(module, *received, micro_batch=torch.tensor([number]))
            if index + 1 == len(rank_of):
                continue
            if rank_of[index + 1] == ranks.rank:
                handed[number] = sent
                continue
            target = ranks.global_ranks[rank_of[index + 1]]
            sending += [(one, dist.isend(one, dst=target, group=ranks.group)) for one in sent]
    for _, work in sending:
        if work is not None:
            work.wait()


def merge_results(
    results: Sequence[Any],
    valid: frozenset[Path],
    invalid: frozenset[Path],
    loss: Tensor | None,
    at: Path | None,
) -> Any:
    """The result for a batch, of the results for its micro-batches.

    Tensors are joined along dimension 0; what only other stages could compute becomes ``None``, and with it
    the outermost item that holds it, and so do logits that are cut over tensor-parallel ranks.

    Args:
        results: of the micro-batches.
        valid, invalid: paths of what this stage can and cannot compute.
        loss: of the batch, to stand ``at`` a path.
    """
    tensors = [dict(tensors_by_path(one, inside_objects=True)) for one in results]
    memo: dict[int, Any] = {}
    broken: set[Any] = {path[0] for path in invalid if path}
    for path, tensor in tensors[0].items():
        if path == at and loss is not None:
            memo[id(tensor)] = loss.to(tensor.device, tensor.dtype)
        elif type(tensor) is not Tensor or not any(path[:length] in valid for length in range(len(path) + 1)):
            memo[id(tensor)] = None
            broken.add(path[0] if path else None)
        else:
            every = [one[path] for one in tensors]
            memo[id(tensor)] = torch.cat(every) if tensor.dim() else torch.stack(every).mean()
    first = results[0]
    for key, item in _items(first):
        if key in broken:
            memo[id(item)] = None
    return copy.deepcopy(first, memo)


def _items(result: Any) -> list[tuple[Any, Any]]:
    """The outermost items of what a model returned, by the first part of their paths."""
    if isinstance(result, Mapping):
        return list(result.items())
    if isinstance(result, tuple | list):
        return list(enumerate(result))
    return [] if isinstance(result, Tensor) else list(attributes_of(result).items())

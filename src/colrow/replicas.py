"""Whether what should be equal on all ranks is equal, to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from colrow.collectives import Communicator, communicator
from colrow.collectives.texts import all_gather_texts
from colrow.data_shards import data_groups, held
from colrow.errors import PlanError
from colrow.mesh import replicas, replicas_of_experts
from colrow.state import (
    ParallelState,
    PipelineShare,
    PlacedParameter,
    ReplicaGroups,
    placed_parameters,
    state_of,
)

_CHUNK = 1 << 17
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
"""By bytes of an element; a complex number of 16 is two."""


def fingerprint(tensor: Tensor) -> Tensor:
    """Two 64-bit sums over a tensor's bits, on its device: [2], int64.

    Integers that wrap around: the same whatever the order of summation, the number of threads or the
    device. The second weighs each element by its position, so that permuted elements show.
    """
    bits = tensor.detach().resolve_conj().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for begin in range(0, bits.numel(), _CHUNK):
        part = bits[begin : begin + _CHUNK].long()
        # odd weights below 2^62 from a multiplicative sequence
        weights = torch.arange(begin, begin + part.numel(), device=tensor.device) * 0x9E3779B97F4A7 | 1
        sums[0] += part.sum()
        sums[1] += (part * weights).sum()
    return sums


def digest(text: str) -> int:
    """56 bits that tell texts apart, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def first_difference(tensors: Sequence[Tensor], ranks: Communicator, label: str) -> int | None:
    """Index of the first tensor that is not the same on all ranks; the same answer on each of them."""
    if ranks.size == 1 or not tensors:
        return None
    mine = torch.stack([fingerprint(tensor) for tensor in tensors]).to(tensors[0].device)
    everyone = ranks.all_gather(mine.unsqueeze(0), 0, label=label)
    differs = (everyone != everyone[:1]).any(0).any(1)
    return int(differs.nonzero()[0]) if differs.any() else None


def check_equal_weights(
    model: nn.Module, ranks: Communicator, only: Callable[[nn.Parameter], bool] | None = None
) -> None:
    """All ranks must slice one model: shards of different models would train, and mean nothing.

    Args:
        model: the same on all ``ranks``.
        ranks: whose weights are compared.
        only: which parameters; default: all.

    Raises:
        PlanError: naming the first parameter that differs, or that is trained on some ranks only; on every
            rank.
    """
    chosen = [(name, one) for name, one in model.named_parameters() if only is None or only(one)]
    named = [(name, one) for name, one in chosen if not one.is_meta]
    # the last of what is compared says which are trained: two ranks that train others wait for each other
    device = named[0][1].device if named else torch.device("cpu")
    trained = torch.tensor([one.requires_grad for _, one in chosen], device=device)
    found = first_difference([*(one for _, one in named), trained], ranks, "compare the ranks' weights")
    if found == len(named):
        everyone = ranks.all_gather(trained.int()[None], 0, label="compare the ranks' weights")
        first = int((everyone != everyone[:1]).any(0).nonzero()[0])
        raise PlanError(
            chosen[first][0],
            "some ranks train it, and on others it is frozen",
            "Set requires_grad alike on all ranks.",
        )
    if found is not None:
        raise PlanError(
            named[found][0],
            "the ranks hold different weights",
            "Call torch.manual_seed with one seed on all ranks before building the model, or load one file.",
        )


def check_replicas(model: nn.Module) -> None:
    """Raise if a replicated parameter of a parallelized model, or its gradient, differs between ranks.

    They must be equal to the bit at every step. They are not after ``torch.nn.utils.clip_grad_norm_`` or a
    ``GradScaler``, which see this rank's part only (use :func:`colrow.clip_grad_norm_`), after different
    batches on the ranks, or if a plan has a fault. Of replicas, and of parts of sequences, the parameters
    are compared, not the gradients, which may not have been averaged yet: they differ if nothing averages
    them (see :func:`colrow.data_parallel`), or if optimizers do. One small all-gather, for replicas another;
    every rank calls this.

    Raises:
        PlanError: naming the first parameter that differs; on every rank.
    """
    named: list[tuple[str, Tensor]] = []
    for placed in placed_parameters(model):
        if not placed.layout.is_sharded:
            named.append((placed.name, held(placed.parameter)))
            if placed.parameter.grad is not None:
                named.append((f"the gradient of {placed.name}", held(placed.parameter.grad)))
    state = state_of(model)
    found = first_difference([one for _, one in named], state.communicator, "check replicas")
    if found is not None:
        raise PlanError(
            named[found][0],
            "it is replicated, but differs between ranks",
            "Give all ranks the same batches, clip with colrow.clip_grad_norm_, and check the plan for "
            "parameters that are read inside a region (replicated(inside=...)).",
        )
    if state.pipeline is not None:
        _check_stages(model, state.pipeline)
    groups = _replica_groups(state)
    if groups is not None:
        _check_data_replicas(model, groups)


def _replica_groups(state: ParallelState) -> ReplicaGroups | None:
    """The ranks of the mesh that should train as one, also before anything averages their gradients."""
    if state.replicas is not None or "dp" not in (state.mesh.mesh_dim_names or ()):
        return state.replicas
    return ReplicaGroups(communicator(replicas(state.mesh)), communicator(replicas_of_experts(state.mesh)))


def _check_data_replicas(model: nn.Module, groups: ReplicaGroups) -> None:
    """Raise on all replicas if a parameter that they hold whole differs between them."""
    whole = [one for one in placed_parameters(model) if not data_groups(one.parameter)]
    for ranks, of_experts in ((groups.shared, False), (groups.of_experts, True)):
        named = [one for one in whole if (one.experts is not None) == of_experts]
        found = first_difference([one.parameter for one in named], ranks, "check replicas")
        if found is not None:
            raise PlanError(
                named[found].name,
                "it differs between the replicas that train it",
                "Train what colrow.data_parallel(model, mesh) returns, which averages gradients over dp, ep "
                "and cp, not the model within it, and make the optimizer with the same options on all "
                "replicas.",
            )


def _check_stages(model: nn.Module, pipeline: PipelineShare) -> None:
    """Raise on all ranks of a pipeline if what several stages hold differs between them."""
    ranks, differing = pipeline.communicator, ""
    shared: dict[tuple[int, ...], list[PlacedParameter]] = {}
    for placed in placed_parameters(model):
        holders = pipeline.holders.get(placed.name, ())
        if len(holders) > 1:
            shared.setdefault(holders, []).append(placed)
    for members in sorted(shared):
        named = sorted(shared[members], key=lambda one: one.name)
        tensors = [held(one.parameter) for one in named]
        tensors += [held(one.parameter.grad) for one in named if one.parameter.grad is not None]
        found = first_difference(tensors, ranks.subgroup(members), "check stages")
        if found is not None:
            differing = named[found % len(named)].name
    texts = all_gather_texts(ranks, differing, next(model.parameters()).device, label="check stages")
    name = next(filter(None, texts), "")
    if name:
        raise PlanError(
            name,
            "several stages hold it, and it differs between them",
            "Train it by the pipeline's step and with one optimizer for all parameters.",
        )

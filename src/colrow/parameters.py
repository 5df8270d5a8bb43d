"""Norms and counts of parameters that know what is sharded, what is replicated and what is tied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from colrow.collectives import Communicator, Group, communicator
from colrow.data_shards import data_groups, held, joined
from colrow.mesh import replicas
from colrow.state import ParallelState, PlacedParameter, placed_parameters, state_of


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of elements and bytes, each tied parameter counted once.

    Attributes:
        local: elements that this rank holds.
        total: elements of the whole model.
        local_bytes, total_bytes: the same in bytes.
    """

    local: int
    total: int
    local_bytes: int
    total_bytes: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """What this rank holds of a parallelized model's parameters, and what one process would hold."""
    local = total = local_bytes = total_bytes = 0
    state = state_of(model)
    for placed in placed_parameters(model):
        size = placed.parameter.element_size()
        whole = prod(placed.layout.shape)
        own = held(placed.parameter).numel()
        local += own
        local_bytes += own * size
        if state.pipeline is None or placed.name not in state.pipeline.holders:
            total += whole
            total_bytes += whole * size
    if state.pipeline is not None:
        for name, size in state.pipeline.element_sizes.items():
            whole = prod(state.layouts[name].shape)
            total += whole
            total_bytes += whole * size
    return ParameterCount(local, total, local_bytes, total_bytes)


def global_grad_norm(model: nn.Module, norm_type: float = 2.0) -> Tensor:
    """Norm of all gradients as if they were one vector on one device, the same on every rank.

    One all-reduce of a few numbers, which also checks that the ranks have gone through the same collectives.
    Sharded gradients are summed over the tensor-parallel ranks; replicated, shared and tied ones count once.
    What FSDP has cut over data-parallel ranks is summed over those first, and that of experts over the ranks
    that divide them: one more all-reduce each; what the stages of a pipeline have, over those: another.
    Replicas agree on it to the last bit, by one more.

    Args:
        model: a parallelized model after backward.
        norm_type: p of the p-norm; may be ``inf``.

    Returns:
        A float64 scalar on the gradients' device; 0 if there are no gradients.

    Raises:
        RuntimeError: if the ranks have issued different collectives since they began.
    """
    return _norm_of(list(placed_parameters(model)), state_of(model), norm_type)


def _norm_of(parameters: Sequence[PlacedParameter], state: ParallelState, norm_type: float) -> Tensor:
    norm = _norm_of_replica(parameters, state, norm_type)
    if state.replicas is not None:
        shared = state.replicas.shared
    elif state.experts is not None:
        shared = communicator(replicas(state.mesh))
    else:
        return norm
    # what they hold alike is scaled by it, and their sums may end in other last bits
    return _total(norm.reshape(1), shared, True).reshape(()) if shared.size > 1 else norm


def _norm_of_replica(parameters: Sequence[PlacedParameter], state: ParallelState, norm_type: float) -> Tensor:
    if state.pipeline is None:
        return _norm_on_stages(parameters, state.communicator, norm_type)
    # what several stages hold counts on the first of them
    own = [one for one in parameters if state.pipeline.is_first_holder(one.name)]
    norm = _norm_on_stages(own, state.communicator, norm_type)
    is_max = norm_type == float("inf")
    power = norm if is_max else norm**norm_type
    power = power.to(state.mesh.device_type)
    total = _total(power.reshape(1), state.pipeline.communicator, is_max).reshape(())
    return total if is_max else total ** (1 / norm_type)


def _norm_on_stages(parameters: Sequence[PlacedParameter], ranks: Communicator, norm_type: float) -> Tensor:
    """The norm of the gradients that tensor-parallel ranks hold, of this pipeline stage if there are some."""
    is_max = norm_type == float("inf")
    # by the groups that have divided them, for FSDP or as experts: shards, and what all tp ranks hold
    found: dict[tuple[Group, ...], tuple[list[Tensor], list[Tensor]]] = {(): ([], [])}
    for placed in parameters:
        gradient = placed.parameter.grad
        if gradient is None:
            continue
        divided = () if placed.experts is None else (placed.experts,)
        if placed.layout.is_shared:
            # what several ranks hold counts once
            owned = placed.layout.owned(joined(gradient), ranks.rank)
            found.setdefault(divided, ([], []))[0].extend(owned)
            continue
        sharded, replicated = found.setdefault((*data_groups(gradient), *divided), ([], []))
        (sharded if placed.layout.is_sharded else replicated).append(held(gradient))
    device = next((one.device for both in found.values() for one in both[0] + both[1]), torch.device("cpu"))
    sums = []
    for groups, both in found.items():
        one = torch.stack([_power_sum(gradients, norm_type, device) for gradients in both])
        for group in groups:
            one = _total(one, communicator(group), is_max)
        sums.append(one)
    own, common = torch.stack(sums).amax(0) if is_max else torch.stack(sums).sum(0)
    if is_max or ranks.rank == 0:
        # what all ranks hold is taken of one: equal gradients at other places in memory may sum up to other
        # last bits, and parameters that are scaled by other numbers part
        own = torch.maximum(own, common) if is_max else own + common
    # what is not a number goes separately: the transports' maximum may lose it
    is_nan = own.isnan()
    sequence = torch.tensor(float(ranks.sequence), dtype=torch.float64, device=device)
    mine = torch.stack([own.nan_to_num(0.0, float("inf")), is_nan.double(), sequence, -sequence])
    total = ranks.all_reduce(mine, "max" if is_max else "sum", label="gradient norm")
    # for a sum the mean must be this rank's own, for a maximum the largest and the smallest
    agreed = total[2:] == mine[2:] * (1 if is_max else ranks.size)
    if not agreed.all():
        raise RuntimeError(
            "the ranks have not gone through the same collectives, so their gradients mean nothing: give "
            "all ranks the same batches, hooks and requires_grad (colrow.comm_stats() shows what each did)"
        )
    norm = total[0] if is_max else total[0] ** (1 / norm_type)
    return torch.where(total[1] > 0, torch.nan, norm)


def _total(values: Tensor, ranks: Communicator, is_max: bool) -> Tensor:
    """Sums or maxima over ranks; one that is not a number anywhere is none everywhere."""
    mine = torch.cat([values.nan_to_num(0.0, float("inf")), values.isnan().double()])
    total, is_nan = ranks.all_reduce(mine, "max" if is_max else "sum", label="gradient norm").chunk(2)
    return torch.where(is_nan > 0, torch.nan, total)


def _power_sum(gradients: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Sum of |g|^p, or the largest |g|, in float64: the order of the parameters' norms must not matter."""
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(
        [gradient.float() if gradient.element_size() < 4 else gradient for gradient in gradients], norm_type
    )
    if len({norm.dtype for norm in norms}) > 1:
        norms = tuple(norm.double() for norm in norms)
    stacked = torch.stack(norms).double()
    return stacked.max() if norm_type == float("inf") else (stacked**norm_type).sum()


def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale all gradients in place so that their global norm is at most ``max_norm``.

    The counterpart of ``torch.nn.utils.clip_grad_norm_`` for a parallelized model: the same norm and the
    same scale as on one device, on every rank.

    Args:
        model: a parallelized model after backward.
        max_norm: largest norm to leave; ``inf`` measures only.
        norm_type: p of the p-norm; may be ``inf``.
        error_if_nonfinite: raise instead of scaling by a number that is not finite.

    Returns:
        The norm before clipping, a float64 scalar.

    Raises:
        RuntimeError: if the norm is not finite and ``error_if_nonfinite`` is set; on every rank alike.
    """
    parameters = list(placed_parameters(model))
    norm = _norm_of(parameters, state_of(model), norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"the gradients' norm is {norm.item()}: they cannot be clipped")
    # the small number is torch's own, so that both clip alike
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    gradients = [held(placed.parameter.grad) for placed in parameters if placed.parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, scale.to(gradients[0].device))
    return norm

"""The original model again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from colrow.apply.refusals import allow_own_save
from colrow.collectives import Communicator
from colrow.data_shards import data_groups
from colrow.layout import Cut, TensorLayout
from colrow.state import detach_state, parallel_module, state_of


def unshard(model: nn.Module) -> nn.Module:
    """Make a parallelized model the original one again, in place, on every rank; returns it.

    Parameters and buffers get their global data from all ranks: every rank needs the memory for all of it,
    and must call this. Parameter objects stay; gradients are dropped, as their global form would not fit the
    optimizer's state either. Hooks and attributes that colrow did not make stay.

    Args:
        model: what :func:`colrow.parallelize` returned, or what wraps it.

    Raises:
        ValueError: if the model has not been parallelized, or FSDP has cut it once more.
        RankFailure: if another rank does not call this.
    """
    module, state = parallel_module(model), state_of(model)
    if state.pipeline is not None:
        raise ValueError(
            "a rank of a pipeline has some layers of this model only, which cannot be taken back: "
            "colrow.save_pretrained writes all of it, which another model can load"
        )
    ranks = state.communicator
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    if any(data_groups(parameter) for parameter in named.values()):
        raise ValueError(
            "FSDP has cut this model's parameters once more, which cannot be taken back: "
            "colrow.save_pretrained writes their global form, which another model can load"
        )
    named.update(module.named_buffers(remove_duplicate=False))
    whole: dict[int, Tensor] = {}
    for name, tensor in named.items():
        layout = state.layouts.get(name)
        if layout is not None and layout.is_part and id(tensor) not in whole:
            local, label = tensor.detach(), f"unshard {name}"
            if layout.window and state.experts is not None:
                local, layout = all_experts(local, layout, state.experts.ranks, label)
            whole[id(tensor)] = gather_whole(local, layout, ranks, label) if layout.is_sharded else local
    state.undo.run(module)
    if state.experts is not None:
        from colrow.parallel.experts import take_experts_back  # which goes through what is applied

        take_experts_back(module, state.experts)
    for name, tensor in named.items():
        if id(tensor) not in whole:
            continue
        if isinstance(tensor, nn.Parameter):
            tensor.data, tensor.grad = whole[id(tensor)], None
        else:
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, whole[id(tensor)])
    allow_own_save(module)
    detach_state(module)
    return model


def all_experts(
    local: Tensor, layout: TensorLayout, ranks: Communicator, label: str
) -> tuple[Tensor, TensorLayout]:
    """What a tensor-parallel rank holds of all experts, and its layout.

    Args:
        local: of the experts of this rank's place along ``ep``.
        layout: of it.
        ranks: along ``ep``.
        label: names the collective in errors.
    """
    if local.is_meta:
        return local.new_empty(layout.shape[:1] + local.shape[1:]), layout.without_window
    counts = Cut.balanced(layout.shape[0], ranks.size).counts
    return ranks.all_gather(local, 0, counts, label=label), layout.without_window


def gather_whole(shard: Tensor, layout: TensorLayout, ranks: Communicator, label: str) -> Tensor:
    """The global tensor on every rank.

    Args:
        shard: this rank's part.
        layout: how it lies in the whole.
        ranks: all that hold parts.
        label: names the collective in errors.
    """
    if shard.is_meta:
        return torch.empty(layout.shape, dtype=shard.dtype, device="meta")
    sizes = [layout.local_numel(rank) for rank in range(ranks.size)]
    flat = ranks.all_gather(shard.reshape(-1), 0, sizes, label=label)
    parts = [part.view(layout.local_shape(rank)) for rank, part in enumerate(flat.split(sizes))]
    return layout.assemble(parts)

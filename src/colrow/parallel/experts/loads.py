"""How many tokens each expert gets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from colrow.collectives import communicator
from colrow.forwards import own_forwards
from colrow.mesh import replicas
from colrow.parallel.experts.dispatch import Dispatch
from colrow.state import parallel_module, state_of


def expert_loads(model: nn.Module) -> dict[str, Tensor]:
    """How many tokens of all ranks have chosen each expert since the last reset.

    Every rank calls this: one all-reduce of the counts of all modules.

    Args:
        model: parallelized over a mesh with ``ep``, or what wraps it.

    Returns:
        By the path of each module with experts, int64 counts [experts]; the same on every rank.

    Raises:
        ValueError: if its experts are not divided over ``ep``.
    """
    state = state_of(model)
    modules = _dispatches(model)
    mine = torch.cat([one.loads for one in modules])
    total = communicator(replicas(state.mesh)).all_reduce(mine, label="loads of experts")
    parts = total.split([one.count for one in modules])
    return {one.path: part for one, part in zip(modules, parts, strict=True)}


def reset_expert_loads(model: nn.Module) -> None:
    """Begin to count anew, on this rank.

    Raises:
        ValueError: if the model's experts are not divided over ``ep``.
    """
    for one in _dispatches(model):
        one.loads.zero_()


def _dispatches(model: nn.Module) -> list[Dispatch]:
    module, experts = parallel_module(model), state_of(model).experts
    if experts is None:
        raise ValueError(
            "the experts of this model are not divided over ep: make the mesh with colrow.init_mesh(ep=...)"
        )
    forwards = [own_forwards(module.get_submodule(path)) for path in experts.attributes]
    return [one for found in forwards for one in found if isinstance(one, Dispatch)]

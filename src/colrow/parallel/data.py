"""Data parallelism over replicas of a cut model, by PyTorch's own DDP and FSDP."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from colrow.collectives import communicator
from colrow.data_shards import let_go_of_gathered, refuse_inference_mode
from colrow.mesh import replicas, replicas_of_experts
from colrow.parallel.experts.reduction import ExpertGradients
from colrow.parallel.pipeline.pipeline import Pipeline
from colrow.parallel.pipeline.replicate import Replicas, replicate_stages
from colrow.replicas import check_equal_weights
from colrow.state import ReplicaGroups, attach_state, parallel_module, placed_parameters, state_of

Kind = Literal["ddp", "fsdp"]


def data_parallel(model: nn.Module, mesh: DeviceMesh, kind: Kind = "ddp", **options: Any) -> nn.Module:
    """Let the ``dp`` replicas of a parallelized model train as one, each on its own part of the data.

    Gradients are averaged over the replicas; :func:`token_weight` makes that the mean over all tokens. Ranks
    along ``ep`` are replicas too, of all parameters but experts. The other functions of colrow take the
    result as they take the model: norms, clipping, counts, checkpoints.

    Args:
        model: from :func:`colrow.parallelize` or :func:`colrow.pipeline_parallel`, with the same weights on
            all replicas.
        mesh: with a dimension ``dp``.
        kind: ``"ddp"``: every replica holds its parameters, gradients and optimizer state
            (``DistributedDataParallel``, whose wrapper is returned). ``"fsdp"``: replicas share them too
            (``fully_shard`` of each layer of a list of layers and of the rest, in place); parameters become
            DTensors, so the optimizer is made afterwards. Of a pipeline, each unit; its parameters are whole
            from a step's first micro-batch to its last.
        options: of ``DistributedDataParallel``, such as ``find_unused_parameters=True``, or ``fully_shard``.

    Returns:
        What the training loop calls; a pipeline itself.

    Raises:
        ValueError: if the model has not been parallelized, the mesh has no dimension ``dp``, or a pipeline is
            given options.
        PlanError: if the replicas' weights differ.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be 'ddp' or 'fsdp', not {kind!r}")
    shared, of_experts = replicas(mesh), replicas_of_experts(mesh)
    module = parallel_module(model)
    divided = {id(one.parameter) for one in placed_parameters(module) if one.experts is not None}
    check_equal_weights(module, communicator(shared), lambda one: id(one) not in divided)
    check_equal_weights(module, communicator(of_experts), lambda one: id(one) in divided)
    groups = ReplicaGroups(communicator(shared), communicator(of_experts))
    attach_state(module, dataclasses.replace(state_of(module), replicas=groups))
    if isinstance(model, Pipeline):
        if options:
            raise ValueError(f"the stages of a pipeline take no options: leave out {', '.join(options)}")
        replicate_stages(model, Replicas(shared, of_experts, tuple(_paths_of_experts(module))), kind)
        return model
    if kind == "ddp":
        devices = [torch.cuda.current_device()] if mesh.device_type == "cuda" else None
        named = [pair for pair in model.named_parameters(remove_duplicate=False) if id(pair[1]) in divided]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, [name for name, _ in named]
        )
        group = shared.get_group()
        wrapper = DistributedDataParallel(model, device_ids=devices, process_group=group, **options)
        ExpertGradients(
            wrapper, [(one, model.get_parameter(one)) for one, _ in named], communicator(of_experts)
        )
        return wrapper
    for path in _paths_of_experts(module):
        fully_shard(module.get_submodule(path), mesh=of_experts, **options)
    for layer in _layers(module):
        fully_shard(layer, mesh=shared, **options)
    fully_shard(model, mesh=shared, **options)
    model.register_forward_pre_hook(_before_gathering, prepend=True)
    model.register_forward_hook(_at_rest)
    return model


def _paths_of_experts(module: nn.Module) -> list[str]:
    experts = state_of(module).experts
    return [] if experts is None else list(experts.attributes)


def _before_gathering(model: nn.Module, arguments: Any) -> None:
    refuse_inference_mode()


def _at_rest(model: nn.Module, arguments: Any, output: Any) -> None:
    """After a forward without gradients no backward lets go of what FSDP keeps gathered for it."""
    if not torch.is_grad_enabled():
        let_go_of_gathered(model)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of lists of modules: what is gathered and let go of at a time."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1:
            found += [layer for layer in child if next(layer.parameters(), None) is not None]
        else:
            found += _layers(child)
    return found


@contextmanager
def no_gradient_sync(model: nn.Module) -> Iterator[None]:
    """A context for all micro-batches of a step but the last: gradients stay where they are.

    Or, of a pipeline, for all steps before the optimizer's but the last. They add up on each replica, and are
    averaged with those of the last micro-batch. A model without replicas is left as it is, so that one loop
    serves all.

    Args:
        model: what :func:`data_parallel` returned.
    """
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, Pipeline):
        with model.without_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield

"""Lightning Fabric: a strategy that knows which ranks hold parts of one model."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import lightning_fabric
import torch
import torch.distributed as dist
from lightning_fabric.strategies import DDPStrategy
from lightning_fabric.strategies.strategy import _BackwardSyncControl, _validate_keys_for_strict_loading
from lightning_fabric.utilities.seed import pl_worker_init_function
from lightning_fabric.utilities.types import _Stateful
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.checkpoint import load_optimizer, save_optimizer, save_pretrained
from colrow.checkpoint.pretrained import load_weights
from colrow.engines.places import require_replicas_and_parts
from colrow.engines.sharding import Data, Replicated
from colrow.mesh import coordinate, size_of
from colrow.parallel import no_gradient_sync
from colrow.parameters import clip_grad_norm_
from colrow.state import parallel_module

_MODEL, _OPTIMIZER, _REST = "model", "optimizer", "rest.pt"


class Fabric(lightning_fabric.Fabric):
    """Lightning's own for the ranks of a mesh, launched, with :class:`TensorParallelStrategy`.

    Args:
        mesh: from :func:`colrow.init_mesh`, of ``dp`` and ``tp``; its ranks have been started.
        data: see :class:`TensorParallelStrategy`.
        options: of ``lightning_fabric.Fabric``, such as ``precision``.
    """

    def __init__(self, mesh: DeviceMesh, data: Data = "ddp", **options: Any) -> None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        super().__init__(
            **{
                "accelerator": mesh.device_type,
                "strategy": TensorParallelStrategy(mesh, data),
                "devices": local,
                "num_nodes": dist.get_world_size() // local,
                **options,
            }
        )
        self.launch()


class TensorParallelStrategy(DDPStrategy):
    """Fabric's DDP for models that :func:`colrow.parallelize` has cut.

    What is different: samplers divide data over replicas only; ``setup`` lets replicas average gradients;
    ``clip_gradients`` takes the norm of the whole model; ``all_reduce`` and ``all_gather`` are over replicas;
    ``save`` and ``load`` take a folder with the whole model and optimizer.

    :class:`Fabric` takes it by itself; give it to Lightning's own for options.

    Args:
        mesh: from :func:`colrow.init_mesh`, of ``dp`` and ``tp``.
        data: ``"ddp"``: replicas hold the same parameters; ``"fsdp"``: they share them, and the optimizer
            that is set up is given those that FSDP makes.
        options: of ``DDPStrategy`` and of ``DistributedDataParallel``.

    Raises:
        ValueError: if the mesh has other dimensions.
    """

    def __init__(self, mesh: DeviceMesh, data: Data = "ddp", **options: Any) -> None:
        require_replicas_and_parts(mesh, "TensorParallelStrategy")
        super().__init__(**options)
        self.mesh, self._replicated = mesh, Replicated(mesh, data)
        self._backward_sync_control = _ReplicaSyncControl()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which part of the data is this rank's: its replica's."""
        return {"num_replicas": size_of(self.mesh, "dp"), "rank": coordinate(self.mesh, "dp")}

    def setup_environment(self) -> None:
        """As there.

        Raises:
            ValueError: if Fabric was told of another number of ranks.
        """
        super().setup_environment()
        if self.world_size != dist.get_world_size():
            raise ValueError(
                f"Fabric has {self.world_size} ranks and the job {dist.get_world_size()}: give it as many "
                "devices as there are ranks on a host, and num_nodes"
            )

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Wrap a cut model in DDP, or shard it by FSDP, over the replicas.

        Raises:
            ValueError: if it has not been parallelized.
            PlanError: if the replicas' weights differ.
        """
        parallel_module(module)
        if size_of(self.mesh, "dp") == 1:
            return module
        return self._replicated.wrap(module, **self._ddp_kwargs)

    def setup_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Let it train what its model holds.

        Raises:
            ValueError: if it has made steps before FSDP sharded the model.
        """
        self._replicated.give_parameters(optimizer)
        return super().setup_optimizer(optimizer)

    def process_dataloader(self, dataloader: Any) -> Any:
        """Seeds of loading processes differ between replicas, not between the ranks of one."""
        start = getattr(dataloader, "worker_init_fn", None)
        if isinstance(start, partial) and start.func is pl_worker_init_function:
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=coordinate(self.mesh, "dp"))
        return dataloader

    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over the replicas, unless another group than all ranks is given."""
        return super().all_reduce(tensor, self._among(group), reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Of the replicas, unless another group than all ranks is given: [replicas, ...]."""
        return super().all_gather(tensor, self._among(group), sync_grads)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks, or any, say yes; also within a replica."""
        votes = torch.tensor(int(decision), device=self.root_device)
        votes = super().all_reduce(votes, dist.group.WORLD, "sum")
        return int(votes) == dist.get_world_size() if all else bool(votes)

    def _among(self, group: Any) -> Any:
        return self.mesh["dp"].get_group() if group in (None, dist.group.WORLD) else group

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip by the norm of the whole model's gradient, and return it."""
        self.precision.unscale_gradients(optimizer)
        return clip_grad_norm_(module, max_norm, norm_type, error_if_nonfinite=error_if_nonfinite)

    def get_module_state_dict(self, module: nn.Module) -> NoReturn:
        """Refused.

        Raises:
            ValueError: always: it would be that of this rank's part.
        """
        raise ValueError("this model is cut: call colrow.save_pretrained(model, folder) on all ranks")

    def save_checkpoint(
        self, path: str | Path, state: dict[str, Any], storage_options: Any = None, filter: Any = None
    ) -> None:
        """Write a folder: model and optimizer in global form, the rest of the state beside them.

        Raises:
            ValueError: if the state does not have one model and at most one optimizer, or options are given.
        """
        if storage_options is not None or filter:
            raise ValueError("a cut model is saved whole, by colrow: leave out storage_options and filter")
        folder = Path(self.broadcast(path))
        model, optimizers, rest = _divide(state)
        save_pretrained(model, folder / _MODEL)
        for optimizer in optimizers.values():
            save_optimizer(model, optimizer, folder / _OPTIMIZER)
        if self.is_global_zero:
            torch.save(self._convert_stateful_objects_in_state(rest, filter={}), folder / _REST)

    def load_checkpoint(
        self,
        path: str | Path,
        state: Any = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Restore what :meth:`save_checkpoint` wrote, at any layout.

        Returns:
            What was saved beside the state that is given.

        Raises:
            ValueError: see :meth:`save_checkpoint`.
            KeyError: if something of the state was not saved and ``strict`` is set.
        """
        folder = Path(self.broadcast(path))
        state = {_MODEL: state} if isinstance(state, nn.Module) else state
        model, optimizers, rest = _divide(state or {})
        load_weights(model, folder / _MODEL)
        for optimizer in optimizers.values():
            load_optimizer(model, optimizer, folder / _OPTIMIZER)
        saved: dict[str, Any] = torch.load(folder / _REST, map_location="cpu", weights_only=weights_only)
        _validate_keys_for_strict_loading(rest.keys(), saved.keys(), strict=strict)
        for name in rest.keys() & saved.keys():
            if isinstance(rest[name], _Stateful):
                rest[name].load_state_dict(saved.pop(name))
            else:
                state[name] = saved.pop(name)
        return saved


class _ReplicaSyncControl(_BackwardSyncControl):
    """Fabric's ``no_backward_sync``: also where there is one replica, and nothing to wait for."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return no_gradient_sync(module) if enabled else nullcontext()


def _divide(state: dict[str, Any]) -> tuple[nn.Module, dict[str, torch.optim.Optimizer], dict[str, Any]]:
    """The model, its optimizer if there is one, and the rest."""
    models = {name: one for name, one in state.items() if isinstance(one, nn.Module)}
    optimizers = {name: one for name, one in state.items() if isinstance(one, torch.optim.Optimizer)}
    if len(models) != 1 or len(optimizers) > 1:
        raise ValueError(
            f"the state has {len(models)} models and {len(optimizers)} optimizers: give one cut model and at "
            "most one optimizer, and save others with colrow.save_pretrained and colrow.save_optimizer"
        )
    rest = {name: one for name, one in state.items() if name not in models and name not in optimizers}
    return next(iter(models.values())), optimizers, rest

"""Hugging Face accelerate: an ``Accelerator`` that knows which ranks hold parts of one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from colrow.checkpoint import load_optimizer, save_optimizer, save_pretrained
from colrow.checkpoint.pretrained import load_weights
from colrow.collectives import communicator
from colrow.engines.places import require_replicas_and_parts, speaks_for_replica
from colrow.engines.sharding import Data, Replicated
from colrow.mesh import size_of
from colrow.parallel import no_gradient_sync
from colrow.parameters import clip_grad_norm_
from colrow.state import parallel_module

_OTHERS = ("deepspeed_plugin", "fsdp_plugin", "megatron_lm_plugin", "torch_tp_plugin", "parallelism_config")


class Layout(accelerate.ParallelismConfig):
    """A mesh as accelerate knows it: its data loaders give the ranks of one ``tp`` group the same batches.

    accelerate's own refuses CPUs, and replicas (``dp_replicate_size``) of cut models. Replicas are therefore
    named ``dp_shard``, which only data loaders read as long as accelerate is not asked to wrap the model.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        sizes = {"dp_replicate_size": 1, "dp_shard_size": size_of(mesh, "dp"), "tp_size": size_of(mesh, "tp")}
        super().__init__(**sizes, cp_size=1, sp_size=1)

    def _validate_accelerator(self, accelerator: accelerate.Accelerator) -> None:
        if self.total_size != accelerator.num_processes:
            raise ValueError(
                f"the mesh has {self.total_size} ranks, but accelerate {accelerator.num_processes}"
            )


class Accelerator(accelerate.Accelerator):
    """accelerate's own for models that :func:`colrow.parallelize` has cut.

    What is different: batches differ between replicas only; ``prepare`` lets replicas average gradients (DDP
    or FSDP over ``dp``); ``clip_grad_norm_`` takes the norm of the whole model; ``gather``,
    ``gather_for_metrics`` and ``reduce`` count each replica once; ``save_model`` and ``save_state`` write
    global files, and every rank calls them.

    Args:
        mesh: from :func:`colrow.init_mesh`, of ``dp`` and ``tp``.
        data: ``"ddp"``: replicas hold the same parameters; ``"fsdp"``: they share them, and the prepared
            optimizer is given those that FSDP makes.
        options: of ``accelerate.Accelerator``.

    Raises:
        ValueError: if the mesh has other dimensions, or an option asks for another engine, another
            parallelism or batches that one rank reads for all.
    """

    _models: list[nn.Module]
    _optimizers: list[Any]
    dataloader_config: Any

    def __init__(self, mesh: DeviceMesh, data: Data = "ddp", **options: Any) -> None:
        require_replicas_and_parts(mesh, "Accelerator")
        self._replicated = Replicated(mesh, data)
        given = [name for name in _OTHERS if options.get(name) is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: the mesh says how the model is divided; leave them out")
        self.mesh = mesh
        super().__init__(**{"cpu": mesh.device_type == "cpu", **options, "parallelism_config": Layout(mesh)})
        if self.dataloader_config.dispatch_batches:
            raise ValueError(
                "dispatch_batches gives all replicas the same batches: each rank reads its own here"
            )
        # left to itself, accelerate does dispatch those of iterable data sets
        self.dataloader_config = dataclasses.replace(self.dataloader_config, dispatch_batches=False)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """As accelerate's, but a cut model is wrapped in DDP, or sharded by FSDP, over the replicas alone.

        Raises:
            ValueError: if the model has not been parallelized.
            PlanError: if the replicas' weights differ.
        """
        parallel_module(model)
        model = super().prepare_model(model, device_placement, evaluation_mode=True)
        trained = any(parameter.requires_grad for parameter in model.parameters())
        if evaluation_mode or not trained or size_of(self.mesh, "dp") == 1:
            return model
        options = self.ddp_handler.to_kwargs() if self.ddp_handler is not None else {}
        wrapped = self._replicated.wrap(model, **options)
        if self.ddp_handler is not None and self._replicated.data == "ddp":
            self.ddp_handler.register_comm_hook(wrapped)
        self._models[-1] = wrapped
        wrapped._is_accelerate_prepared = True  # type: ignore[assignment]
        return wrapped

    def prepare(self, *objects: Any, **options: Any) -> Any:
        """As accelerate's; optimizers train what their models hold then.

        Raises:
            ValueError: if an optimizer has made steps before FSDP shards its model.
        """
        prepared = super().prepare(*objects, **options)
        for optimizer in self._optimizers:
            self._replicated.give_parameters(optimizer.optimizer)
        return prepared

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Gradients stay where they are, see :func:`colrow.no_gradient_sync`."""
        with no_gradient_sync(model):
            yield

    def clip_grad_norm_(
        self, parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2
    ) -> Tensor:
        """Clip all gradients of the prepared model by their global norm.

        Raises:
            ValueError: if the parameters are not all those of one prepared model.
        """
        given = {id(one) for one in ([parameters] if isinstance(parameters, Tensor) else parameters)}
        self.unscale_gradients()
        for model in self._models:
            if given == {id(parameter) for parameter in model.parameters()}:
                return clip_grad_norm_(model, max_norm, norm_type)
        raise ValueError(
            "of a cut model only the norm of all gradients is known: clip model.parameters(), prepared"
        )

    def gather(self, tensor: Any) -> Any:
        """The tensors of all replicas, each once, one after the other along the first dimension."""
        ranks = size_of(self.mesh, "tp")
        if ranks == 1:
            return super().gather(tensor)

        def first_of_each(gathered: Tensor) -> Tensor:
            return gathered.unflatten(0, (self.num_processes, -1))[::ranks].flatten(0, 1)

        return recursively_apply(first_of_each, super().gather(tensor), error_on_other_type=True)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """The values of all replicas, each once, without what was added to fill up the last batch."""
        leaves = tree_leaves(input_data)
        if not use_gather_object and all(isinstance(one, Tensor) for one in leaves):
            return super().gather_for_metrics(input_data)
        own = input_data if speaks_for_replica(self.mesh) else input_data[:0]
        return super().gather_for_metrics(own, use_gather_object=True)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The sum or mean over replicas.

        Raises:
            ValueError: for another reduction.
        """
        if reduction not in ("sum", "mean", "none"):
            raise ValueError(f"reduction must be 'sum', 'mean' or 'none', not {reduction!r}")
        replicas = communicator(self.mesh["dp"])

        def over_replicas(one: Tensor) -> Tensor:
            total = replicas.all_reduce(one.detach(), label=f"accelerate {reduction}")
            return total / replicas.size if reduction == "mean" else total

        return tensor if reduction == "none" else recursively_apply(over_replicas, tensor)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Tensor]:
        """Refused.

        Raises:
            ValueError: always: it would be that of this rank's part.
        """
        raise ValueError("this model is cut: call colrow.save_pretrained(model, folder) on all ranks")

    def save_model(
        self, model: nn.Module, save_directory: str | Path, *arguments: Any, **options: Any
    ) -> None:
        """Write the whole model, see :func:`colrow.save_pretrained`; every rank calls this.

        Raises:
            ValueError: if options are given: there are none.
        """
        if arguments or options:
            raise ValueError("colrow writes safetensors in the hub's layout; save_model takes no options")
        save_pretrained(model, save_directory)

    def save_state(self, output_dir: str | Path | None = None, **options: Any) -> str:
        """Write models and optimizers in global form, and the rest as accelerate does; every rank calls this.

        The first two, ``model/`` and ``optimizer/`` in the folder, can be read at any layout. Random numbers
        are those of each rank, for going on at the same one.

        Raises:
            ValueError: without a folder, or if not one model and at most one optimizer have been prepared.
        """
        if output_dir is None:
            raise ValueError("name the folder: save_state(folder)")
        folder = Path(output_dir)
        model, optimizers = self._trained()
        save_pretrained(model, folder / "model")
        for optimizer in optimizers:
            save_optimizer(model, optimizer, folder / "optimizer")
        with self._rest_only():
            return str(super().save_state(str(folder), **options))

    def load_state(self, input_dir: str | Path | None = None, *arguments: Any, **options: Any) -> None:
        """Restore what :meth:`save_state` wrote.

        Raises:
            ValueError: see :meth:`save_state`.
            FileNotFoundError: if something is missing.
        """
        if input_dir is None:
            raise ValueError("name the folder: load_state(folder)")
        folder = Path(input_dir)
        model, optimizers = self._trained()
        load_weights(model, folder / "model")
        for optimizer in optimizers:
            load_optimizer(model, optimizer, folder / "optimizer")
        with self._rest_only():
            super().load_state(str(folder), *arguments, **options)

    def _trained(self) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        if len(self._models) != 1 or len(self._optimizers) > 1:
            raise ValueError(
                f"{len(self._models)} models and {len(self._optimizers)} optimizers have been prepared: save "
                "each with colrow.save_pretrained and colrow.save_optimizer"
            )
        return self._models[0], [one.optimizer for one in self._optimizers]

    @contextmanager
    def _rest_only(self) -> Iterator[None]:
        """accelerate saves and loads schedulers, data loaders, random numbers and what was registered."""
        models, optimizers = self._models, self._optimizers
        self._models, self._optimizers = [], []
        try:
            yield
        finally:
            self._models, self._optimizers = models, optimizers

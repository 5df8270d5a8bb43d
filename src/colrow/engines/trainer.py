"""transformers' ``Trainer`` for models that colrow has cut."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import seed_worker

from colrow.apply import ShardedLogits
from colrow.checkpoint import load_optimizer, save_optimizer, save_pretrained
from colrow.checkpoint.pretrained import load_weights
from colrow.engines.accelerate import Accelerator, Layout
from colrow.engines.places import require_replicas_and_parts, require_same_batch
from colrow.engines.sharding import Data, require_data
from colrow.mesh import coordinate, root_mesh
from colrow.state import state_of

_OPTIMIZER = "optimizer"


class Trainer(transformers.Trainer):
    """transformers' own for models that :func:`colrow.parallelize` or :func:`colrow.load_pretrained` has cut.

    Arguments mean what they mean there; ``per_device_train_batch_size`` is that of a replica. It trains
    through :class:`colrow.engines.accelerate.Accelerator`. The loss is the mean over all tokens of all
    replicas. Checkpoints hold the whole model and optimizer and can be resumed at any layout; random numbers
    go on at the same one.

    Args:
        data: how replicas train together, as of colrow's ``Accelerator``: ``"ddp"`` or ``"fsdp"``.
        arguments, options: of ``transformers.Trainer``.

    Raises:
        ValueError: if the model has not been parallelized, its mesh has other dimensions than ``dp`` and
            ``tp``, batches of one replica's ranks differ, or the arguments ask for what goes by ranks in
            another way: DeepSpeed, its own FSDP, ``parallelism_config``, ``batch_rebalance``.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any
    _options: dict[str, Any]
    _needs_logits = True

    def __init__(self, *arguments: Any, data: Data = "ddp", **options: Any) -> None:
        require_data(data)
        self._data = data
        super().__init__(*arguments, **options)

    @property
    def mesh(self) -> DeviceMesh:
        """The mesh over which the model is cut."""
        return root_mesh(state_of(self.model).mesh)

    def create_accelerator_and_postprocess(self) -> None:
        """As there, with colrow's accelerator."""
        if not isinstance(self.model, nn.Module):
            raise ValueError("give the Trainer a model that has been parallelized, not model_init")
        require_replicas_and_parts(self.mesh, "Trainer")
        if self.args.world_size != dist.get_world_size():
            raise ValueError(
                f"TrainingArguments see {self.args.world_size} of {dist.get_world_size()} ranks: on CPUs "
                "they need use_cpu=True"
            )
        if self.args.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy='batch_rebalance' divides data over all ranks: use another"
            )
        super().create_accelerator_and_postprocess()
        self.accelerator = Accelerator(self.mesh, self._data, **self._options)
        self.gather_function = partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )

    def _build_accelerator_args(self, **options: Any) -> dict[str, Any]:
        self._options = super()._build_accelerator_args(**options)
        return {**self._options, "parallelism_config": Layout(self.mesh)}

    def _get_dataloader(self, *arguments: Any, **options: Any) -> Any:
        """Seeds of loading processes differ between replicas, not between the ranks of one."""
        loader = super()._get_dataloader(*arguments, **options)
        if getattr(loader, "worker_init_fn", None) is not None:
            replica, workers = coordinate(self.mesh, "dp"), self.args.dataloader_num_workers
            loader.worker_init_fn = partial(seed_worker, num_workers=workers, rank=replica)
        return loader

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """transformers counts every rank and divides by tp; here every replica is counted once."""
        count = super()._get_num_items_in_batch(batch_samples, device)
        return count * self.get_tp_size() if isinstance(count, Tensor) else count

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any
    ) -> Tensor:
        """As there, after a look whether the ranks of a replica have the same batch."""
        require_same_batch(tree_leaves(inputs), state_of(self.model).communicator)
        return super().training_step(model, inputs, *arguments, **options)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """As there; logits are gathered where they are wanted."""
        self._needs_logits = not prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, *arguments, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As there, with whole logits in the outputs that it returns."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not (return_outputs and self._needs_logits):
            return found
        loss, outputs = found
        return loss, _with_whole_logits(outputs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        save_pretrained(self.model, folder)
        if not self.args.should_save:
            return
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self.model, self._own_optimizer(), Path(output_dir) / _OPTIMIZER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None  # that is when this is called
        load_weights(self.model, best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not os.path.exists(os.path.join(checkpoint, _OPTIMIZER)):
            return  # save_only_model
        load_optimizer(self.model, self._own_optimizer(), Path(checkpoint) / _OPTIMIZER)
        self.lr_scheduler.load_state_dict(
            torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
        )

    def _own_optimizer(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper."""
        optimizer: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer


def _with_whole_logits(outputs: Any) -> Any:
    """Outputs of a model with logits gathered; all ranks of a replica call this."""
    if isinstance(outputs, dict):
        for key, value in list(outputs.items()):
            if isinstance(value, ShardedLogits):
                outputs[key] = value.gather()
        return outputs
    return tuple(one.gather() if isinstance(one, ShardedLogits) else one for one in outputs)

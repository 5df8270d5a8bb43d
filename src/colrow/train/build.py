"""A run's cut model and optimizer: new, from a folder to fine-tune, or from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import colrow
from colrow.checkpoint import load_pretrained
from colrow.collectives import Communicator, communicator
from colrow.mesh import replicas
from colrow.model import calls_for
from colrow.state import parallel_module
from colrow.trace import Example
from colrow.train.configuration import TrainConfiguration
from colrow.train.folder import RunFolder
from colrow.train.model import DTYPES, named_plan, new_model, transformers_configuration
from colrow.train.optimizer import build_optimizer, resume_optimizer
from colrow.train.tokenizer import load_tokenizer


def device_of(mesh: DeviceMesh) -> torch.device:
    """This rank's device."""
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_ranks() -> Communicator:
    """All ranks of the job, whatever they are in the mesh."""
    everyone = dist.group.WORLD
    assert everyone is not None  # there is a mesh
    return communicator(everyone)


def _of_sequences() -> dict[str, Example]:
    """Training, to be recorded with a cache: without one transformers looks for several sequences in one."""
    ids = torch.randint(2, (2, 12))
    example = Example(keywords={"input_ids": ids, "labels": ids})
    return {"training": example, "evaluation": example}


def build(
    configuration: TrainConfiguration, folder: RunFolder, mesh: DeviceMesh, checkpoint: Path | None
) -> tuple[Any, torch.optim.Optimizer]:
    """The model, cut over the mesh, with its replicas and in training mode, and its optimizer.

    Args:
        configuration: what to build.
        folder: of the run, with its tokenizer.
        mesh: the ranks.
        checkpoint: resume from this one.
    """
    dtype = DTYPES[configuration.precision]
    source = checkpoint / "model" if checkpoint is not None else configuration.model.path
    torch.manual_seed(configuration.seed)  # replicas have the same weights
    plan = named_plan(configuration.model.plan)
    pipeline: dict[str, Any] = {
        "schedule": configuration.mesh.schedule,
        "micro_batches": configuration.replica_batch // configuration.micro_batch,
    }
    model: Any
    if source is None:
        description = transformers_configuration(configuration.model, load_tokenizer(folder.tokenizer))
        model = new_model(description, dtype)
        model.config.use_cache = model.config.use_cache or configuration.mesh.cp > 1
        calls = calls_for(model) if configuration.mesh.cp == 1 else _of_sequences()
        colrow.parallelize(model, mesh, plan or calls, share=configuration.mesh.share)
        if configuration.mesh.pp > 1:
            model = colrow.pipeline_parallel(model, mesh, calls["training"], **pipeline)
    else:
        # the attention's implementation is no part of a saved configuration
        chosen = {k: v for k, v in configuration.model.fields.items() if k == "attn_implementation"}
        has_parts = configuration.mesh.cp > 1
        chosen |= {"use_cache": True} if has_parts else {}
        model = load_pretrained(
            source,
            mesh,
            plan,
            dtype=dtype,
            share=configuration.mesh.share,
            pipeline=pipeline,
            calls=_of_sequences() if has_parts else None,
            **chosen,
        )
    model.to(device_of(mesh))
    if configuration.checkpoint_activations:
        whole: Any = parallel_module(model)
        whole.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if replicas(mesh).size() > 1:
        model = colrow.data_parallel(model, mesh, "fsdp" if configuration.mesh.data == "fsdp" else "ddp")
    divided = mesh if configuration.mesh.data == "zero1" else None
    optimizer = build_optimizer(model, configuration.optimizer, divided)
    if checkpoint is not None:
        resume_optimizer(model, optimizer, checkpoint / "optimizer")
    return model, optimizer

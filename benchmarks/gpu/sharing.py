"""Two ranks on one device, through gloo: do they compute what one does, in the precisions of training?"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaForCausalLM

import colrow

from .parts import SMALL

TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
"""Of losses, relative, and of gradients, relative to the largest of each parameter's."""


@dataclass(frozen=True)
class Shared:
    """What two ranks have computed: the loss of one device, theirs, and the largest error of gradients."""

    whole: float
    cut: float
    gradients: float


def compare(device: str, dtype: str, ranks: int) -> Shared:
    """On each rank: a forward and backward of a small Llama, whole and cut."""
    os.environ["LOCAL_RANK"] = "0"  # all ranks are on the first device
    if device == "cuda" and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))  # NCCL wants a device for each rank
    mesh = colrow.init_mesh(tp=ranks, device=device, timeout=120)
    sizes = SMALL["small Llama"]
    torch.manual_seed(0)
    whole = nn.Module.to(LlamaForCausalLM(sizes.configuration()), device, getattr(torch, dtype))
    ids = torch.randint(sizes.vocabulary, (sizes.batch, sizes.sequence)).to(device)
    cut = colrow.parallelize(copy.deepcopy(whole), mesh, {"input_ids": ids, "labels": ids})
    losses: list[float] = []
    for model in (whole, cut):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    layouts, rank = colrow.state_of(cut).layouts, mesh.get_local_rank("tp")
    worst = 0.0
    for name, parameter in cut.named_parameters():
        expected = whole.get_parameter(name).grad
        assert expected is not None
        assert parameter.grad is not None
        part = layouts[name].slice(expected, rank) if name in layouts else expected
        largest = expected.abs().max().clamp(min=1e-12)
        worst = max(worst, float((parameter.grad - part).abs().max() / largest))
    return Shared(losses[0], losses[1], worst)

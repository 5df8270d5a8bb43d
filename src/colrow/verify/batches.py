"""Batches of different content for replicas, and what one device that has all of them is to reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from colrow.trace import Example
from colrow.trace.tree import map_tensors


def batch_of(example: Example, step: int, replica: int, seed: int) -> Example:
    """An example with the same shapes and other content, for one replica in one step.

    Integers of two or more dimensions, such as token ids, change places within their tensor, so that they
    stay what the model accepts; tensors of one shape alike, so that labels still belong to their tokens.
    Floating-point inputs become others of the same mean and spread. Booleans stay.

    Args:
        example: of which the first replica's first step is a copy.
        step, replica: whose batch.
        seed: of the content.
    """
    if step == 0 and replica == 0:
        return example

    def change(tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed((seed * 1009 + step) * 1009 + replica)
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            spread = tensor.detach().std() if tensor.numel() > 1 else tensor.new_ones(())
            return tensor.detach().mean() + spread * noise
        if tensor.dim() > 1 and tensor.dtype in (torch.int32, torch.int64):
            places = torch.randperm(tensor.numel(), generator=generator)
            return tensor.reshape(-1)[places].view(tensor.shape)
        return tensor.clone()

    arguments, keywords = map_tensors((tuple(example.arguments), dict(example.keywords)), change)
    return Example(arguments, keywords)


def weight_of(step: int, replica: int) -> float:
    """How much a replica's loss counts in a step: all differ, so that none can be taken for another."""
    return 1.0 + 0.37 * replica + 0.11 * step


def keywords_of(example: Example) -> Mapping[str, Any]:
    """The keywords of an example that a mesh can be verified with.

    Raises:
        ValueError: if it has arguments without names.
    """
    if example.arguments:
        raise ValueError("on a mesh with more than tp, give the model's inputs as keywords of its forward")
    return example.keywords

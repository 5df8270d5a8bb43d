"""Architectures that nobody listed: what a derived plan has to cope with beyond transformers' models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this file may be loaded by path, from anywhere

import other_attention as attention
import other_mixing as mixing

BATCH, LENGTH = 2, 10
SPREAD = 0.1
"""Standard deviation of the noise on all parameters: no mistake hides behind zeros and ones."""

Inputs = dict[str, Any]


def _states(name: str = "x", length: int = LENGTH) -> Callable[[], Inputs]:
    return lambda: {name: torch.randn(BATCH, length, attention.HIDDEN)}


def _ids(length: int = LENGTH) -> Tensor:
    return torch.randint(3, attention.VOCABULARY, (BATCH, length))


def _images() -> Inputs:
    return {"images": torch.randn(BATCH, 3, 16, 16)}


def _texts() -> Inputs:
    return {"source": _ids(), "target": _ids(7)}


def _labelled() -> Inputs:
    ids = _ids()
    return {"ids": ids, "labels": ids.roll(-1, 1)}


def _clicks() -> Inputs:
    return {"dense": torch.randn(6, 9), "sparse": torch.randint(13, (2, 6, 4))}


def _graph() -> Inputs:
    edges = torch.cat([torch.arange(7).expand(2, 7), torch.randint(7, (2, 12))], 1)
    return {"nodes": torch.randn(7, attention.HIDDEN), "edges": edges}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "complex-rotary": (attention.ComplexRotary, _states()),
    "windows": (attention.Windows, _states(length=64)),
    "linear-attention": (attention.LinearAttention, _states()),
    "latents": (attention.Latents, _states()),
    "slopes": (attention.Slopes, _states()),
    "shared-layer": (attention.Shared, _states()),
    "separate-heads": (attention.SeparateHeads, _states()),
    "fused-block": (attention.FusedBlock, _states()),
    "tied-norms": (attention.TiedNorms, _states()),
    "translator": (attention.Translator, _texts),
    "lstm": (mixing.Recurrent, lambda: {"ids": _ids()}),
    "lstm:labels": (mixing.Recurrent, _labelled),
    "gated-recurrence": (mixing.Gated, _states()),
    "mobile": (mixing.Mobile, _images),
    "dense-unet": (mixing.Dense, _images),
    "spectral": (mixing.Spectral, _states()),
    "state-space": (mixing.StateSpace, _states("u")),
    "switch": (mixing.Switch, _states()),
    "recommender": (mixing.Recommender, _clicks),
    "graph": (mixing.Graph, _graph),
    "adapted": (mixing.Adapted, _states()),
    "quantised": (mixing.Quantised, _images),
    "dispatched": (mixing.Dispatched, _states()),
    "recomputed": (mixing.Recomputed, _states()),
}


def names() -> list[str]:
    """All names."""
    return list(MODELS)


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A model in float64 on the CPU, in evaluation mode, and the keywords of a call; the same every time.

    Raises:
        KeyError: if there is no such name.
    """
    torch.manual_seed(0)
    build_model, make_inputs = MODELS[name]
    model = build_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
    return model.double(), {key: _double(value) for key, value in make_inputs().items()}


def _double(item: Any) -> Any:
    return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item

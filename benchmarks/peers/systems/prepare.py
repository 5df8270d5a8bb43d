"""Writes the initial weights of a case's model, once, for all systems to read."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from ..shapes import Case
from .models import Gpt, gpt2_configuration, is_gpt, llama_configuration
from .trainer import folder_of_model

MATRIX_SCALE = 0.05
"""Large enough for logits that differ, so that the loss depends on every layer from the first step."""
VECTOR_SCALE = 0.02


def prepare(case: Case, folder: Path) -> None:
    """Write the model in the layout of transformers, and the GPT also under its own names."""
    target = folder_of_model(folder, case)
    if is_gpt(case):
        gpt = Gpt(case.shape)
        initialise(gpt)
        model: Any = GPT2LMHeadModel(gpt2_configuration(case.shape))
        model.load_state_dict(gpt2_weights(gpt.state_dict(), case.shape.layers))
        target.mkdir(parents=True, exist_ok=True)
        save_file(gpt.state_dict(), target / "gpt.safetensors")
    else:
        model = LlamaForCausalLM(llama_configuration(case.shape))
        initialise(model)
    model.save_pretrained(target)


def initialise(model: nn.Module) -> None:
    """Random values in every parameter, also in those that usually start at zero or one."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(0, MATRIX_SCALE)
            else:
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, VECTOR_SCALE)


def gpt2_weights(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The weights of :class:`Gpt` by the names and in the layout of transformers' GPT-2."""
    renamed = {
        "transformer.wte.weight": weights["tokens.weight"],
        "transformer.wpe.weight": weights["positions"][0],
        "transformer.ln_f.weight": weights["norm.weight"],
        "transformer.ln_f.bias": weights["norm.bias"],
        "lm_head.weight": weights["head.weight"],
    }
    for layer in range(layers):
        old, new = f"blocks.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            fused = [weights[f"{old}attention.{part}.{kind}"] for part in ("query", "key", "value")]
            matrices = {
                "attn.c_attn": torch.cat(fused),
                "attn.c_proj": weights[f"{old}attention.output.{kind}"],
                "mlp.c_fc": weights[f"{old}feed_forward.up.{kind}"],
                "mlp.c_proj": weights[f"{old}feed_forward.down.{kind}"],
            }
            for name, value in matrices.items():
                renamed[f"{new}{name}.{kind}"] = (
                    value.mT.contiguous() if value.dim() > 1 else value
                )  # GPT-2 keeps [in, out]
            renamed[f"{new}ln_1.{kind}"] = weights[f"{old}attention_norm.{kind}"]
            renamed[f"{new}ln_2.{kind}"] = weights[f"{old}feed_forward_norm.{kind}"]
    return renamed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    prepare(Case.from_json(json.loads(options.case)), options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

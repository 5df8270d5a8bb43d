"""What the ranks of ``meshes.py`` run: one training on a mesh after the other, each against one device."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import colrow
from colrow.trace import Example
from colrow.verify import verify_on_ranks

VOCABULARY, ROWS, LENGTH = 67, 4, 19
TIMEOUT = 120.0


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=20,
            intermediate_size=41,
            num_hidden_layers=4,
            num_attention_heads=10,
            num_key_value_heads=5,
            head_dim=4,
            initializer_range=0.2,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=20,
            n_layer=4,
            n_head=5,
            n_inner=41,
            n_positions=32,
            attn_pdrop=0.0,  # a ring cannot drop weights of attention
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def _t5() -> nn.Module:
    configuration = T5Config(vocab_size=VOCABULARY, d_model=20, d_kv=4, d_ff=41, num_layers=2, num_heads=5)
    configuration.decoder_start_token_id = 0
    return T5ForConditionalGeneration(configuration)


def _mixtral() -> nn.Module:
    configuration = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=22,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=4,
        num_local_experts=5,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    configuration._experts_implementation = "eager"  # what it calls by default takes no float64 on CPUs
    return MixtralForCausalLM(configuration)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "t5": _t5,
    "mixtral": _mixtral,
}


def _inputs() -> dict[str, Tensor]:
    """Ids, and labels of which some are ignored: not as many in each row."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def run(cases: Sequence[Mapping[str, Any]], output: str) -> None:
    """Verify each case, and append a line to ``output`` as soon as its result is known."""
    for case in cases:
        begin = time.monotonic()
        mesh = colrow.init_mesh(**case["mesh"], device="cpu", timeout=TIMEOUT)
        pipeline = {"schedule": case["schedule"], "micro_batches": ROWS} if case["schedule"] else {}
        example = {"training": Example(keywords=_inputs())}
        report = verify_on_ranks(
            MODELS[case["model"]], example, mesh, data=case["data"], sequence=case["sequence"], **pipeline
        )
        errors = [
            check.error for check in report.checks if check.kind in ("outputs", "gradients", "parameters")
        ]
        if dist.get_rank() == 0:
            row = {
                **case,
                "equal": report.passed,
                "error": max(errors),
                "seconds": time.monotonic() - begin,
                "detail": "" if report.passed else str(report.failed[0]),
            }
            with Path(output).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        dist.destroy_process_group()  # the threads of hundreds of groups would slow down what follows

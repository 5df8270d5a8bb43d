"""A builder file whose models do what the files of others may do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def names() -> list[str]:
    return ["good", "raises", "hangs", "exits", "is killed", "prints and dies in a rank", "reads data"]


class Fatal(nn.Module):
    """Ends its process when it is used for real."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_meta:
            print("the last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.linear(x)


class Reader(nn.Module):
    """Asks for the data of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else x


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "raises":
        raise LookupError("no such model today")
    if name == "hangs":
        Path(os.environ["AWKWARD_PID"]).write_text(str(os.getpid()))
        time.sleep(3600)
    if name == "exits":
        os._exit(7)
    if name == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    x = {"x": torch.randn(2, 4, dtype=torch.float64)}
    if name == "reads data":
        return Reader().double(), x
    if name == "prints and dies in a rank":
        return Fatal().double(), x
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=12,
        intermediate_size=17,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        bos_token_id=1,
        eos_token_id=2,
    )
    ids = torch.randint(3, 31, (2, 5))
    return LlamaForCausalLM(config).double().eval(), {"input_ids": ids, "use_cache": False}

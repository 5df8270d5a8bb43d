"""Runs a program in which transformers stays in float64 throughout, as ``tests.apply.double`` has it.

python -m tests.engines.in_double PROGRAM ARGUMENTS
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from transformers.loss import loss_utils
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.apply.double import _causal_loss, _normalise


@contextmanager
def staying_in_double() -> Iterator[None]:
    """In this process, as long as the context lasts."""
    with (
        mock.patch.object(LlamaRMSNorm, "forward", _normalise),
        mock.patch.dict(loss_utils.LOSS_MAPPING, {"ForCausalLM": _causal_loss}),
        mock.patch.object(loss_utils, "ForCausalLMLoss", _causal_loss),  # Trainer asks which one it is
    ):
        yield


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with staying_in_double():
        runpy.run_path(sys.argv[0], run_name="__main__")

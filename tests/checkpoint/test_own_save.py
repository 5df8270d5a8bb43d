"""A cut model's own ``save_pretrained`` is an error."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from colrow.apply.refusals import refuse_own_save


def test_own_save_is_refused(tmp_path: Path) -> None:
    """The model's own method would write one rank's shards as if they were the model."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    other = LlamaForCausalLM(config)
    refuse_own_save(model)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"Call colrow\.save_pretrained\(model, folder\) on all ranks"):
            one.save_pretrained(tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    other.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()
    plain = nn.Linear(2, 2)
    refuse_own_save(plain)
    assert not hasattr(plain, "save_pretrained")

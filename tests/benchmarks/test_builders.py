"""The other builder files: what they name they build, and it runs."""

from __future__ import annotations

import pytest
import torch

from colrow.axes import infer
from colrow.trace import trace
from tests.benchmarks.builders import load

other = load("other")
everything = load("transformers_all")


@pytest.mark.parametrize("name", other.names())
def test_every_operator_of_other_architectures_is_known(name: str) -> None:
    model, inputs = other.build(name)
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    assert infer(trace(model, (), inputs)).unknown == {}


def test_every_configuration_of_transformers_is_named() -> None:
    names = everything.names()
    assert len(names) > 800
    assert {"LlamaConfig:causal-lm", "T5Config:seq2seq-lm", "ViTConfig:image-classification"} <= set(names)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("OPTConfig:causal-lm", "OPTForCausalLM"),
        ("MixtralConfig:causal-lm:labels", "MixtralForCausalLM"),
        ("ViTConfig:image-classification:labels", "ViTForImageClassification"),
        ("BertConfig:token-classification", "BertForTokenClassification"),
    ],
)
def test_models_of_transformers_are_small_and_run(name: str, kind: str) -> None:
    model, inputs = everything.build(name)
    assert type(model).__name__ == kind
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert model.training == name.endswith("labels") == ("labels" in inputs)
    with torch.no_grad():
        output = model(**inputs)
    assert ("loss" in output) == name.endswith("labels")
    assert output.logits.dtype == torch.float64


def test_what_does_not_exist_is_an_error() -> None:
    with pytest.raises(KeyError, match="has no model for masked-lm"):
        everything.build("OPTConfig:masked-lm")
    with pytest.raises(ValueError, match="no configuration"):
        everything.build("NoSuchConfig")

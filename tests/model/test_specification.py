"""Models by name: built on meta or for real, with inputs that they take; mistakes in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow.model import LoadedModel, load

transformers = pytest.importorskip("transformers")

LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
}


def keywords(loaded: LoadedModel, mode: str) -> dict[str, Any]:
    return dict(loaded.examples[mode].keywords)


def test_a_configuration_of_any_size_takes_no_memory() -> None:
    loaded = load("transformers:DeepseekV3Config")
    assert loaded.name == type(loaded.model).__name__ == "DeepseekV3ForCausalLM"
    assert all(one.is_meta for one in loaded.model.parameters())
    assert sum(one.numel() for one in loaded.model.parameters()) > 600e9
    training, evaluation = keywords(loaded, "training"), keywords(loaded, "evaluation")
    assert training.keys() - evaluation.keys() == {"labels"}
    ids: Tensor = evaluation["input_ids"]
    assert (ids.shape, ids.dtype, ids.is_meta) == ((2, 10), torch.int64, False)
    assert len(ids.unique()) > 5, "real and different words"


def test_settings_reach_the_configuration_and_nested_ones() -> None:
    loaded = load("transformers:LlamaConfig", {"num_hidden_layers": "3", "tie_word_embeddings": "true"})
    assert loaded.model.config.num_hidden_layers == 3
    assert loaded.model.config.tie_word_embeddings is True
    loaded = load("transformers:Gemma3Config", {"text_config.num_hidden_layers": 6})
    assert loaded.model.config.text_config.num_hidden_layers == 6
    assert loaded.model.config.vision_config.num_hidden_layers == 12
    assert len(loaded.model.config.text_config.layer_types) == 6


def test_a_real_model_runs_with_its_examples_and_the_seed_decides() -> None:
    loaded = load("transformers:LlamaConfig", LLAMA, device="cpu", seed=3)
    output = loaded.model(**keywords(loaded, "training"))
    assert output.loss.isfinite()
    assert loaded.model(**keywords(loaded, "evaluation")).loss is None
    before = torch.random.get_rng_state()
    again, other = (load("transformers:LlamaConfig", LLAMA, device="cpu", seed=seed) for seed in (3, 4))
    assert torch.equal(before, torch.random.get_rng_state()), "the caller's random numbers go on"
    weight = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(loaded.model.get_parameter(weight), again.model.get_parameter(weight))
    assert not torch.equal(loaded.model.get_parameter(weight), other.model.get_parameter(weight))
    ids = [keywords(one, "evaluation")["input_ids"] for one in (loaded, again, other)]
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])


@pytest.mark.parametrize(
    ("name", "inputs", "labels"),
    [
        ("BertConfig", {"input_ids": (2, 10)}, (2, 10)),
        ("T5Config", {"input_ids": (2, 10), "decoder_input_ids": (2, 7)}, (2, 7)),
        ("ViTConfig", {"pixel_values": (2, 3, 64, 64)}, (2,)),
        ("WhisperConfig", {"input_features": (2, 80, 256), "decoder_input_ids": (2, 7)}, (2, 7)),
        ("MambaConfig", {"input_ids": (2, 10)}, (2, 10)),
        ("SegformerConfig", {"pixel_values": (2, 3, 128, 128)}, (2,)),
    ],
)
def test_shrunken_models_run_in_both_modes(
    name: str, inputs: dict[str, Any], labels: tuple[int, ...]
) -> None:
    loaded = load(f"transformers:{name}", shrink=True, device="cpu")
    given = {
        key: tuple(one.shape)
        for key, one in keywords(loaded, "evaluation").items()
        if isinstance(one, Tensor)
    }
    assert given == inputs
    loaded.model.eval()(**keywords(loaded, "evaluation"))
    training = keywords(loaded, "training")
    assert tuple(training["labels"].shape) == labels
    loss = loaded.model.train()(**training).loss
    loss.backward()
    assert loss.isfinite()


def test_labels_that_belong_to_logits_of_images() -> None:
    loaded = load("transformers:UperNetConfig", shrink=True, device="cpu")
    training = keywords(loaded, "training")
    assert training["labels"].shape[0] == 2
    assert loaded.model.train()(**training).loss.isfinite()


def test_a_folder(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        **LLAMA, dtype="bfloat16", architectures=["LlamaForSequenceClassification"]
    )
    config.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), {"num_hidden_layers": 3})
    assert loaded.name == "LlamaForSequenceClassification"
    assert len(loaded.model.model.layers) == 3
    assert {one.dtype for one in loaded.model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["num_hidden_layers"] == 2, "the folder is as it was"


def test_lists_of_layers_follow_their_number(tmp_path: Path) -> None:
    transformers.Gemma3TextConfig(hidden_size=48, num_hidden_layers=6, head_dim=8).save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "config.json").read_text())["layer_types"]) == 6
    config = load(str(tmp_path), {"num_hidden_layers": 2}).model.config
    assert config.layer_types == ["sliding_attention"] * 2


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(str(tmp_path))


class Perceptron(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.up = nn.Linear(16, width)
        self.down = nn.Linear(width, 16)
        self.register_buffer("scale", torch.full((16,), 0.5))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.down(self.up(x).relu()) * self.scale
        return y if labels is None else (y, nn.functional.mse_loss(y, labels))


def factory(width: int = 24, labels: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    inputs = {"x": torch.randn(3, 16), "mask": torch.ones(3, dtype=torch.long)}
    del inputs["mask"]
    return Perceptron(width), inputs | ({"labels": torch.randn(3, 16)} if labels else {})


def without_inputs() -> nn.Module:
    return Perceptron()


def of_transformers() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def wrong() -> int:
    return 3


def test_a_function_builds_on_meta_while_its_inputs_are_real() -> None:
    loaded = load(f"{__name__}:factory", {"width": "32", "labels": "yes"})
    assert loaded.name == "Perceptron"
    assert loaded.model.up.weight.shape == (32, 16)
    assert all(one.is_meta for one in loaded.model.parameters())
    assert loaded.model.scale.tolist() == [0.5] * 16, "buffers keep what was computed"
    assert keywords(loaded, "evaluation").keys() == {"x"}
    assert keywords(loaded, "training").keys() == {"x", "labels"}
    assert not keywords(loaded, "training")["x"].is_meta
    real = load(f"{__name__}:factory", device="cpu")
    assert real.model(**keywords(real, "evaluation")).isfinite().all()


def test_a_function_that_returns_a_model_of_transformers() -> None:
    loaded = load(f"{__name__}:of_transformers")
    assert all(one.is_meta for one in loaded.model.parameters())
    assert keywords(loaded, "evaluation")["input_ids"].shape == (2, 10)


@pytest.mark.parametrize(
    ("specification", "settings", "message"),
    [
        ("transformers:LamaConfig", {}, "no configuration 'LamaConfig': did you mean LlamaConfig or"),
        ("transformers:LlamaModel", {}, "no configuration 'LlamaModel'"),
        ("transformers:LlamaConfig", {"num_hiden_layers": 3}, "did you mean num_hidden_layers?"),
        ("transformers:Gemma3Config", {"text_config.layers": 3}, "has no field 'text_config.layers'"),
        ("transformers:LlamaConfig", {"vocab_size": "many"}, "transformers refuses this configuration"),
        ("transformers:GPT2Config", {"n_head": 5}, "the model of GPT2Config cannot be built"),
        ("transformers:SamMaskDecoderConfig", {}, "it describes a part of another model"),
        ("nowhere", {}, "'nowhere' is neither transformers:SomeConfig, nor a folder"),
        (__name__, {}, "is a module: name the function in it that returns the model, as in"),
        ("no.such.module:f", {}, "there is no module 'no.such.module'"),
        (f"{__name__}:missing", {}, "has no function or class 'missing'"),
        (f"{__name__}:factory", {"depth": 3}, "cannot be called with these settings"),
        (f"{__name__}:wrong", {}, "returned a int, not a module"),
        (f"{__name__}:without_inputs", {}, r"return \(model, inputs\)"),
    ],
)
def test_mistakes(specification: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(specification, settings)


def test_only_configurations_are_shrunk() -> None:
    with pytest.raises(ValueError, match=r"let .* build a small model"):
        load(f"{__name__}:factory", shrink=True)


def test_a_package_that_a_module_lacks_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load("needs_more:build")
    sys.modules.pop("needs_more", None)


@pytest.mark.parametrize("name", ["LlavaConfig", "Qwen2_5_VLConfig"])
def test_words_stand_for_features_of_images(name: str) -> None:
    loaded = load(f"transformers:{name}", shrink=True, device="cpu")
    given = keywords(loaded, "training")
    assert "pixel_values" in given
    token = getattr(loaded.model.config, "image_token_id", None)
    assert 0 < int((given["input_ids"] == token).sum()) < given["input_ids"].numel()
    loss = loaded.model.train()(**given).loss
    loss.backward()
    vision = [one.grad for path, one in loaded.model.named_parameters() if "vis" in path and one.dim() > 1]
    assert any(one is not None and bool(one.any()) for one in vision), "the images reach the loss"


def test_images_of_a_whole_model_on_meta() -> None:
    given = keywords(load("transformers:PaliGemmaConfig", {"text_config.num_hidden_layers": 1}), "evaluation")
    assert given["pixel_values"].shape == (2, 3, 224, 224)
    # 224 / 14 patches along each side, and ten words
    assert given["input_ids"].shape == (2, 256 + 10)


def test_a_model_whose_images_do_not_fit_its_words_is_given_words() -> None:
    # by default its vision part has results of 3584 features, its words 8192
    given = keywords(
        load("transformers:Qwen2_5_VLConfig", {"text_config.num_hidden_layers": 1}), "evaluation"
    )
    assert "pixel_values" not in given
    assert given["input_ids"].shape == (2, 10)

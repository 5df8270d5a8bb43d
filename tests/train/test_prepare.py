"""What is checked and written before any rank starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from colrow.train.folder import RunFolder
from colrow.train.model import check_names, transformers_configuration
from colrow.train.parse import parse
from colrow.train.prepare import open_sequences, prepare, read_prepared
from colrow.train.tokenizer import load_tokenizer, train_tokenizer
from tests.train.small import LLAMA, small, write_text


def test_prepares_a_folder(tmp_path: Path) -> None:
    configuration = small(tmp_path)
    lines = prepare(configuration)
    folder = RunFolder(tmp_path / "run")
    data = read_prepared(folder)
    assert data is not None
    training, validation = open_sequences(folder, configuration.data, data.vocab_size)
    assert validation is not None
    text = (tmp_path / "text.txt").read_text()
    # everything comes back but the leftovers of the last sequences, and no part of it twice
    tokenizer = load_tokenizer(folder.tokenizer)
    held_out = tokenizer.decode(validation.take(range(len(validation))).flatten())
    for part in held_out.split("<|endoftext|>"):
        assert part in text
    seen = tokenizer.decode(training.take(range(len(training))).flatten())
    for part in seen.split("<|endoftext|>"):
        assert part in text
    left_over = 2 * 16 * 5
    count = sum(len(one.replace("<|endoftext|>", "")) for one in (seen, held_out))
    assert len(text) - left_over <= count <= len(text)
    assert 0.03 < len(held_out) / len(text) < 0.07
    assert "LlamaConfig" in lines[0]
    assert f"{len(training)} sequences of 16 for training, {len(validation)} for validation" in lines[1]
    assert not (folder.path / "preparing").exists()
    again = parse([str(folder.configuration)])
    assert again == configuration


def test_parameter_count_is_the_models(tmp_path: Path) -> None:
    lines = prepare(small(tmp_path))
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **LLAMA))
    assert f"{sum(one.numel() for one in model.parameters()):,} parameters" in lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"config": "LamaConfig"}}, "there is no configuration LamaConfig; did you mean Llama"),
        ({"model": {"config": "T5Config"}}, "no causal language model has the configuration T5Config"),
        ({"model": {"config": "Llama"}}, "did you mean LlamaConfig"),
        (
            {"model": {"fields": {"hiden_size": 3}}},
            "LlamaConfig has no field hiden_size; did you mean hidden_size",
        ),
        (
            {"model": {"fields": {**LLAMA, "hidden_size": 37}}},
            r"do not make a LlamaConfig: The hidden size \(37\)",
        ),
        ({"model": {"fields": {**LLAMA, "hidden_size": "x"}}}, "do not make a LlamaConfig: .*expected int"),
        ({"model": {"fields": {**LLAMA, "vocab_size": 299}}}, "vocab_size=299 is too small.*at least 300"),
        ({"model": {"config": None, "fields": {}, "path": "/nowhere"}}, "no folder /nowhere with a model"),
        ({"data": {"text": "/nowhere"}}, "no text file or folder /nowhere"),
        ({"data": {"tokenizer": "/nowhere"}}, "no folder /nowhere with a tokenizer"),
        ({"data": {"sequence_length": 65}}, "65 tokens is longer than .*max_position_embeddings=64"),
        ({"data": {"max_characters": 100}}, "tokens are fewer than one sequence of 16: "),
        (
            {"data": {"validation_fraction": 0.0001}},
            "validation: .* raise data.validation_fraction, or set it to 0",
        ),
        ({"sample": {"tokens": 64}}, "sample.*is longer than the model's"),
        (
            {"model": {"config": "MambaConfig", "fields": {}}, "run_dir": "{folder}/text.txt"},
            "is a file: name a folder",
        ),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_text(tmp_path)
    if "run_dir" in changes:
        changes["run_dir"] = changes["run_dir"].format(folder=tmp_path)
    if "model" in changes and "fields" in changes["model"] and "config" not in changes["model"]:
        changes["model"]["config"] = "LlamaConfig"
    with pytest.raises(ValueError, match=message) as error:
        prepare(small(tmp_path, **changes))
    assert "\n" not in str(error.value)
    assert [one.name for one in tmp_path.iterdir()] == ["text.txt"]


def test_a_folder_with_a_run(tmp_path: Path) -> None:
    prepare(small(tmp_path))
    tokens = (tmp_path / "run/data/training.bin").stat()
    with pytest.raises(ValueError, match="already holds a run: continue it with --resume, delete it with"):
        prepare(small(tmp_path))
    # what cannot be used does not delete what is there
    with pytest.raises(ValueError, match="hiden_size"):
        prepare(small(tmp_path, overwrite=True, model={"fields": {"hiden_size": 3}}))
    assert (tmp_path / "run/data/training.bin").stat().st_mtime_ns == tokens.st_mtime_ns
    with pytest.raises(ValueError, match=r"has data\.vocab_size=300, not 310: to resume it leave that"):
        prepare(small(tmp_path, resume=True, data={"vocab_size": 310}))
    with pytest.raises(ValueError, match=r"has seed=0, not 1"):
        prepare(small(tmp_path, resume=True, seed=1))
    prepare(small(tmp_path, resume=True, mesh={"tp": 2}, steps=99))
    assert (tmp_path / "run/data/training.bin").stat().st_mtime_ns == tokens.st_mtime_ns
    assert parse([str(tmp_path / "run/config.yaml")]) == small(tmp_path, mesh={"tp": 2}, steps=99)
    (tmp_path / "run/notes.txt").write_text("mine")
    prepare(small(tmp_path, overwrite=True, data={"vocab_size": 310}))
    data = read_prepared(RunFolder(tmp_path / "run"))
    assert data is not None
    assert data.vocab_size == 310
    assert (tmp_path / "run/notes.txt").exists()


def test_separate_validation_text(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_text(other, words=200)
    prepare(small(tmp_path, data={"validation_text": str(other)}))
    folder = RunFolder(tmp_path / "run")
    data = read_prepared(folder)
    assert data is not None
    assert data.characters == len((tmp_path / "text.txt").read_text())


def test_no_validation(tmp_path: Path) -> None:
    configuration = small(tmp_path, data={"validation_fraction": 0.0})
    assert "none for validation" in prepare(configuration)[1]


def test_model_without_recomputation(tmp_path: Path) -> None:
    fields = {"n_embd": 16, "n_layer": 1, "num_attention_heads": 2}
    configuration = small(
        tmp_path, checkpoint_activations=True, model={"config": "OpenAIGPTConfig", "fields": fields}
    )
    with pytest.raises(ValueError, match="OpenAIGPTLMHeadModel cannot recompute its layers"):
        prepare(configuration)


@pytest.mark.parametrize("damage", [None, "config", "empty"])
def test_folder_to_fine_tune(tmp_path: Path, damage: str | None) -> None:
    source = tmp_path / "source"
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **LLAMA)).save_pretrained(source)
    train_tokenizer([write_text(tmp_path).read_text()], 300).save_pretrained(str(source))
    configuration = small(tmp_path, model={"config": None, "fields": {}, "path": str(source)})
    if damage == "config":
        (source / "config.json").unlink()
        with pytest.raises(ValueError, match=r"has no config\.json"):
            prepare(configuration)
    elif damage == "empty":
        (source / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"config\.json cannot be used"):
            prepare(configuration)
    else:
        prepare(configuration)


def _configuration(name: str, **fields: Any) -> Callable[..., Any]:
    tokenizer = train_tokenizer(["a b c"], 300)
    from colrow.train.configuration import ModelConfiguration

    return transformers_configuration(ModelConfiguration(name, fields), tokenizer)


def test_names_of_other_spellings() -> None:
    configuration = _configuration("GPT2Config", hidden_size=8, n_head=2, attn_implementation="eager")
    assert configuration.n_embd == 8
    assert configuration._attn_implementation == "eager"
    assert configuration.eos_token_id == 0


def test_every_causal_configuration_is_known() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from colrow.train.configuration import ModelConfiguration

    for model_type in list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[::12]:
        check_names(ModelConfiguration(CONFIG_MAPPING_NAMES[model_type]))

"""``colrow generate`` as a user calls it, on a small model of random weights with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from colrow.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 heads in 3 groups: two ranks get unequal parts."""
    path = tmp_path_factory.mktemp("model")
    words = {word: index for index, word in enumerate(["<unk>", "<end>", *"abcdefghijklmnopqrstuvwxyz"])}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>").save_pretrained(
        path
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=36,
        intermediate_size=41,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("tp", ["2", pytest.param("4", marks=pytest.mark.slow)])
def test_compares_with_the_whole_model(folder: Path, tp: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", str(folder), "--tp", tp, "--prompt", "a b c", "--prompt", "x"]
    assert main([*arguments, "--max_new_tokens", "12", "--min_new_tokens", "12", "--compare"]) == 0
    shown = capfd.readouterr().out
    assert shown.count("the same 12 tokens as the whole model") == 2
    assert f"tp={tp}: 24 tokens" in shown


@pytest.mark.slow
def test_sampling_is_the_same_on_all_ranks(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", str(folder), "--tp", "2", "--prompt", "q", "--temperature", "1.0"]
    assert main([*arguments, "--max_new_tokens", "8", "--seed", "3", "--compare"]) == 0
    assert "tokens as the whole model" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "0"], "--tp must be a number of ranks, at least 1, not 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
        (["--min_new_tokens", "50"], "--min_new_tokens must be from 0 to --max_new_tokens"),
        (["--temperature", "-1"], "--temperature must not be negative"),
        (["--model", "nowhere"], "nowhere is neither"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *arguments]) == 2
    shown = capfd.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1

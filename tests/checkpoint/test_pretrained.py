"""Checkpoints in global form: bit for bit the original's weights, from any number of ranks to any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import colrow
from colrow import checkpoint
from colrow.checkpoint.writer import SafetensorsWriter, TensorSpec
from tests.plans import hand_plan
from tests.pool import Pool, worker_mesh


def _build(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(5)
    if kind == "llama":
        config: Any = LlamaConfig(
            vocab_size=211,
            hidden_size=36,
            intermediate_size=61,
            num_hidden_layers=2,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            max_position_embeddings=32,
        )
        return LlamaForCausalLM(config).to(dtype)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=211, n_embd=20, n_layer=2, n_head=5, n_positions=32)
        return GPT2LMHeadModel(config).to(dtype)
    config = BertConfig(
        vocab_size=211,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=33,
        max_position_embeddings=32,
    )
    return BertForMaskedLM(config).to(dtype)


def _save(size: int, kind: str, dtype: torch.dtype, folder: Path, limit: int) -> None:
    mesh = worker_mesh(size)
    model = _build(kind, dtype)
    colrow.parallelize(model, mesh, hand_plan(model))
    checkpoint.save_pretrained(model, folder, bytes_per_file=limit)


def _reload(size: int, folder: Path, kind: str) -> dict[str, Any]:
    """Load at another degree, compare every shard with the original's slice."""
    mesh = worker_mesh(size)
    model = checkpoint.load_pretrained(folder, mesh)
    original = _build(kind, next(model.parameters()).dtype)
    state = colrow.state_of(model)
    names = [name for name, _ in original.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    for name, parameter in original.named_parameters():
        expected = state.layouts[name].slice(parameter.detach(), state.communicator.rank)
        assert torch.equal(model.get_parameter(name), expected), name
        assert model.get_parameter(name).requires_grad
    ids = torch.arange(3, 15).view(1, 12)
    with torch.no_grad():
        found, expected = model(ids).logits.double(), original.eval()(ids).logits.double()
    return {"error": (found - expected).abs().max().item(), "scale": expected.abs().max().item()}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("size", "other"), [(1, 2), (2, 3), (3, 4), (4, 1)])
def test_save_and_load_at_another_degree(
    ranks: Callable[[int], Pool], tmp_path: Path, kind: str, size: int, other: int
) -> None:
    ranks(size).run(_save, size, kind, torch.float32, tmp_path, 2**40)
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    plain = auto.from_pretrained(tmp_path)
    original = _build(kind)
    for (name, found), (_, expected) in zip(
        plain.state_dict().items(), original.state_dict().items(), strict=True
    ):
        assert torch.equal(found, expected), name
    for result in ranks(other).run(_reload, other, tmp_path, kind):
        assert result["error"] < 1e-5 * result["scale"]


def test_same_file_as_transformers_writes(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    """Keys, shapes, dtypes and bytes, for a model with tied weights, in bfloat16."""
    ranks(2).run(_save, 2, "llama", torch.bfloat16, tmp_path / "ours", 2**40)
    _build("llama", torch.bfloat16).save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )
    configs = [json.loads((tmp_path / one / "config.json").read_text()) for one in ("ours", "theirs")]
    assert configs[0] == configs[1]


def test_several_files(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"of an earlier save")
    ranks(2).run(_save, 2, "gpt2", torch.float32, tmp_path, 20_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert "model.safetensors" not in files
    assert not list(tmp_path.glob("*.partial"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain.transformer.wte.weight, _build("gpt2").transformer.wte.weight)  # type: ignore[union-attr]
    for result in ranks(3).run(_reload, 3, tmp_path, "gpt2"):
        assert result["error"] < 1e-5 * result["scale"]
    ranks(2).run(_save, 2, "gpt2", torch.float32, tmp_path, 2**40)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.bool,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
    ],
)
def test_dtypes_and_empty_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {"a": torch.tensor([[1, 0], [3, 1]]).to(dtype), "b": torch.zeros(0, 4, dtype=dtype)}
    specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in values.items()]
    with SafetensorsWriter(tmp_path / "x.safetensors", specs) as writer:
        for name, value in values.items():
            writer.tensor(name).copy_(value)
    found = load_file(tmp_path / "x.safetensors")
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name].to(torch.complex128), value.to(torch.complex128))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        ids = torch.randint(3, 211, (2, 10), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0, "lr": 2e-3},
    ]


def _optimizer_saved(size: int, folder: Path) -> list[float]:
    model = _build("llama")
    colrow.parallelize(model, worker_mesh(size), hand_plan(model))
    optimizer = torch.optim.AdamW(_groups(model), lr=1e-3)
    _train(model, optimizer, 3)
    checkpoint.save_pretrained(model, folder)
    checkpoint.save_optimizer(model, optimizer, folder)
    return _train(model, optimizer, 4)


def _optimizer_loaded(size: int, folder: Path) -> list[float]:
    model = checkpoint.load_pretrained(folder, worker_mesh(size))
    model.train()
    optimizer = torch.optim.AdamW(_groups(model), lr=7.0)
    checkpoint.load_optimizer(model, optimizer, folder)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 2e-3]
    assert isinstance(optimizer.param_groups[0]["betas"], tuple)
    with pytest.raises(ValueError, match="2 parameter groups, this one 1"):
        checkpoint.load_optimizer(model, torch.optim.AdamW(model.parameters()), folder)
    return _train(model, optimizer, 4)


@pytest.mark.parametrize(("size", "other"), [(2, 2), (2, 3), (3, 1), (1, 4)])
def test_optimizer_state_at_another_degree(
    ranks: Callable[[int], Pool], tmp_path: Path, size: int, other: int
) -> None:
    expected = ranks(size).run(_optimizer_saved, size, tmp_path)[0]
    for found in ranks(other).run(_optimizer_loaded, other, tmp_path):
        if size == other:
            assert found == expected  # the same bits
        else:
            assert found == pytest.approx(expected, abs=2e-6)


def _refused(folder: Path) -> None:
    mesh = worker_mesh(2)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        checkpoint.load_pretrained(folder / "nowhere", mesh)
    with pytest.raises(FileNotFoundError, match="neither model"):
        checkpoint.load_pretrained(folder / "empty", mesh)
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights: model\.norm\.weight"):
        checkpoint.load_pretrained(folder / "lacking", mesh)
    with pytest.raises(ValueError, match=r"has the shape \[61, 36\] .* expects \[62, 36\]"):
        checkpoint.load_pretrained(folder / "good", mesh, intermediate_size=62)
    model = checkpoint.load_pretrained(folder / "good", mesh)
    with pytest.raises(FileNotFoundError, match="no optimizer state"):
        checkpoint.load_optimizer(model, torch.optim.AdamW(model.parameters()), folder)
    with pytest.warns(UserWarning, match="tensors that the model does not: extra"):
        checkpoint.load_pretrained(folder / "more", mesh)


def test_errors(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = _build("llama")
    for name in ("good", "lacking", "more", "empty"):
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
    (tmp_path / "empty" / "model.safetensors").unlink()
    tensors = load_file(tmp_path / "good" / "model.safetensors")
    save_file(tensors | {"extra": torch.zeros(1)}, tmp_path / "more" / "model.safetensors", {"format": "pt"})
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "lacking" / "model.safetensors", {"format": "pt"})
    ranks(2).run(_refused, tmp_path)

"""Text, tokens, sequences and their order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colrow.train.data import DataOrder, PackedSequences, derived_seed, write_tokens
from colrow.train.text import hold_out, read_documents
from colrow.train.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

VERSE = "In the beginning God created the heavens and the earth. "


def test_files_and_folders_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md").write_text("third")
    (tmp_path / "sub" / "d.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text(" \n")
    assert read_documents(str(tmp_path)) == ["first", "second", "third"]
    assert read_documents([str(tmp_path / "b.txt"), str(tmp_path / "sub")]) == ["second", "third"]
    assert read_documents(str(tmp_path), max_characters=8) == ["first", "sec"]


def test_bible() -> None:
    (document,) = read_documents("bible")
    assert document.startswith("In the beginning God created the heavens and the earth.")
    assert document.endswith("be with all the saints. Amen.")
    assert len(document) == 4054647


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no text file or folder"),
        (lambda path: path.mkdir(), "holds no .txt or .md files"),
        (lambda path: path.write_text(" \n"), "there is no text in"),
        (lambda path: path.write_bytes(b"caf\xe9"), r"is not UTF-8 text \(byte 3"),
    ],
)
def test_unusable_sources(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "source.txt")
    with pytest.raises(ValueError, match=message):
        read_documents(str(tmp_path / "source.txt"))


@given(
    st.lists(st.text(alphabet="ab \n", min_size=1, max_size=300), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.02, 0.1, 0.5]),
)
def test_hold_out_divides_every_character(documents: list[str], fraction: float) -> None:
    training, validation = hold_out(documents, fraction)
    counts = Counter("".join(training)) + Counter("".join(validation))
    assert counts == Counter("".join(documents))
    assert all(any(part in document for document in documents) for part in [*training, *validation])
    held = sum(map(len, validation))
    longest = max((len(word) for document in documents for word in document.split()), default=0)
    total = sum(map(len, documents))
    assert held <= fraction * total + total * fraction / 2 + longest + 2
    if fraction == 0:
        assert not validation


def test_hold_out_takes_its_share_evenly() -> None:
    words = [f"word{number}" for number in range(50_000)]
    training, validation = hold_out([" ".join(words)], 0.05)
    held = [word for part in validation for word in part.split()]
    assert 0.045 < len(held) / len(words) < 0.055
    # nothing is in both, nothing is lost, and every fifth of the text has its part
    assert set(held).isdisjoint(word for part in training for word in part.split())
    assert sorted(held + [word for part in training for word in part.split()]) == sorted(words)
    positions = [int(word[4:]) * 5 // len(words) for word in held]
    assert set(positions) == {0, 1, 2, 3, 4}


def test_tokenizer_encodes_anything_and_comes_back(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([VERSE * 50], 300)
    assert len(tokenizer) <= 300
    for text in (VERSE, "naïve 日本 \x00\n\t", "  spaces  ."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == END_OF_TEXT
    tokenizer.save_pretrained(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    assert loaded(VERSE)["input_ids"] == tokenizer(VERSE)["input_ids"]
    assert loaded.eos_token_id == tokenizer.eos_token_id
    again = train_tokenizer([VERSE * 50], 300)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_unusable_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer = train_tokenizer([VERSE], 300)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="no eos_token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_packing_keeps_every_token_in_order(tmp_path: Path, vocab_size: int) -> None:
    tokenizer = train_tokenizer([VERSE * 20], 300)
    tokenizer.add_tokens([f"<{number}>" for number in range(vocab_size - len(tokenizer))])
    documents = [VERSE * 3, "a short one" if vocab_size == 300 else "<69000>", VERSE]
    count = write_tokens(documents, tokenizer, tmp_path / "training.bin")
    expected = []
    for document in documents:
        expected += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
    assert count == len(expected)
    packed = PackedSequences(tmp_path / "training.bin", len(tokenizer), 7)
    assert len(packed) == count // 7
    everything = packed.take(range(len(packed)))
    assert everything.dtype == torch.int64
    assert everything.flatten().tolist() == expected[: len(packed) * 7]
    assert torch.equal(packed.take([3, 0]), everything[[3, 0]])


@pytest.mark.parametrize("documents", [[], ["a"]])
def test_too_little_text(tmp_path: Path, documents: list[str]) -> None:
    tokenizer = train_tokenizer([VERSE], 300)
    write_tokens(documents, tokenizer, tmp_path / "training.bin")
    with pytest.raises(ValueError, match="fewer than one sequence of 7"):
        PackedSequences(tmp_path / "training.bin", len(tokenizer), 7)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**63 - 1))
def test_every_epoch_visits_every_sequence_once(count: int, batch_size: int, seed: int) -> None:
    order = DataOrder(count, batch_size, seed)
    steps = 3 * count // batch_size + 1
    flat = [index for step in range(steps) for index in order.indices(step)]
    for epoch in range(len(flat) // count):
        assert sorted(flat[epoch * count : (epoch + 1) * count]) == list(range(count))
    # a fresh order, asked for one step alone, says the same: nothing depends on what came before
    last = steps - 1
    assert DataOrder(count, batch_size, seed).indices(last) == order.indices(last)
    assert order.indices(0) == flat[:batch_size]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order = DataOrder(100, 100, seed=1)
    assert order.indices(0) != order.indices(1)
    assert order.indices(0) != DataOrder(100, 100, seed=2).indices(0)
    assert order.indices(0) != list(range(100))


def test_derived_seeds_differ() -> None:
    seeds = [
        derived_seed(seed, purpose, number)
        for seed in (0, 1, 2**40)
        for purpose in ("step", "epoch")
        for number in (0, 1, 2**33)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)

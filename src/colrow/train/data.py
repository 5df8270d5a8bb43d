"""Tokens on disk, packed into sequences of one length, and which of them each step trains on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_BATCH_CHARACTERS = 1 << 24


def write_tokens(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, path: Path) -> int:
    """Encode the documents, each followed by the end-of-text token, into one file of numbers.

    The numbers have two bytes, or four if the tokenizer has more than 65536 tokens.

    Returns:
        The number of tokens.
    """
    kind = _number_type(len(tokenizer))
    count = 0
    with path.open("wb") as file:
        for batch in _batches(documents):
            encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for ids in encoded["input_ids"]:
                np.asarray([*ids, tokenizer.eos_token_id], kind).tofile(file)
                count += len(ids) + 1
    return count


def _number_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    """Documents in order, a bounded number of characters at a time."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class PackedSequences:
    """Tokens cut into sequences of one length, read from disk as they are needed.

    Documents follow each other, separated by the end-of-text token; what is left over after the last whole
    sequence is dropped.

    Args:
        path: written by :func:`write_tokens`.
        vocab_size: length of the tokenizer that wrote it.
        sequence_length: tokens per sequence.

    Raises:
        ValueError: if there is not one whole sequence.
    """

    def __init__(self, path: Path, vocab_size: int, sequence_length: int) -> None:
        kind = _number_type(vocab_size)
        tokens = np.memmap(path, kind, mode="r") if path.stat().st_size else np.empty(0, kind)
        self.count = len(tokens) // sequence_length
        if not self.count:
            raise ValueError(
                f"{path.stem}: {len(tokens)} tokens are fewer than one sequence of {sequence_length}"
            )
        self._tokens = tokens[: self.count * sequence_length].reshape(self.count, sequence_length)

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Sequence[int]) -> Tensor:
        """These sequences: int64 [len(indices), sequence_length]."""
        return torch.from_numpy(self._tokens[list(indices)].astype(np.int64))


class DataOrder:
    """Which sequences each step trains on: a function of the seed and the step alone.

    Every epoch visits every sequence once, in an order of its own. A step may span two epochs.

    Args:
        count: number of sequences.
        batch_size: sequences per step.
        seed: of the order.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> list[int]:
        """The sequences of step 0, 1, ..."""
        first = step * self.batch_size
        return [self._at(position) for position in range(first, first + self.batch_size)]

    def _at(self, position: int) -> int:
        epoch, within = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", epoch))
            self._order, self._epoch = torch.randperm(self.count, generator=generator), epoch
        return int(self._order[within])


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """An independent seed for each purpose and number, the same on every rank and at every tp."""
    words = [seed & 0xFFFFFFFF, seed >> 32, *purpose.encode(), 0, number & 0xFFFFFFFF, number >> 32]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))

"""Everything that happens once, before any rank starts: checks, the run's folder, tokenizer and tokens."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from colrow.train.configuration import DataConfiguration, TrainConfiguration
from colrow.train.data import PackedSequences, write_tokens
from colrow.train.folder import RunFolder, write_atomically
from colrow.train.model import (
    check_length,
    check_names,
    check_on_meta,
    named_plan,
    transformers_configuration,
)
from colrow.train.parse import to_yaml
from colrow.train.text import hold_out, read_documents
from colrow.train.tokenizer import load_tokenizer, train_tokenizer

_FIXED = ("seed", "batch_size", "model", "data")
"""What a resumed run cannot change: it would not be the same run any more."""


@dataclass(frozen=True)
class PreparedData:
    """The tokens of a run, as ``data/data.json`` describes them.

    Attributes:
        settings: the configuration that made them.
        characters: of the text for training.
        training_tokens: number of tokens to train on.
        validation_tokens: number of tokens held out.
        vocab_size: length of the tokenizer.
    """

    settings: dict[str, Any]
    characters: int
    training_tokens: int
    validation_tokens: int
    vocab_size: int


def prepare(configuration: TrainConfiguration) -> list[str]:
    """Check the configuration against the world, and write the run's folder with its tokens.

    Returns:
        Lines that tell the user what will be trained on what.

    Raises:
        ValueError: in one line, with the remedy, for anything that would stop the training later.
    """
    configuration.check()
    folder = RunFolder(configuration.run_folder)
    check_may_start(folder, configuration)
    check_names(configuration.model)
    with _staging(folder) as stage:
        data, tokenizer = _tokens(folder, stage, configuration)
        model = transformers_configuration(configuration.model, tokenizer)
        _check_lengths(model, tokenizer, configuration)
        plan = named_plan(configuration.model.plan)
        parameters = check_on_meta(model, plan, configuration.mesh, configuration.checkpoint_activations)
        fresh = stage.data.exists()
        training, validation = open_sequences(stage if fresh else folder, configuration.data, data.vocab_size)
        if configuration.overwrite:  # only now that nothing can go wrong any more
            folder.delete_run()
        if fresh:
            stage.move_data(folder)
    write_atomically(
        folder.configuration,
        to_yaml(dataclasses.replace(configuration, resume=False, overwrite=False)),
    )
    held_out = f"{len(validation)} for validation" if validation else "none for validation"
    return [
        f"{type(model).__name__} with {parameters:,} parameters, {configuration.precision}, "
        f"over {configuration.mesh}",
        f"{data.training_tokens:,} tokens of {data.vocab_size} kinds, "
        f"{data.characters / data.training_tokens:.2f} characters each: {len(training)} sequences of "
        f"{configuration.data.sequence_length} for training, {held_out}",
        f"writing to {folder.path}",
    ]


@contextmanager
def _staging(folder: RunFolder) -> Iterator[RunFolder]:
    """A folder inside the run's for what is not yet known to be usable; leaves nothing behind on errors."""
    existed = folder.path.exists()
    stage = RunFolder(folder.path / "preparing")
    shutil.rmtree(stage.path, ignore_errors=True)
    try:
        stage.path.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"run_dir {folder.path} cannot be written: {error.strerror}") from error
    try:
        yield stage
    except BaseException:
        shutil.rmtree(stage.path if existed else folder.path)
        raise
    shutil.rmtree(stage.path)


def _check_lengths(model: Any, tokenizer: PreTrainedTokenizerBase, configuration: TrainConfiguration) -> None:
    check_length(model, configuration.data.sequence_length, "data.sequence_length, a sequence,")
    if configuration.sample.prompt:
        prompt = tokenizer(configuration.sample.prompt, add_special_tokens=False)["input_ids"]
        check_length(model, len(prompt) + configuration.sample.tokens, "sample, its prompt and tokens,")


def record_steps(configuration: TrainConfiguration, steps: int | None) -> None:
    """A budget in minutes has become a number of steps: the run's configuration says so from now on."""
    fixed = dataclasses.replace(configuration, steps=steps, minutes=None, resume=False, overwrite=False)
    write_atomically(RunFolder(configuration.run_folder).configuration, to_yaml(fixed))


def read_prepared(folder: RunFolder) -> PreparedData | None:
    """What :func:`prepare` wrote, if it came to its end."""
    path = folder.data / "data.json"
    return PreparedData(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def open_sequences(
    folder: RunFolder, data: DataConfiguration, vocab_size: int
) -> tuple[PackedSequences, PackedSequences | None]:
    """The sequences for training and, if any are held out, for validation.

    Raises:
        ValueError: if there is not one whole sequence of either.
    """
    try:
        training = PackedSequences(folder.data / "training.bin", vocab_size, data.sequence_length)
    except ValueError as error:
        raise ValueError(f"{error}: give more data.text or a smaller data.sequence_length") from error
    if data.validation_text is None and data.validation_fraction == 0:
        return training, None
    try:
        path = folder.data / "validation.bin"
        return training, PackedSequences(path, vocab_size, data.sequence_length)
    except ValueError as error:
        raise ValueError(
            f"{error}: raise data.validation_fraction, or set it to 0 for no validation"
        ) from error


def check_may_start(folder: RunFolder, configuration: TrainConfiguration) -> None:
    """The folder is new, or the run in it may be continued or deleted.

    Raises:
        ValueError: if it holds a run that is neither, or another run than the one to resume.
    """
    if folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"run_dir {folder.path} is a file: name a folder")
    if folder.holds_run and configuration.resume:
        _check_same(yaml.safe_load(folder.configuration.read_text(encoding="utf-8")), configuration)
    elif folder.holds_run and not configuration.overwrite:
        raise ValueError(
            f"{folder.path} already holds a run: continue it with --resume, delete it with --overwrite, "
            "or choose another --run_dir"
        )


def _check_same(before: dict[str, Any], configuration: TrainConfiguration) -> None:
    now = yaml.safe_load(to_yaml(configuration))
    for name in _FIXED:
        was, now_is = before.get(name), now[name]
        if was == now_is:
            continue
        if isinstance(was, dict):
            key = next(one for one in now_is if was.get(one) != now_is[one])
            name, was, now_is = f"{name}.{key}", was.get(key), now_is[key]
        raise ValueError(
            f"the run in {configuration.run_dir} has {name}={was!r}, not {now_is!r}: "
            "to resume it leave that as it was, to change it start a run in another --run_dir"
        )


def _tokens(
    folder: RunFolder, stage: RunFolder, configuration: TrainConfiguration
) -> tuple[PreparedData, PreTrainedTokenizerBase]:
    """The tokens of the run to resume, or new ones in ``stage``."""
    settings = dataclasses.asdict(configuration.data)
    prepared = read_prepared(folder)
    if configuration.resume and prepared is not None:
        return prepared, load_tokenizer(folder.tokenizer)
    data = configuration.data
    documents = read_documents(data.text, data.max_characters)
    if data.validation_text is None:
        training, validation = hold_out(documents, data.validation_fraction)
    else:
        training, validation = documents, read_documents(data.validation_text)
    source = data.tokenizer or configuration.model.path
    tokenizer = load_tokenizer(source) if source else train_tokenizer(training, data.vocab_size)
    tokenizer.save_pretrained(str(stage.tokenizer))
    stage.data.mkdir()
    prepared = PreparedData(
        settings=settings,
        characters=sum(len(document) for document in training),
        training_tokens=write_tokens(training, tokenizer, stage.data / "training.bin"),
        validation_tokens=write_tokens(validation, tokenizer, stage.data / "validation.bin"),
        vocab_size=len(tokenizer),
    )
    write_atomically(stage.data / "data.json", json.dumps(dataclasses.asdict(prepared), indent=1))
    return prepared, tokenizer

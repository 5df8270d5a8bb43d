"""Continuing prompts: on ranks, and on one process to compare with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import colrow


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: at most so many.
        min_new_tokens: at least so many: until then the end of text is not an option.
        temperature: 0 takes the likeliest token each time.
        seed: of the random numbers where temperature is above 0; the same on every rank.
        chat: put each prompt into the model's chat template, as what a user says.
    """

    max_new_tokens: int = 40
    min_new_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False


@dataclass(frozen=True)
class Continuation:
    """One prompt's result: the new tokens and their text."""

    prompt: str
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Generated:
    """All results, and what they took.

    Attributes:
        continuations: in the prompts' order.
        seconds: for all prompts, without loading.
        local_bytes, total_bytes: of the parameters on this rank and in all.
        notes: what the plan left whole, and why.
    """

    continuations: tuple[Continuation, ...]
    seconds: float
    local_bytes: int
    total_bytes: int
    notes: tuple[str, ...] = ()


def continue_prompts(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], sampling: Sampling
) -> Generated:
    """Continue each prompt with ``model``, cut or not; every rank of a cut model calls this alike."""
    begin = time.perf_counter()
    done = []
    for prompt in prompts:
        if sampling.chat:
            message = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        inputs = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
        torch.manual_seed(sampling.seed)
        options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            options["temperature"] = sampling.temperature
        with torch.no_grad():
            ids = model.generate(  # type: ignore[operator]
                **{name: value.to(_device(model)) for name, value in inputs.items()},
                max_new_tokens=sampling.max_new_tokens,
                min_new_tokens=sampling.min_new_tokens or None,
                **options,
            )
        new = ids[0, inputs["input_ids"].shape[1] :].tolist()
        done.append(Continuation(prompt, tuple(new), tokenizer.decode(new, skip_special_tokens=True)))
    seconds = time.perf_counter() - begin
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return Generated(tuple(done), seconds, whole, whole)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def on_one_process(folder: Path, prompts: Sequence[str], sampling: Sampling) -> Generated:
    """What plain transformers gives: the model is whole and colrow has no part in it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    return continue_prompts(model, _tokenizer(AutoTokenizer, folder), prompts, sampling)


def on_ranks(folder: Path, prompts: Sequence[str], sampling: Sampling, tp: int, timeout: float) -> Generated:
    """The same with the model cut over ``tp`` ranks; runs on each of them."""
    from transformers import AutoTokenizer

    mesh = colrow.init_mesh(tp=tp, timeout=timeout)
    model = colrow.load_pretrained(folder, mesh).eval()
    result = continue_prompts(model, _tokenizer(AutoTokenizer, folder), prompts, sampling)
    count = colrow.count_parameters(model)
    notes = colrow.state_of(model).plan.notes
    return Generated(result.continuations, result.seconds, count.local_bytes, count.total_bytes, notes)


def _tokenizer(factory: Any, folder: Path) -> Any:
    try:
        return factory.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"there is no tokenizer in {folder}: {error}") from error

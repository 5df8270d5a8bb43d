"""What it costs to cut sequences over ranks: time of a step, activations, bytes, by Ulysses and by a ring.

    torchrun --nproc-per-node 2 benchmarks/context.py --length 1024 2048 --groups 8 2 1

A Llama with random weights learns from one sequence. Variants, all in one run and in turn: one rank with the
whole sequence, while the others wait; each way of attention over all ranks. ``kept`` are the bytes that a
forward pass keeps for the backward pass besides parameters, ``moved`` those that a rank gives to collectives
in a step. Times are medians over rounds, on the slowest rank; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import colrow
from colrow.errors import PlanError

VOCABULARY, WIDTH, HEADS, LAYERS = 1024, 256, 8, 4
WARM = 1
"""Steps before the first round."""


def model_of(groups: int) -> nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=groups,
        max_position_embeddings=1 << 17,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def step(model: nn.Module, ids: Tensor) -> float:
    """The loss of a forward and backward pass."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach())


def kept(model: nn.Module, ids: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, besides parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no memory is counted twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids).loss.backward()
    return sum(held.values())


def largest(number: float) -> float:
    """Over all ranks."""
    found = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def timed(call: Callable[[], Any]) -> float:
    """Seconds on the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    call()
    return largest(time.perf_counter() - begin)


def measure(length: int, groups: int, rounds: int, mesh: Any) -> list[dict[str, Any]]:
    """One row for each variant."""
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))
    original = model_of(groups)
    models: dict[str, nn.Module] = {"one rank": copy.deepcopy(original)}
    for way in ("ulysses", "ring"):
        example = {"input_ids": ids[:, :64], "labels": ids[:, :64]}
        try:
            models[way] = colrow.parallelize(copy.deepcopy(original), mesh, example, context=way)
        except PlanError as error:
            if mesh.get_rank() == 0:
                print(f"{way} with {groups} key-value heads: {error.cause}")
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        takes_part = name != "one rank" or mesh.get_rank() == 0
        for _ in range(WARM):
            loss = step(model, ids) if takes_part else 0.0
        colrow.reset_comm_stats()
        bytes_kept = kept(model, ids) if takes_part else 0
        moved = colrow.comm_stats().total.bytes
        rows[name] = {
            "length": length,
            "groups": groups,
            "variant": name,
            "loss": largest(loss),
            "kept": int(largest(bytes_kept)),
            "moved": int(largest(moved)),
            "seconds": [],
        }
    for _ in range(rounds):
        for name, model in models.items():
            takes_part = name != "one rank" or mesh.get_rank() == 0
            call = (lambda one=model: step(one, ids)) if takes_part else (lambda: None)
            rows[name]["seconds"].append(timed(call))
    reference = rows["one rank"]
    for row in rows.values():
        if abs(row["loss"] - reference["loss"]) > 1e-4:
            raise SystemExit(f"{row['variant']} has another loss: {row['loss']}, not {reference['loss']}")
        ratios = [own / one for own, one in zip(row["seconds"], reference["seconds"], strict=True)]
        row["ratio"] = statistics.median(ratios)
    return list(rows.values())


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    table = Table("tokens", "key-value heads", "variant", "s", "of one rank", "kept", "moved")
    for row in rows:
        table.add_row(
            str(row["length"]),
            str(row["groups"]),
            row["variant"],
            f"{statistics.median(row['seconds']):.3f}",
            f"{row['ratio']:.2f}",
            f"{row['kept'] / 1e6:.1f} MB",
            f"{row['moved'] / 1e6:.2f} MB",
        )
    Console(width=110).print(table)


def main() -> None:
    """Run the benchmark on all ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 2, 1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    mesh = colrow.init_mesh(cp=int(os.environ["WORLD_SIZE"]), device="cpu")
    rows = []
    for length in options.length:
        for groups in options.groups:
            rows += measure(length, groups, options.rounds, mesh)
    if dist.get_rank() == 0:
        show(rows)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

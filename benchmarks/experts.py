"""What a step of a model with experts communicates, holds and takes, by how the ranks divide it.

    OMP_NUM_THREADS=1 python benchmarks/experts.py --ranks 2 --rounds 5
    OMP_NUM_THREADS=1 python benchmarks/experts.py --ranks 4 --uneven

A Mixtral-shaped model on one batch in float32: the ranks cut inside experts (``tp``), divide the experts
(``ep``), or both. Every layout computes the same loss. Layouts take turns, so that what else the machine
does falls on all of them; times are medians over rounds, of the slowest rank. Bytes are what the rank that
sends most sends in one step, forward and backward, for experts and in all: of an all-reduce among n ranks
2 (n - 1) / n of its payload, of an all-to-all the rows that are for other ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import colrow
from colrow.collectives import Communicator, communicator
from colrow.launch import launch
from colrow.mesh import replicas, size_of
from colrow.state import placed_parameters, state_of

LOSS_TOLERANCE = 1e-5
VOCABULARY, LAYERS = 1024, 4
UNEVEN = 10.0
"""By what the logits of the first half of the experts are larger."""


def build(experts: int, choices: int, uneven: bool) -> nn.Module:
    """The model, the same on every rank; uneven loads fall on the first half of the experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=experts,
        num_experts_per_tok=choices,
    )
    model: nn.Module = MixtralForCausalLM(config)
    routers = [one for one in model.parameters() if one.shape == (experts, config.hidden_size)]
    assert len(routers) == LAYERS
    if uneven:
        with torch.no_grad():
            for router in routers:  # logits that vary more are among the largest more often
                router[: experts // 2] *= UNEVEN
    return model


def measure(
    sizes: Sequence[dict[str, int]],
    experts: int,
    choices: int,
    uneven: bool,
    rows: int,
    length: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """On one rank: every layout in turns."""
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    everyone = communicator(colrow.init_mesh(tp=math.prod(sizes[0].values()), device="cpu")["tp"])
    layouts = []
    for size in sizes:
        mesh = colrow.init_mesh(**size, device="cpu")
        example = {"input_ids": ids[:1], "labels": ids[:1]}
        model: nn.Module = colrow.parallelize(build(experts, choices, uneven), mesh, example)
        if replicas(mesh).size() > 1:
            model = colrow.data_parallel(model, mesh)
        own = ids.chunk(replicas(mesh).size())[replicas(mesh).get_local_rank()]
        layouts.append((mesh, model, own, torch.optim.AdamW(model.parameters(), lr=1e-4)))
    found: list[dict[str, Any]] = [{"layout": size, "times": []} for size in sizes]
    for number in range(rounds + 1):
        for row, (mesh, model, own, optimizer) in zip(found, layouts, strict=True):
            torch.distributed.barrier()
            colrow.reset_comm_stats()
            with _exchanged_with_others() as exchanged:
                begin = time.perf_counter()
                loss = model(input_ids=own, labels=own).loss
                loss.backward()
                colrow.clip_grad_norm_(model, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                seconds = time.perf_counter() - begin
            if number:
                row["times"].append(_largest(everyone, seconds))
                continue
            # the first step allocates, and is not timed
            mean = communicator(replicas(mesh)).all_reduce(loss.detach()) / replicas(mesh).size()
            row["loss"] = float(mean)
            of_experts, others = _sent(mesh)
            row["sent_for_experts"] = _largest(everyone, of_experts + sum(exchanged))
            row["sent"] = _largest(everyone, of_experts + others + sum(exchanged) + _replicated(model, mesh))
            row["parameters"] = _largest(everyone, colrow.count_parameters(model).local)
            if state_of(model).experts is not None:
                loads = torch.stack(list(colrow.expert_loads(model).values())).double()
                row["load"] = float((loads.amax(1) / loads.mean(1)).mean())
    return found


@contextmanager
def _exchanged_with_others() -> Iterator[list[int]]:
    """Bytes of the rows that this rank gives to others in exchanges of unequal counts."""
    sent: list[int] = []
    start = Communicator.start_exchange

    def counted(self: Communicator, tensor: Tensor, given: Sequence[int], *rest: Any, **named: Any) -> Any:
        row = tensor[:1].numel() * tensor.element_size()
        sent.append((sum(given) - given[self.rank]) * row)
        return start(self, tensor, given, *rest, **named)

    with patch.object(Communicator, "start_exchange", counted):
        yield sent


def _sent(mesh: Any) -> tuple[float, float]:
    """Bytes that this rank has sent in all-reduces: around experts, and elsewhere."""
    of_experts = others = 0.0
    for dimension in ("tp", "ep"):
        size = size_of(mesh, dimension)
        if size == 1:
            continue
        for (operation, label, _), tally in colrow.comm_stats(mesh[dimension]).tallies.items():
            if operation != "all_to_all":
                bytes_sent = 2 * tally.bytes * (size - 1) / size
                of_experts += bytes_sent * (".mlp" in label)
                others += bytes_sent * (".mlp" not in label)
    return of_experts, others


def _replicated(model: nn.Module, mesh: Any) -> float:
    """Bytes of the all-reduce of gradients over replicas, which have all but experts."""
    size = replicas(mesh).size()
    placed = [one for one in placed_parameters(model) if one.experts is None]
    return 2 * sum(one.parameter.nbytes for one in placed) * (size - 1) / size


def _largest(everyone: Communicator, value: float) -> float:
    return float(everyone.all_reduce(torch.tensor(value, dtype=torch.float64), "max"))


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    name = " x ".join(f"{one}={size}" for one, size in row["layout"].items())
    cells = [
        f"`{name}`",
        f"{row['parameters'] / 1e6:.2f}",
        f"{row['load']:.2f}" if "load" in row else "",
        f"{row['sent_for_experts'] / 1e6:.1f}",
        f"{row['sent'] / 1e6:.1f}",
        f"{1000 * statistics.median(row['times']):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--choices", type=int, default=2, help="experts of each token")
    parser.add_argument("--uneven", action="store_true", help="most tokens choose the first half")
    parser.add_argument("--rows", type=int, default=8, help="sequences of the batch, of all ranks together")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = vars(parser.parse_args())
    ranks, output = options.pop("ranks"), options.pop("output")
    sizes: list[dict[str, int]] = [{"tp": ranks}, {"ep": ranks}]
    if ranks > 2:
        sizes.append({"tp": 2, "ep": ranks // 2})
    rows = launch(f"{Path(__file__).stem}:measure", {"sizes": sizes, **options}, ranks, threads_per_rank=1)
    losses = [row["loss"] for row in rows]
    if max(losses) - min(losses) > LOSS_TOLERANCE * losses[0]:
        raise SystemExit(f"the layouts compute different losses: {losses}")
    print("| | parameters, M | largest load / mean | sent for experts, MB | sent in all, MB | step, ms |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(line(row))
    if output:
        output.write_text(json.dumps({"ranks": ranks, "options": options, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

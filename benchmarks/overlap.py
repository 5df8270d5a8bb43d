r"""Whether computing while a collective is under way makes a parallel linear layer faster.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py --json overlap.json
    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-endpoint HOST:29500 benchmarks/overlap.py
    RATE=1gbit unshare --user --map-root-user --net --mount --pid --fork --kill-child --mount-proc \
        bash tests/transport/two_hosts.sh 2 python benchmarks/overlap.py

Three linear layers, the forward alone, each in one piece and in several:

- *row*: a product of this rank's input features, summed over the ranks. In chunks of the tokens, each reduced
  while the next one is computed.
- *gather*: the tokens of all ranks are gathered and then multiplied (the entry of a region under sequence
  parallelism). Own tokens are multiplied while the others' come.
- *scatter*: a product, of which each rank gets the sum for its tokens (the exit). In chunks of every rank's
  tokens. Ring: the tokens of others are multiplied first, and travel while the own are.

With collectives through gloo, and through shared memory, where a collective runs while it is waited for:
nothing can overlap there, but smaller pieces may stay in a cache. Started by itself the program starts two
ranks; under torchrun it measures between those, so also between hosts. The third line makes two hosts of one
machine, with a network of that rate between them.

Every round runs every form, in rotating order, all ranks beginning together; its time is the slowest rank's.
What is quoted is the median over rounds of the ratio to the whole layer in the same round, with quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import colrow
from colrow.collectives import Communicator, communicator, reduce_scatter_of
from colrow.launch import launch
from colrow.layers.faster import agreed_products
from colrow.layers.linear_functions import product
from colrow.layers.products import BY_TORCH, Products

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = (256, 1024, 4096)
HIDDEN = (1024, 2048)
INNER = (1, 4)
"""Features inside of a region, as multiples of those outside: of attention, of a perceptron."""
CHUNKS = (2, 4)
KINDS = ("row", "gather", "scatter")
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How much a form's result may differ from the whole layer's, of its largest number."""

Form = Callable[[], Tensor]


class Layer:
    """One linear layer's operands on this rank, and the ways to compute it.

    Args:
        ranks: the group, with the transport to be measured.
        tokens: of all ranks, a multiple of their number.
        read: features of a token that this rank multiplies.
        written: features of a token that this rank computes.
        products: who multiplies.
    """

    def __init__(
        self,
        ranks: Communicator,
        tokens: int,
        read: int,
        written: int,
        dtype: torch.dtype,
        products: Products,
    ) -> None:
        generator = torch.Generator().manual_seed(ranks.rank)
        self.ranks, self.products = ranks, products
        self.x = torch.randn(tokens, read, generator=generator).to(dtype)
        self.weight = (torch.randn(written, read, generator=generator) / read**0.5).to(dtype)
        self.own = slice(ranks.rank * tokens // ranks.size, (ranks.rank + 1) * tokens // ranks.size)

    def _product(self, x: Tensor) -> Tensor:
        return product(x, self.weight, None, True, self.products)

    def row(self, chunks: int) -> Tensor:
        """[tokens, read] of each rank -> [tokens, written], summed."""
        begun = [
            self.ranks.start_all_reduce(self._product(part), owned=True) for part in self.x.chunk(chunks)
        ]
        results = [one.wait() for one in begun]
        return results[0] if chunks == 1 else torch.cat(results)

    def gather(self) -> Tensor:
        """This rank's tokens [tokens / ranks, read] -> [tokens, written] of all tokens."""
        return self._product(self.ranks.all_gather(self.x[self.own], 0))

    def gather_overlapped(self) -> Tensor:
        """The same; own tokens first."""
        begun = self.ranks.start_all_gather(self.x[self.own], 0)
        own = self._product(self.x[self.own])
        x = begun.wait()
        return torch.cat([self._product(x[: self.own.start]), own, self._product(x[self.own.stop :])])

    def scatter(self) -> Tensor:
        """[tokens, read] of each rank -> this rank's [tokens / ranks, written], summed."""
        return self.ranks.reduce_scatter(self._product(self.x), 0)

    def scatter_overlapped(self, chunks: int) -> Tensor:
        """The same, in chunks of every rank's tokens."""
        x = self.x.view(self.ranks.size, -1, self.x.shape[1])
        begun = [
            self.ranks.start_reduce_scatter(self._product(part.flatten(0, 1)), 0)
            for part in x.chunk(chunks, 1)
        ]
        return torch.cat([one.wait() for one in begun])

    def scatter_ring(self) -> Tensor:
        """The same, as colrow's layers do it where networks are slow: what is for others is sent first."""
        before, self.ranks.overlaps = self.ranks.overlaps, True
        sizes = [self.own.stop - self.own.start] * self.ranks.size
        try:
            return reduce_scatter_of(self.ranks, self.x, len(self.weight), self._product, 0, sizes, "ring")
        finally:
            self.ranks.overlaps = before

    def forms(self, kind: str) -> dict[str, Form]:
        """Every way to compute a layer of a kind, the whole one first."""
        if kind == "row":
            return {"whole": lambda: self.row(1), **{f"{n} chunks": partial(self.row, n) for n in CHUNKS}}
        if kind == "gather":
            return {"whole": self.gather, "own first": self.gather_overlapped}
        forms: dict[str, Form] = {"whole": self.scatter}
        forms |= {f"{n} chunks": partial(self.scatter_overlapped, n) for n in CHUNKS[:1]}
        is_ring = self.ranks._shared is None  # which only gloo sends
        return {**forms, "ring": self.scatter_ring} if is_ring else forms


@contextmanager
def _forced(transport: str) -> Any:
    """A group decides on its transport in its first collective, as the environment says then."""
    before = os.environ.get("COLROW_TRANSPORT")
    os.environ["COLROW_TRANSPORT"] = transport
    yield
    if before is None:
        del os.environ["COLROW_TRANSPORT"]
    else:
        os.environ["COLROW_TRANSPORT"] = before


def _groups() -> dict[str, Communicator]:
    """A communicator with each transport that serves all ranks alone."""
    groups = {}
    assert dist.group.WORLD is not None
    shm = communicator(dist.group.WORLD)
    shm.barrier()
    if shm._shared is not None:
        groups["shm"] = shm
    with _forced("gloo"):
        gloo = communicator(dist.new_group(backend="gloo"))
        gloo.barrier()
    return {**groups, "gloo": gloo}


def measure(kinds: list[str], dtypes: list[str], tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    """In each rank: a row per layer and transport, with the seconds of each form in every round.

    Args:
        kinds: of layers: row, gather, scatter.
        dtypes: of :data:`DTYPES`.
        tokens: of all ranks.
        rounds: how often each form is timed.
    """
    if not dist.is_initialized():
        colrow.init_mesh(tp=int(os.environ["WORLD_SIZE"]), device="cpu", timeout=300)
    groups = _groups()
    size = next(iter(groups.values())).size
    rows = []
    for dtype in dtypes:
        for hidden in HIDDEN:
            for inner in INNER:
                for number in tokens:
                    for kind in kinds:
                        read, written = inner * hidden // size, hidden
                        if kind == "gather":
                            read, written = written, read
                        layer = {
                            "kind": kind,
                            "dtype": dtype,
                            "hidden": hidden,
                            "inner": inner,
                            "tokens": number,
                        }
                        times = _rounds(groups, kind, number, read, written, DTYPES[dtype], rounds)
                        rows += [{**layer, "transport": name, "seconds": one} for name, one in times.items()]
    return rows


def _rounds(
    groups: dict[str, Communicator],
    kind: str,
    tokens: int,
    read: int,
    written: int,
    dtype: torch.dtype,
    rounds: int,
) -> dict[str, dict[str, list[float]]]:
    products = BY_TORCH
    if dtype == torch.float32:
        (products,) = agreed_products(groups["gloo"], [(read, written)])
    calls = {}
    for name, ranks in groups.items():
        layer = Layer(ranks, tokens, read, written, dtype, products)
        calls.update({(name, form): call for form, call in layer.forms(kind).items()})
    exact = next(iter(calls.values()))()
    for which, call in calls.items():
        error = float((call() - exact).abs().max() / exact.abs().max())
        if error > AGREEMENT[dtype]:
            raise AssertionError(f"{kind} {which} differs from the whole layer by {error:.1e}")
    order = list(calls)
    times: dict[tuple[str, str], list[float]] = {which: [] for which in order}
    for number in range(rounds):
        turn = number % len(order)
        for which in order[turn:] + order[:turn]:
            groups["gloo"].barrier()
            begin = time.perf_counter()
            calls[which]()
            times[which].append(time.perf_counter() - begin)
    slowest = groups["gloo"].all_reduce(torch.tensor([times[which] for which in order]), "max").tolist()
    return {
        name: {form: slowest[order.index((one, form))] for one, form in order if one == name}
        for name in groups
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the whole layer's milliseconds, and each other form's ratio to it, quartiles over rounds."""
    results = []
    for row in rows:
        seconds: dict[str, list[float]] = row["seconds"]
        whole = seconds["whole"]
        ratios = {
            form: statistics.quantiles(
                [one / reference for one, reference in zip(times, whole, strict=True)],
                n=4,
                method="inclusive",
            )
            for form, times in seconds.items()
            if form != "whole"
        }
        results.append({**row, "milliseconds": statistics.median(whole) * 1e3, "ratios": ratios})
    return results


def table(results: Sequence[dict[str, Any]], kind: str) -> Table:
    """Of one kind of layer: milliseconds in one piece, and the ratios of the other forms."""
    results = [row for row in results if row["kind"] == kind]
    shown = Table(
        title=f"{kind}: ratio to the whole layer (quartiles)", box=box.SIMPLE_HEAVY, title_justify="left"
    )
    forms = list(dict.fromkeys(form for row in results for form in row["ratios"]))
    for name in ("", "tokens", "hidden", "inner", "", "whole, ms", *forms):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in results:
        shown.add_row(
            row["dtype"],
            str(row["tokens"]),
            str(row["hidden"]),
            str(row["inner"] * row["hidden"]),
            row["transport"],
            f"{row['milliseconds']:.1f}",
            *(_quartiles(row["ratios"].get(form)) for form in forms),
        )
    return shown


def _quartiles(ratio: list[float] | None) -> str:
    return "" if ratio is None else "{1:.2f} ({0:.2f} to {2:.2f})".format(*ratio)


def main(arguments: list[str]) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Linear layers that compute during their collectives.")
    parser.add_argument("--ranks", type=int, default=2, help="where torchrun does not start them")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args(arguments)
    task = {name: getattr(options, name) for name in ("kinds", "dtypes", "tokens", "rounds")}
    if "RANK" in os.environ:
        rows = measure(**task)
        if os.environ["RANK"] != "0":
            return 0
    else:
        module = __spec__.name if __spec__ else Path(__file__).stem
        rows = launch(f"{module}:measure", task, options.ranks, timeout=3600)
    results = summary(rows)
    console = Console(width=max(Console().width, 140))
    for kind in options.kinds:
        console.print(table(results, kind))
    if options.json:
        record = {
            "options": task,
            "environment": {"torch": torch.__version__, "python": platform.python_version()},
            "results": results,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The processes that ``step.py`` measures: a model, its optimizer and data in each of them."""

from __future__ import annotations

import os
import re
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import colrow
from colrow.apply import parallelize
from colrow.collectives import Communicator, Pending
from colrow.model import calls_for
from colrow.plan import derive_plan
from colrow.transport import SharedGroup


@dataclass(frozen=True)
class Sizes:
    """Of a model and its batch; the feed-forward of the GPT is 4 x ``hidden``."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    feed_forward: int
    vocabulary: int
    sequence: int
    batch: int


SIZES = {
    "gpt": Sizes(4, 512, 8, 8, 2048, 8192, 256, 4),
    "llama": Sizes(4, 512, 8, 4, 1408, 8192, 256, 4),
    # nothing but overhead: a Llama whose products take no time
    "tiny": Sizes(4, 64, 4, 2, 176, 512, 8, 1),
}


@dataclass(frozen=True)
class Variant:
    """A way to run the step. ``ranks`` of 0 means one process without colrow, or ``copies`` at once.

    ``sequence`` is an argument of :func:`colrow.parallelize`. With ``keeps_gathered`` no layer gathers
    anything again in the backward pass.
    """

    name: str
    ranks: int
    threads: int
    communicates: bool = True
    compiled: bool = False
    copies: int = 1
    sequence: bool = False
    keeps_gathered: bool = False

    @property
    def processes(self) -> int:
        return self.ranks or self.copies


@dataclass
class Measured:
    """What one process measured in one round: per step seconds and CPU seconds; the loss of the last step.

    ``cpu_total`` counts all CPU seconds, also those between the steps, ``cpu_collectives`` those of a step in
    reductions through shared memory: summing, and waiting for other ranks without giving up the processor.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    cpu_total: float
    loss: float
    peak_megabytes: float
    cpu_collectives: float = 0.0
    collectives: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Count and bytes per step by operation."""


def build_model(name: str) -> nn.Module:
    """The model, with the same weights in every process."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = SIZES[name]
    if name == "gpt":
        gpt = transformers.GPT2Config(
            n_layer=sizes.layers,
            n_embd=sizes.hidden,
            n_head=sizes.heads,
            vocab_size=sizes.vocabulary,
            n_positions=sizes.sequence,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        return transformers.GPT2LMHeadModel(gpt)
    llama = transformers.LlamaConfig(
        num_hidden_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_value_heads,
        intermediate_size=sizes.feed_forward,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=sizes.sequence,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(llama)


def silence_collectives() -> None:
    """From now on every collective of this process gives back this rank's own values, in the right shape."""

    def same(self: Communicator, tensor: Tensor, *_: object, **__: object) -> Pending:
        return Pending.completed(tensor)

    def all_gather(
        self: Communicator, shard: Tensor, dimension: int, sizes: Sequence[int] | None = None, **_: object
    ) -> Pending:
        extent = shard.shape[dimension] * self.size if sizes is None else sum(sizes)
        shape = list(shard.shape)
        shape[dimension] = extent
        return Pending.completed(shard.new_zeros(shape))

    def reduce_scatter(
        self: Communicator, tensor: Tensor, dimension: int, sizes: Sequence[int] | None = None, **_: object
    ) -> Pending:
        extent = tensor.shape[dimension] // self.size if sizes is None else sizes[self.rank]
        return Pending.completed(tensor.narrow(dimension, 0, extent))

    for name, replacement in (
        ("start_all_reduce", same),
        ("start_broadcast", same),
        ("start_reduce", same),
        ("start_all_gather", all_gather),
        ("start_reduce_scatter", reduce_scatter),
    ):
        setattr(Communicator, name, replacement)


class CollectiveClock:
    """Counts this thread's CPU seconds within reductions through shared memory."""

    def __init__(self) -> None:
        self.seconds = 0.0
        reduce = SharedGroup.all_reduce

        def timed(group: SharedGroup, source: Tensor, result: Tensor, reduction: str = "sum") -> None:
            begin = time.thread_time()
            try:
                reduce(group, source, result, reduction)
            finally:
                self.seconds += time.thread_time() - begin

        SharedGroup.all_reduce = timed  # type: ignore[assignment, method-assign]


def peak_megabytes() -> float:
    """Highest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Trainer:
    """A model, its optimizer and data, in one process of one variant."""

    def __init__(self, variant: Variant, model_name: str) -> None:
        self.variant, self.sizes, self.is_tiny = variant, SIZES[model_name], model_name == "tiny"
        self.model = build_model(model_name)
        self.clock = CollectiveClock()
        if variant.ranks:
            mesh = colrow.init_mesh(tp=variant.ranks, device="cpu")
            plan = derive_plan(self.model, calls_for(self.model), variant.ranks, sequence=variant.sequence)
            if variant.keeps_gathered:
                gathers = tuple(replace(one, again=()) for one in plan.sequence_gathers)
                plan = replace(plan, sequence_gathers=gathers)
            parallelize(self.model, mesh, plan)
            if not variant.communicates:
                silence_collectives()
        self.model.train()
        if variant.compiled:
            self.model.compile()
        # the fused one where nothing but overhead is measured: the other's would hide it
        fused = True if self.is_tiny else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=fused)
        self.generator = torch.Generator().manual_seed(1)

    def run(self, steps: int) -> Measured:
        """Train ``steps`` steps; ranks start each of them together (of the tiny model the first)."""
        seconds, cpu_seconds, loss = [], [], torch.zeros(())
        colrow.reset_comm_stats()
        cpu_first, self.clock.seconds = time.process_time(), 0.0
        for number in range(steps):
            shape = (self.sizes.batch, self.sizes.sequence)
            tokens = torch.randint(self.sizes.vocabulary, shape, generator=self.generator)
            # where nothing but overhead is measured, the ranks' own collectives keep them together: after a
            # barrier, in which a rank gives up its processor, each step would begin with cold caches
            if self.variant.ranks > 1 and not (self.is_tiny and number):
                dist.barrier()  # torch's own: not counted, and not silenced
            cpu_begin, begin = time.process_time(), time.perf_counter()
            loss = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(time.process_time() - cpu_begin)
        cpu_total = time.process_time() - cpu_first
        moved: dict[str, tuple[float, float]] = {}
        stats = colrow.comm_stats()
        for operation in sorted({key[0] for key in stats.tallies}):
            tally = stats.where(operation=operation)
            moved[operation] = (tally.count / steps, tally.bytes / steps)
        collectives = self.clock.seconds / steps
        return Measured(seconds, cpu_seconds, cpu_total, loss.item(), peak_megabytes(), collectives, moved)


def become_rank(rank: int, ranks: int, port: int) -> None:
    """Say in the environment that this process is one of several on this host, as torchrun does."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def serve(variant: Variant, rank: int, port: int, model_name: str, connection: Connection) -> None:
    """A process of a variant: answers each number of steps with what it measured."""
    answer(variant, rank, port, connection, lambda: Trainer(variant, model_name), Trainer.run)


def answer(
    variant: Variant,
    rank: int,
    port: int,
    connection: Connection,
    start: Callable[[], Trainer],
    work: Callable[[Trainer, int], object],
) -> None:
    """Be one process of a variant: answer each number with the result of ``work``, until nobody asks."""
    try:
        torch.set_num_threads(variant.threads)
        if variant.ranks:
            become_rank(rank, variant.ranks, port)
        trainer = start()
        connection.send(None)
        while True:
            connection.send(work(trainer, connection.recv()))
    except EOFError:
        os._exit(1)
    except BaseException:
        connection.send(traceback.format_exc())
        os._exit(1)

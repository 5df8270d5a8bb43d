"""The processes that ``step.py`` measures: a model, its optimizer and data in each of them."""

from __future__ import annotations

import os
import re
import resource
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import colrow
from colrow.apply import parallelize
from colrow.collectives import Communicator, Pending
from colrow.model import calls_for

LAYERS, HIDDEN, HEADS, VOCABULARY, SEQUENCE, BATCH = 4, 512, 8, 8192, 256, 4
KEY_VALUE_HEADS, FEED_FORWARD = 4, 1408  # of the Llama; the GPT's feed-forward is 4 x HIDDEN


@dataclass(frozen=True)
class Variant:
    """A way to run the step. ``ranks`` of 0 means one process without colrow."""

    name: str
    ranks: int
    threads: int
    communicates: bool = True

    @property
    def processes(self) -> int:
        return max(1, self.ranks)


@dataclass
class Measured:
    """What one process measured in one round: per step seconds and CPU seconds; the loss of the last step.

    ``cpu_total`` counts all CPU seconds, also those between the steps.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    cpu_total: float
    loss: float
    peak_megabytes: float
    collectives: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Count and bytes per step by operation."""


def build_model(name: str) -> nn.Module:
    """The model, with the same weights in every process."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    if name == "gpt":
        gpt = transformers.GPT2Config(
            n_layer=LAYERS,
            n_embd=HIDDEN,
            n_head=HEADS,
            vocab_size=VOCABULARY,
            n_positions=SEQUENCE,
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
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        intermediate_size=FEED_FORWARD,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQUENCE,
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
        self.variant = variant
        self.model = build_model(model_name)
        if variant.ranks:
            mesh = colrow.init_mesh(tp=variant.ranks, device="cpu")
            parallelize(self.model, mesh, calls_for(self.model))
            if not variant.communicates:
                silence_collectives()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.generator = torch.Generator().manual_seed(1)

    def run(self, steps: int) -> Measured:
        """Train ``steps`` steps; ranks start each of them together."""
        seconds, cpu_seconds, loss = [], [], torch.zeros(())
        colrow.reset_comm_stats()
        cpu_first = time.process_time()
        for _ in range(steps):
            tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=self.generator)
            if self.variant.ranks > 1:
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
        return Measured(seconds, cpu_seconds, cpu_total, loss.item(), peak_megabytes(), moved)


def serve(variant: Variant, rank: int, port: int, model_name: str, connection: Connection) -> None:
    """A process of a variant: answers each number of steps with what it measured."""
    try:
        torch.set_num_threads(variant.threads)
        if variant.ranks:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(variant.ranks),
                LOCAL_WORLD_SIZE=str(variant.ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        trainer = Trainer(variant, model_name)
        connection.send(None)
        while (steps := connection.recv()) > 0:
            connection.send(trainer.run(steps))
    except EOFError:
        os._exit(1)
    except BaseException:
        connection.send(traceback.format_exc())
        os._exit(1)
    os._exit(0)

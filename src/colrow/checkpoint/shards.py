"""Sharded tensors to global files: used for weights and for the optimizer's state alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from colrow.checkpoint.holders import Holders
from colrow.checkpoint.optimizer_state import Source
from colrow.checkpoint.replacement import Replacement, partial_path
from colrow.checkpoint.stages import names_for_stages, stages_of
from colrow.checkpoint.writer import SafetensorsWriter, TensorSpec
from colrow.collectives import Communicator
from colrow.data_shards import joined
from colrow.layout import Cut, TensorLayout
from colrow.state import ParallelState

T = TypeVar("T")

BYTES_PER_FILE = 5 * 1024**3


@dataclass(frozen=True)
class Saved:
    """A tensor to save.

    Attributes:
        name: in the file.
        local: this rank's part of it.
        layout: where that lies in the whole.
        source: which replica has it, if not all of them do; ``local`` is on meta elsewhere.
        experts: the ranks that divide its experts, if they do.
    """

    name: str
    local: Tensor
    layout: TensorLayout
    source: Source | None = None
    experts: Communicator | None = None

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.local.dtype, self.layout.shape)

    def read(self) -> Tensor:
        """This tensor-parallel rank's part, which replicas may have to send: all of them call this.

        Of all experts, on the first of the ranks that divide them.
        """
        local = self.source.read(self.local) if self.source else joined(self.local.detach())
        if self.experts is None:
            return local
        row, ranks = local.shape[1:], self.experts
        counts = [(count, *row) for count in Cut.balanced(self.layout.shape[0], ranks.size).counts]
        sizes = [(prod(shape) * local.element_size(),) for shape in counts]
        parts = ranks.gather(local.reshape(-1).view(torch.uint8), sizes, label=f"save {self.name}")
        parts = [part.view(local.dtype).view(shape) for part, shape in zip(parts, counts, strict=bool(parts))]
        return torch.cat(parts) if parts else local


def split_files(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """What goes into each file: ``limit`` bytes or one tensor."""
    files: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if files[-1] and filled + spec.bytes > limit:
            files.append([])
            filled = 0
        files[-1].append(spec)
        filled += spec.bytes
    return files


def write_global(
    folder: Path,
    stem: str,
    tensors: Iterable[Saved],
    state: ParallelState,
    *,
    bytes_per_file: int = BYTES_PER_FILE,
    metadata: Mapping[str, str] | None = None,
    write_configurations: Callable[[Path], None] | None = None,
) -> None:
    """Write all ranks' shards as global tensors; called by every rank that holds the model.

    The first rank of the first replica receives one tensor's shards at a time and puts them where they
    belong in the file, which is mapped into memory. Of a pipeline each stage does that with its own files, in
    a folder that all of them see. Nobody returns before the files are complete; after each
    file all holders learn whether it was written, and if not, all raise.

    Args:
        folder: made if it does not exist.
        stem: ``model`` for ``model.safetensors``; several files get an index.
        tensors: in file order, the same on every rank.
        state: of the model.
        bytes_per_file: begin another file when one would grow beyond this.
        metadata: strings for the header of the file, or for the index of several.
        write_configurations: writes small files that belong to the tensors into the folder it is given.

    Raises:
        ValueError: if a dtype cannot be stored, or the ranks hold different models.
        OSError: if the folder cannot be written; on the writing rank its own error.
    """
    label, ranks, holders = f"save {folder}", state.communicator, Holders(state)
    saved = list(tensors)
    with holders.together(label):
        names = [f"{one.name} {one.spec.dtype_name} {one.layout.shape}" for one in saved]
    Holders(state, of_stage=True).require_same(
        "\n".join(names),
        "the ranks of the mesh hold tensors of different names, dtypes or shapes: along its other dimensions "
        "than tp and pp they must be replicas of one model",
        label,
    )
    takes_part = state.is_first_replica
    own = split_files([one.spec for one in saved], bytes_per_file)
    stage, stages = stages_of(own, state, label)
    groups = [specs for each in stages for specs in each]
    before = sum(len(each) for each in stages[:stage])
    by_name = {one.name: one for one in saved}
    with ExitStack() as stack:
        with holders.together(label):
            replacement = None
            if takes_part and ranks.rank == 0 and stage == 0:
                replacement = stack.enter_context(Replacement(folder, stem, len(groups)))
        files = names_for_stages(replacement.names if replacement else [], state, label)
        for number in range(max(len(each) for each in stages)):
            error = None
            specs = stages[stage][number] if number < len(stages[stage]) else []
            if takes_part and number < len(stages[stage]):
                path = partial_path(folder, files[before + number]) if ranks.rank == 0 else None
                strings = metadata if len(groups) == 1 else None
                error = _write_file(path, specs, by_name, ranks, strings)
            else:
                for spec in specs:
                    by_name[spec.name].read()  # the first replica may need this one's part
            holders.agree(error, label)
        with holders.together(label):
            if replacement is not None:
                if write_configurations is not None:
                    write_configurations(replacement.configurations)
                replacement.commit(_index(groups, replacement.names, metadata))


def _write_file(
    path: Path | None,
    specs: Sequence[TensorSpec],
    by_name: Mapping[str, Saved],
    ranks: Communicator,
    metadata: Mapping[str, str] | None,
) -> Exception | None:
    """One file, on the rank that has a ``path``; the others send. What went wrong with the file, if anything.

    After an error the writer goes on to receive, so that the other ranks come to where they learn of it.
    """
    errors: list[Exception] = []

    def attempt(work: Callable[[], T]) -> T | None:
        if not errors:
            try:
                return work()
            except Exception as error:
                errors.append(error)
        return None

    def place(writer: SafetensorsWriter, one: Saved, shards: Sequence[Tensor]) -> None:
        out = writer.tensor(one.name)
        for rank, shard in enumerate(shards):
            one.layout.without_window.place(shard, rank, out)

    with ExitStack() as stack:
        writer = None
        if path is not None:
            writer = attempt(lambda: stack.enter_context(SafetensorsWriter(path, specs, metadata)))
        for spec in specs:
            one = by_name[spec.name]
            shards = _gather(one, ranks)
            if writer is not None:
                attempt(partial(place, writer, one, shards))
            del shards  # before the next ones arrive
        if writer is not None:
            attempt(writer.finish)
    return errors[0] if errors else None


def _gather(one: Saved, ranks: Communicator) -> list[Tensor]:
    """The shards of all ranks on the first one, on the CPU; as bytes, which any transport can move."""
    local = one.read()
    layout = one.layout.without_window
    if not layout.is_sharded:
        return [local.cpu()] if ranks.rank == 0 else []
    shapes = [layout.local_shape(rank) for rank in range(ranks.size)]
    counts = [(layout.local_numel(rank) * local.element_size(),) for rank in range(ranks.size)]
    shards = ranks.gather(local.reshape(-1).view(torch.uint8), counts, label=f"save {one.name}")
    return [
        shard.cpu().view(local.dtype).view(shape) for shard, shape in zip(shards, shapes, strict=bool(shards))
    ]


def _index(
    groups: Sequence[Sequence[TensorSpec]], names: Sequence[str], metadata: Mapping[str, str] | None
) -> str:
    content = {
        "metadata": {
            "total_size": sum(spec.bytes for specs in groups for spec in specs),
            **(metadata or {}),
        },
        "weight_map": {spec.name: name for specs, name in zip(groups, names, strict=True) for spec in specs},
    }
    return json.dumps(content, indent=2) + "\n"

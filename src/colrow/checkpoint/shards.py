"""Sharded tensors to and from global files: used for weights and for the optimizer's state alike."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from colrow.checkpoint.writer import SafetensorsWriter, TensorSpec
from colrow.collectives import Communicator
from colrow.layout import TensorLayout

BYTES_PER_FILE = 5 * 1024**3


@dataclass(frozen=True)
class Saved:
    """A tensor to save: its name in the file, this rank's part, and where that lies in the whole."""

    name: str
    local: Tensor
    layout: TensorLayout

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.local.dtype, self.layout.shape)


def split_files(specs: Sequence[TensorSpec], stem: str, limit: int) -> list[tuple[str, list[TensorSpec]]]:
    """File names, as transformers gives them, and what goes into each: ``limit`` bytes or one tensor."""
    files: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if files[-1] and filled + spec.bytes > limit:
            files.append([])
            filled = 0
        files[-1].append(spec)
        filled += spec.bytes
    if len(files) == 1:
        return [(f"{stem}.safetensors", files[0])]
    total = len(files)
    return [(f"{stem}-{i + 1:05d}-of-{total:05d}.safetensors", group) for i, group in enumerate(files)]


def write_global(
    folder: Path,
    stem: str,
    tensors: Iterable[Saved],
    ranks: Communicator,
    writes: bool,
    bytes_per_file: int = BYTES_PER_FILE,
) -> None:
    """Write all ranks' shards as global tensors; called by every rank of the group.

    The group's first rank receives one tensor's shards at a time and puts them where they belong in the
    file, which is mapped into memory.

    Args:
        folder: exists.
        stem: ``model`` for ``model.safetensors``; several files get an index.
        tensors: in file order, the same on every rank.
        ranks: the tensor-parallel group.
        writes: whether this group writes (one of several replicas does) or has nothing to do.
        bytes_per_file: begin another file when one would grow beyond this.
    """
    if not writes:
        return
    saved = list(tensors)
    by_name = {one.name: one for one in saved}
    files = split_files([one.spec for one in saved], stem, bytes_per_file)
    for file_name, specs in files:
        if ranks.rank == 0:
            with SafetensorsWriter(folder / file_name, specs) as writer:
                for spec in specs:
                    one = by_name[spec.name]
                    out = writer.tensor(spec.name)
                    for rank, shard in enumerate(_gather(one, ranks)):
                        one.layout.place(shard, rank, out)
        else:
            for spec in specs:
                _gather(by_name[spec.name], ranks)
    if ranks.rank == 0:
        _write_index(folder, stem, files)


def _gather(one: Saved, ranks: Communicator) -> list[Tensor]:
    local = one.local.detach()
    if not one.layout.is_sharded:
        return [local.cpu()] if ranks.rank == 0 else []
    shapes = [one.layout.local_shape(rank) for rank in range(ranks.size)]
    return [shard.cpu() for shard in ranks.gather(local, shapes, label=f"save {one.name}")]


def _write_index(folder: Path, stem: str, files: list[tuple[str, list[TensorSpec]]]) -> None:
    index = folder / f"{stem}.safetensors.index.json"
    if len(files) > 1:
        content = {
            "metadata": {"total_size": sum(spec.bytes for _, specs in files for spec in specs)},
            "weight_map": {spec.name: name for name, specs in files for spec in specs},
        }
        partial = index.with_name(index.name + ".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(index)
    else:
        index.unlink(missing_ok=True)
    # an earlier save may have had another number of files, which readers would prefer to these
    for old in folder.glob(f"{stem}*.safetensors"):
        if re.fullmatch(
            re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors", old.name
        ) and old.name not in dict(files):
            old.unlink()

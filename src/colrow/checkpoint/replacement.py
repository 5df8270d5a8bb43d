"""Replacing a checkpoint's files so that a save that is killed leaves the last one as it was.

Every file is written completely under a partial name first. Then:

1. Files of one of several get their final names. These are fresh names: the index in the folder, if there is
   one, refers to other files.
2. Configurations that changed are replaced. So that they are never taken together with weights they are not
   of, the old index (or single file) is set aside before as ``*.previous``: a kill within this moment leaves
   a folder that does not load, and nothing lost.
3. The index, or the single file, is put in its place by one rename. This is when the new save takes effect.
4. What belonged to the old save is deleted.

A reader that finds both a single file and an index takes the single file, as transformers does; a kill
between 3 and 4 may thus leave the old save in effect, but whole.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

_PARTIAL = ".partial"
_PREVIOUS = ".previous"


def partial_path(folder: Path, name: str) -> Path:
    """Where a file of a save is written before it gets its name, by any rank."""
    return folder / (name + _PARTIAL)


class Replacement:
    """The files of one save into one folder. A context manager: what is not committed is deleted.

    Args:
        folder: made if it does not exist.
        stem: ``model`` for ``model.safetensors`` and so on.
        count: number of safetensors files.

    Raises:
        OSError: if the folder cannot be made, or another process is saving into it.
    """

    def __init__(self, folder: Path, stem: str, count: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._stem = folder, stem
        self._lock = _lock(folder)
        self._single = folder / f"{stem}.safetensors"
        self._index = folder / f"{stem}.safetensors.index.json"
        self.names = self._fresh_names(count)
        self.configurations = folder / f"{stem}.configurations{_PARTIAL}"
        """Files written into this folder go to the checkpoint's folder with it."""
        try:
            self._delete_partial()  # left by a save that was killed
            self.configurations.mkdir()
        except BaseException:
            self._unlock()
            raise

    def _shards(self, suffix: str = "") -> Iterator[Path]:
        """The files with a number in their names that a save of this stem may have left."""
        pattern = re.escape(self._stem) + r"(-\d+)?-\d{5}-of-\d{5}\.safetensors" + re.escape(suffix)
        return (path for path in self._folder.iterdir() if re.fullmatch(pattern, path.name))

    def _delete_partial(self) -> None:
        if self.configurations.exists():
            shutil.rmtree(self.configurations)
        for path in [self.partial(head.name) for head in (self._single, self._index)]:
            path.unlink(missing_ok=True)
        for path in list(self._shards(_PARTIAL)):
            path.unlink()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _fresh_names(self, count: int) -> list[str]:
        if count == 1:
            return [self._single.name]
        generation = 1
        while True:
            stem = self._stem if generation == 1 else f"{self._stem}-{generation}"
            names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
            if not any((self._folder / name).exists() for name in names):
                return names
            generation += 1

    def partial(self, name: str) -> Path:
        """Where to write the file that shall be called ``name``."""
        return partial_path(self._folder, name)

    def commit(self, index: str) -> None:
        """Put the files in place of the old ones; ``index`` is the content of the index, if one is needed."""
        several = len(self.names) > 1
        head = self._index if several else self._single
        if several:
            _write(self.partial(head.name), index)
            for name in self.names:
                os.replace(self.partial(name), self._folder / name)
        changed = self._changed_configurations()
        _synchronise(self._folder)
        if changed:
            for old in (self._index, self._single):
                if old.exists():
                    os.replace(old, old.with_name(old.name + _PREVIOUS))
            for source in changed:
                os.replace(source, self._folder / source.name)
        os.replace(self.partial(head.name), head)
        _synchronise(self._folder)
        self._delete_old(self._single if several else self._index)

    def _changed_configurations(self) -> Sequence[Path]:
        changed = []
        for source in sorted(self.configurations.iterdir()):
            target = self._folder / source.name
            if not target.exists() or target.read_bytes() != source.read_bytes():
                changed.append(source)
        return changed

    def _delete_old(self, other_head: Path) -> None:
        # an index goes before the files that it names: a reader must not find it without them
        other_head.unlink(missing_ok=True)
        for old in list(self._shards()):
            if old.name not in self.names:
                old.unlink()
        for head in (self._index, self._single):
            head.with_name(head.name + _PREVIOUS).unlink(missing_ok=True)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._delete_partial()
        finally:
            self._unlock()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _synchronise(folder: Path) -> None:
    """Have the renames so far on the disk before later ones."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Keep other processes from saving into ``folder`` until the descriptor is closed, or this one dies."""
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OSError(
            f"another process is saving into {folder}. If several groups of ranks hold replicas of one "
            "model, parallelize it with the mesh of all of them or a slice of that: one group then writes"
        ) from error
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor

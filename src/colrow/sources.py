"""Names of source files that are the same on every machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def source_of(file: str) -> str:
    """The name of the Python module whose code lies in ``file``; the file's own name if there is none."""
    names = [
        name
        for name, module in list(sys.modules.items())
        if getattr(module, "__file__", None) == file and name != "__main__"
    ]
    return min(names, key=len) if names else Path(file).name


def short_path(file: str) -> str:
    """A file as seen from where Python found it: ``transformers/models/llama/modeling_llama.py``.

    For people. What lies outside of all folders that are searched for modules, and of the working folder, is
    called by its name alone; what is no file, such as ``<string>``, stays as it is.
    """
    if not os.path.isabs(file):
        return file
    folders = {str(Path(folder).absolute()) for folder in (*sys.path, ".") if folder is not None}
    inside = [folder for folder in folders if file.startswith(folder.rstrip(os.sep) + os.sep)]
    if not inside:
        return Path(file).name
    # the innermost: packages may be installed below the working folder
    return Path(file).relative_to(max(inside, key=len)).as_posix()

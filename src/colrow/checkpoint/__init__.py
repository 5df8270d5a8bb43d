"""Checkpoints in global form: names, shapes and dtypes of the original model."""

from colrow.checkpoint.meta import parameters_on_meta
from colrow.checkpoint.optimizer import load_optimizer, save_optimizer
from colrow.checkpoint.pretrained import load_pretrained, load_weights, save_pretrained

__all__ = [
    "load_optimizer",
    "load_pretrained",
    "load_weights",
    "parameters_on_meta",
    "save_optimizer",
    "save_pretrained",
]

"""What a parallelized model must not do any more, because it would do it to one rank's shard."""

from __future__ import annotations

from typing import NoReturn

from torch import nn


def refuse_own_save(model: nn.Module) -> None:
    """Make a transformers model's own ``save_pretrained`` an error.

    It would write this rank's shards under the names of the model's weights, and a trainer calls it on one
    rank only, where the shards of the others are out of reach.
    """
    if hasattr(model, "save_pretrained"):
        vars(model)["save_pretrained"] = _refuse


def allow_own_save(model: nn.Module) -> None:
    """Take :func:`refuse_own_save` back."""
    vars(model).pop("save_pretrained", None)


def _refuse(*arguments: object, **options: object) -> NoReturn:
    raise ValueError(
        "this model is cut over several ranks, and its own save_pretrained would write the shards of one of "
        "them. Call colrow.save_pretrained(model, folder) on all ranks: it writes the whole model"
    )

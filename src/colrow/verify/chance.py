"""Without chance: no dropout, and random draws that are the same in the cut model as in the whole one.

In training mode two models that drop different elements cannot be compared. Probabilities of dropout become
zero where they are used, so that no name of a module or of a setting needs to be known. Other draws, such as
which layers or samples to drop, are seeded by the place in the program and by how often it was passed.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from colrow.trace.functions import opened
from colrow.verify.place import caller

_DROPOUTS = {
    "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "alpha_dropout_",
    "feature_dropout", "feature_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_",
}  # fmt: skip
_DRAWS = {
    "rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "bernoulli",
    "bernoulli_", "uniform_", "normal", "normal_", "random_", "multinomial", "exponential_", "poisson",
    "cauchy_", "geometric_", "log_normal_", "trunc_normal_", "rrelu", "rrelu_", "gumbel_softmax",
}  # fmt: skip
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_ATTENTION_PROBABILITY = 4
"""Position of ``dropout_p`` among the arguments of ``F.scaled_dot_product_attention``."""


def seed_everything(seed: int) -> None:
    """Seed the generators of torch, Python and, if it is in use, numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _nothing_dropped(
    input: Tensor, p: float = 0.5, training: bool = True, *others: Any, **more: Any
) -> Tensor:
    """What dropout gives that happens to drop nothing; it keeps as many tensors for the backward pass."""
    training = more.get("train", training)
    return input * torch.ones_like(input) if training and p else input


class WithoutChance(TorchFunctionMode):
    """Dropout does nothing; other random draws depend on their place in the program alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._passes: Counter[str] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _DROPOUTS:
            return _nothing_dropped(*args, **keywords)
        if function is F.scaled_dot_product_attention:
            if len(args) > _ATTENTION_PROBABILITY:
                args = (*args[:_ATTENTION_PROBABILITY], 0.0, *args[_ATTENTION_PROBABILITY + 1 :])
            elif "dropout_p" in keywords:
                keywords = {**keywords, "dropout_p": 0.0}
        elif name in _RECURRENT:
            # the probability is their only number that is no integer
            args = tuple(0.0 if isinstance(one, float) else one for one in args)
        elif name in _DRAWS and keywords.get("generator") is None:
            self._seed_by_place(function)
        body = opened(function)
        if body is not None:
            with self:
                return body(*args, **keywords)
        return function(*args, **keywords)

    def _seed_by_place(self, function: Any) -> None:
        place = str(caller(function))
        number = self._passes[place]
        self._passes[place] += 1
        torch.manual_seed(zlib.crc32(f"{self._seed} {place} {number}".encode()))

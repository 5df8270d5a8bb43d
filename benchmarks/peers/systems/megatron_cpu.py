"""What must be changed for megatron-core to run on CPUs; import this before any other part of it.

It has no CPU path: tensors are allocated on ``torch.cuda.current_device()``, and its random number tracker
reads the state of CUDA's generators.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

warnings.filterwarnings("ignore")
torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]

from megatron.core.tensor_parallel import random as megatron_random  # type: ignore[import-not-found]  # noqa: E402


class CpuStates(megatron_random.CudaRNGStatesTracker):
    """Named states of the CPU's generator."""

    def add(self, name: str, seed: int) -> None:
        self._is_initialized = True
        self.seeds_.add(seed)
        saved = torch.get_rng_state()
        torch.manual_seed(seed)
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(saved)

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        saved = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(saved)


def seed_generators(seed: int, rank: int) -> None:
    """What ``model_parallel_cuda_manual_seed`` does, for the CPU's generator."""
    tracker = CpuStates()
    megatron_random._CUDA_RNG_STATE_TRACKER = tracker
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    tracker.add("data-parallel-rng", seed)
    tracker.add("model-parallel-rng", seed + 2718 + rank)
    torch.manual_seed(seed)

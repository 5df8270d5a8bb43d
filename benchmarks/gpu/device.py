"""Time and memory on a device: a GPU, or a CPU to try the programs on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from colrow.checkpoint.meta import materialise


@dataclass(frozen=True)
class Timed:
    """Seconds of one form of some work, and of it relative to another, over rounds.

    Attributes:
        seconds: median.
        ratio: median of the ratio to the first form of the same round.
        low, high: its quartiles.
        peak_bytes: the most that tensors have taken on a GPU beyond what was there; 0 on a CPU.
    """

    seconds: float
    ratio: float
    low: float
    high: float
    peak_bytes: int


def synchronize(device: torch.device) -> None:
    """Wait for what was given to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    forms: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, calls: int
) -> dict[str, Timed]:
    """Time every form in every round, one after the other, in turning order.

    Args:
        forms: what to time; ratios are to the first.
        device: that they work on.
        rounds: how often, after one round that does not count.
        calls: of a form in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    peaks: dict[str, int] = {}
    order = list(forms)
    for number in range(rounds + 1):
        turn = number % len(order)
        for name in order[turn:] + order[:turn]:
            before = _allocated(device)
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(calls):
                forms[name]()
            synchronize(device)
            if number:
                seconds[name].append((time.perf_counter() - begin) / calls)
                peaks[name] = max(peaks.get(name, 0), _peak(device) - before)
    found = {}
    for name, own in seconds.items():
        ratios = [one / first for one, first in zip(own, seconds[order[0]], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        found[name] = Timed(statistics.median(own), middle, low, high, peaks[name])
    return found


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Give parameters on meta random numbers on the device, and bring everything else there."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            materialise(parameter, torch.randn(parameter.shape, device=device, dtype=dtype) * 0.02, name)
    return model.to(device)

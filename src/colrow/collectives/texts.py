"""Short texts between ranks: descriptions of what each of them has."""

from __future__ import annotations

import torch

from colrow.collectives.communicator import Communicator


def all_gather_texts(ranks: Communicator, text: str, device: torch.device | str, *, label: str) -> list[str]:
    """The texts of all ranks, in rank order. Two all-gathers.

    Args:
        ranks: all of which call this.
        text: this rank's; none need be as long as another.
        device: that the group's collectives work on.
        label: names the collectives in errors and statistics.
    """
    own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0)
    own = own.to(device, torch.uint8)
    length = torch.tensor([own.numel()], dtype=torch.int64, device=device)
    sizes = [int(size) for size in ranks.all_gather(length, 0, label=label).tolist()]
    if not sum(sizes):
        return [""] * ranks.size
    everything = ranks.all_gather(own, 0, sizes, label=label)
    return [bytes(one.tolist()).decode() for one in everything.split(sizes)]

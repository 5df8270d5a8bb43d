"""What the stages of a pipeline tell each other about the files that they write."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from colrow.checkpoint.writer import TensorSpec
from colrow.collectives.texts import all_gather_texts
from colrow.state import ParallelState


def stages_of(
    own: Sequence[Sequence[TensorSpec]], state: ParallelState, label: str
) -> tuple[int, list[list[list[TensorSpec]]]]:
    """This rank's number along ``pp``, and by number what goes into each of the files of its stages.

    Args:
        own: files of this rank's stages; one that would be empty is none.
        state: of the model.
        label: names the collective in errors.
    """
    pipeline = state.pipeline
    if pipeline is None:
        return 0, [[list(specs) for specs in own]]
    described = [
        [[spec.name, str(spec.dtype).removeprefix("torch."), list(spec.shape)] for spec in specs]
        for specs in own
        if specs
    ]
    texts = all_gather_texts(
        pipeline.communicator, json.dumps(described), state.mesh.device_type, label=label
    )
    stages = [
        [
            [TensorSpec(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in specs]
            for specs in json.loads(text)
        ]
        for text in texts
    ]
    if not any(stages):
        stages[0] = [[]]
    return pipeline.communicator.rank, stages


def names_for_stages(names: Sequence[str], state: ParallelState, label: str) -> list[str]:
    """Names of all files, which the first rank of the pipeline has made."""
    if state.pipeline is None:
        return list(names)
    ranks = state.pipeline.communicator
    texts = all_gather_texts(ranks, json.dumps(list(names)), state.mesh.device_type, label=label)
    found: list[str] = json.loads(texts[0])
    return found

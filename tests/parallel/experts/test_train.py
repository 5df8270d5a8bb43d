"""``colrow train`` over ``ep``: the losses of one process, and how uneven the experts' tokens were."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest

from colrow.launch import launch
from colrow.train.folder import RunFolder
from colrow.train.metrics import read_records
from tests.train.small import small

FIELDS = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 24,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.slow
def test_losses_of_one_process(tmp_path: Path) -> None:
    found = []
    for ep in (1, 2):
        model = {"config": "MixtralConfig", "fields": FIELDS}
        folder = tmp_path / str(ep)
        run = small(tmp_path, steps=4, precision="fp32", mesh={"ep": ep}, model=model, run_dir=str(folder))
        arguments = {"configuration": asdict(run), "prepared": False}
        launch("colrow.train.loop:train", arguments, ep, threads_per_rank=1)
        found.append(read_records(RunFolder(folder).metrics))
    alone, divided = found
    assert len(alone) == len(divided) == 4
    for one, other in zip(alone, divided, strict=True):
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-5)
        assert "expert_load" not in one
        assert 1 <= other["expert_load"] <= 5 / 2  # of five experts, of which each token chooses two

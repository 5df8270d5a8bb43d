"""PyTorch's own tensor parallelism: ``parallelize_module`` with a plan by hand, and ``loss_parallel``.

The plan is the usual one: vocabulary-parallel embedding and output layer, column then row in attention and
feed-forward. The loss is computed from logits that stay cut over the vocabulary.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from ..shapes import Case
from .models import next_token_loss, plain_model
from .trainer import Trainer, start_gloo

COLUMNS = {
    "gpt": ("attention.query", "attention.key", "attention.value", "feed_forward.up"),
    "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
}
ROWS = {
    "gpt": ("attention.output", "feed_forward.down"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
}
NAMES = {"gpt": ("tokens", "blocks", "head"), "llama": ("model.embed_tokens", "model.layers", "lm_head")}
"""Of the embedding, the blocks and the output layer."""


class DtensorTrainer(Trainer):
    def step(self, tokens: Tensor) -> Tensor:
        with loss_parallel():  # the backward too
            loss = super().step(tokens)
        return loss.full_tensor() if isinstance(loss, DTensor) else loss

    def loss(self, tokens: Tensor) -> Tensor:
        return next_token_loss(self.model(input_ids=tokens).logits, tokens)


def cut(model: nn.Module, mesh: DeviceMesh, case: Case) -> None:
    """Apply the plan to the model, in place."""
    embedding, blocks, head = NAMES[case.shape.family]
    parallelize_module(
        model,
        mesh,
        {
            embedding: RowwiseParallel(input_layouts=Replicate()),
            head: ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        },
    )
    for block in model.get_submodule(blocks).children():
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in COLUMNS[case.shape.family]}
        plan |= {name: RowwiseParallel() for name in ROWS[case.shape.family]}
        parallelize_module(block, mesh, plan)


def build(case: Case, folder: Path) -> DtensorTrainer:
    start_gloo()
    mesh = init_device_mesh("cpu", (case.ranks,), mesh_dim_names=("tp",))
    model = plain_model(case, folder)
    cut(model, mesh, case)
    return DtensorTrainer(model)

"""Megatron core: its GPTModel with local layers, given the weights of the plain model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .megatron_cpu import seed_generators

# isort: split
from megatron.core import parallel_state  # type: ignore[import-not-found]
from megatron.core.models.gpt.gpt_layer_specs import (  # type: ignore[import-not-found]
    get_gpt_layer_local_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel  # type: ignore[import-not-found]
from megatron.core.transformer.transformer_config import (  # type: ignore[import-not-found]
    TransformerConfig,
)

from ..shapes import Case, Shape
from .models import NORM_EPSILON, is_gpt, weights
from .trainer import Trainer, dtype_of, start_gloo


@dataclass(frozen=True)
class Names:
    """What the plain model calls its parts; those of a block follow its own name."""

    tokens: str
    blocks: str
    norm: str
    head: str
    norms: tuple[str, str]
    projections: tuple[str, str, str]
    output: str
    up: tuple[str, ...]
    down: str


GPT = Names(
    tokens="tokens",
    blocks="blocks",
    norm="norm",
    head="head",
    norms=("attention_norm", "feed_forward_norm"),
    projections=("attention.query", "attention.key", "attention.value"),
    output="attention.output",
    up=("feed_forward.up",),
    down="feed_forward.down",
)
LLAMA = Names(
    tokens="model.embed_tokens",
    blocks="model.layers",
    norm="model.norm",
    head="lm_head",
    norms=("input_layernorm", "post_attention_layernorm"),
    projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
)


class MegatronTrainer(Trainer):
    def __init__(self, model: nn.Module, shape: Shape) -> None:
        super().__init__(model)
        self._positions = torch.arange(shape.sequence).expand(shape.batch, -1)
        self._mask = torch.ones(1, 1, shape.sequence, shape.sequence, dtype=torch.bool).triu(
            1
        )  # True: hidden
        self._weight = torch.ones(shape.batch, shape.sequence)
        self._weight[:, -1] = 0  # the last token has no next one

    def loss(self, tokens: Tensor) -> Tensor:
        targets = tokens.roll(-1, 1)
        losses = self.model(tokens, self._positions, self._mask, labels=targets)
        return (losses.float() * self._weight).sum() / self._weight.sum()


def configuration(case: Case) -> Any:
    shape = case.shape
    own: dict[str, Any] = {}
    if not is_gpt(case):
        own = {
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "num_query_groups": shape.key_value_heads,
        }
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.feed_forward,
        layernorm_epsilon=NORM_EPSILON[shape.family],
        tensor_model_parallel_size=case.ranks,
        params_dtype=dtype_of(case),
        pipeline_dtype=dtype_of(case),
        bf16=case.dtype == "bf16",
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # these need CUDA extensions
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **own,
    )


def whole_parameters(case: Case, given: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The unsharded parameters by Megatron's names, each as parts that are cut one by one.

    Its fused query-key-value goes by groups: the queries that share a key-value head, that key and that
    value. Of its fused gate and up each is cut by itself.
    """
    names, kinds = (GPT, ("weight", "bias")) if is_gpt(case) else (LLAMA, ("weight",))
    whole = {
        "embedding.word_embeddings.weight": [given[f"{names.tokens}.weight"]],
        "output_layer.weight": [given[f"{names.head}.weight"]],
    }
    if is_gpt(case):
        whole["embedding.position_embeddings.weight"] = [given["positions"][0]]
    for kind in kinds:
        whole[f"decoder.final_layernorm.{kind}"] = [given[f"{names.norm}.{kind}"]]
        for layer in range(case.shape.layers):

            def of(name: str, old: str = f"{names.blocks}.{layer}", kind: str = kind) -> Tensor:
                return given[f"{old}.{name}.{kind}"]

            new = f"decoder.layers.{layer}"
            groups = [of(name).unflatten(0, (case.shape.key_value_heads, -1)) for name in names.projections]
            whole |= {
                f"{new}.input_layernorm.{kind}": [of(names.norms[0])],
                f"{new}.self_attention.linear_qkv.{kind}": [torch.cat(groups, 1).flatten(0, 1)],
                f"{new}.self_attention.linear_proj.{kind}": [of(names.output)],
                f"{new}.pre_mlp_layernorm.{kind}": [of(names.norms[1])],
                f"{new}.mlp.linear_fc1.{kind}": [of(name) for name in names.up],
                f"{new}.mlp.linear_fc2.{kind}": [of(names.down)],
            }
    return whole


def fill(model: nn.Module, whole: Mapping[str, list[Tensor]], rank: int, ranks: int) -> None:
    """Give each parameter this rank's slice.

    Raises:
        ValueError: if the model has other parameters, or a slice has another shape than its parameter.
    """
    parameters = dict(model.named_parameters())
    if parameters.keys() != whole.keys():
        raise ValueError(f"other parameters than expected: {sorted(parameters.keys() ^ whole.keys())}")
    for name, parameter in parameters.items():
        parts = whole[name]
        if getattr(parameter, "tensor_model_parallel", False):
            dimension: int = getattr(parameter, "partition_dim")  # noqa: B009  (Megatron's own attribute)
            parts = [part.chunk(ranks, dimension)[rank] for part in parts]
        local = torch.cat(parts)
        if local.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(parameter.shape)}, its slice {tuple(local.shape)}")
        with torch.no_grad():
            parameter.copy_(local)


def build(case: Case, folder: Path) -> MegatronTrainer:
    start_gloo()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=case.ranks)
    rank = dist.get_rank()
    seed_generators(1234, rank)
    model = GPTModel(
        configuration(case),
        get_gpt_layer_local_spec(normalization=None if is_gpt(case) else "RMSNorm"),
        vocab_size=case.shape.vocabulary,
        max_sequence_length=case.shape.sequence,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute" if is_gpt(case) else "rope",
        rotary_base=10000,
    )
    fill(model, whole_parameters(case, weights(case, folder)), rank, case.ranks)
    return MegatronTrainer(model.to(dtype_of(case)), case.shape)  # it leaves position embeddings in fp32

"""The arguments of models of transformers, by what they are called.

``input_ids`` are numbers of words, ``pixel_values`` images, ``..._mask`` says what is there. Where models
give one name to several shapes there are variants; trying shows which one a model takes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from colrow.model.fields import role_of
from colrow.model.tree import numbers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

BATCH, LENGTH, DECODER_LENGTH = 2, 10, 7
GRID = 4
"""Patches along each side of an image that has no size."""
FRAMES, SAMPLES = 64, 7680
"""Of spectrograms and of sound."""


@dataclass
class Maker:
    """Makes the arguments of one model."""

    model: PreTrainedModel
    generator: torch.Generator

    def field(self, *names: str, near: tuple[str, ...] = ()) -> Any:
        """The first of these fields that a configuration has, nested ones with such a key first."""
        configs = sorted(configurations(self.model.config), key=lambda one: not _is_near(one[0], near))
        for _, config in configs:
            for name in names:
                if (value := getattr(config, name, None)) is not None:
                    return value
        return None

    def number(self, *names: str, near: tuple[str, ...] = (), default: int = 0) -> int:
        """The same, as one integer."""
        return next(numbers(self.field(*names, near=near)), default)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def words(self, *shape: int, decoder: bool = False) -> Tensor:
        """Numbers of ordinary words: int64."""
        special = _special_tokens(self.model.config)
        ordinary = [one for one in range(min(self._vocabulary(decoder), 4096)) if one not in special] or [0]
        return torch.tensor(ordinary)[torch.randint(len(ordinary), shape, generator=self.generator)]

    def _vocabulary(self, decoder: bool) -> int:
        if decoder:
            return self.number("decoder_vocab_size", "vocab_size", near=("decoder", "text"), default=100)
        with contextlib.suppress(NotImplementedError, AttributeError):
            table = self.model.get_input_embeddings()
            if isinstance(table, nn.Embedding):
                return table.num_embeddings
        return self.number("vocab_size", "src_vocab_size", near=("text",), default=100)

    def image(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        near = ("vision", "image", "backbone")
        names = ("num_channels", "in_channels", "in_chans", "num_input_channels")
        size = self.field("image_size", "img_size", "crop_size", near=near)
        sides = [*numbers(list(size.values()) if isinstance(size, dict) else size)]
        if not sides:
            patch = self.number("patch_size", near=near)
            sides = [patch * GRID if patch else 128]
        return self.number(*names, near=near, default=3), sides[0], sides[-1]

    @property
    def patch_features(self) -> int:
        """Numbers in a patch of an image."""
        near = ("vision",)
        patch = self.number("patch_size", near=near, default=14)
        channels = self.number("in_channels", "in_chans", "num_channels", near=near, default=3)
        return channels * patch * patch * self.number("temporal_patch_size", near=near, default=1)

    @property
    def mels(self) -> int:
        """Features of a spectrogram."""
        words = "num_mel_bins n_mels n_mel_bins mel_dim model_in_dim feature_projection_input_dim "
        words += "input_feat_size input_feat_per_channel input_dim feature_size input_size"
        return self.number(*words.split(), near=("audio", "encoder", "speech"), default=80)

    @property
    def width(self) -> int:
        return self.number("hidden_size", "d_model", "embed_dim", default=64)


def configurations(config: PreTrainedConfig, key: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """A configuration and those nested in it, with the names of their fields."""
    from transformers import PreTrainedConfig

    yield key, config
    for name, one in vars(config).items():
        if isinstance(one, PreTrainedConfig):
            yield from configurations(one, f"{key}.{name}")


def _is_near(key: str, words: tuple[str, ...]) -> bool:
    return any(word in key for word in words)


def _special_tokens(config: PreTrainedConfig) -> set[int]:
    found = {0, 1, 2}
    for _, one in configurations(config):
        for name, value in vars(one).items():
            if role_of(name, {}) == "token":
                found.update(numbers(value))
    return found


Make = Callable[[Maker], Tensor]


def _videos(make: Maker) -> Tensor:
    return make.floats(BATCH, make.number("num_frames", "frames_per_clip", default=4), *make.image())


def _patches_as_images(make: Maker) -> Tensor:
    patch = make.number("patch_size", near=("vision",), default=14)
    return make.floats(
        BATCH * GRID * GRID,
        make.number("in_channels", "num_channels", near=("vision",), default=3),
        patch,
        patch,
    )


def _codes(make: Maker) -> int:
    return make.number("num_codebooks", "num_code_groups", "num_quantizers", default=4)


def _boxes(make: Maker) -> Tensor:
    corners = torch.randint(0, 50, (BATCH, LENGTH, 2), generator=make.generator)
    return torch.cat([corners, corners + 10], -1)


def _series(make: Maker) -> Tensor:
    length = make.number("context_length", "seq_len", default=32)
    lags = max(numbers(make.field("lags_sequence")), default=0)
    channels = make.number("num_input_channels")
    return make.floats(BATCH, length + lags, *([channels] if channels else []))


def _grid_positions(make: Maker) -> Tensor:
    side = torch.arange(GRID)
    return torch.cartesian_prod(side, side).expand(BATCH, -1, -1).contiguous()


def _ones(*shape: int) -> Make:
    return lambda make: torch.ones(shape, dtype=torch.long)


_MAKERS: tuple[tuple[str, tuple[Make, ...]], ...] = (
    ("decoder_input_ids", (lambda make: make.words(BATCH, DECODER_LENGTH, decoder=True),)),
    (
        "input_ids|.*_input_ids|audio_codes|inputs",
        (
            lambda make: make.words(BATCH, LENGTH),
            lambda make: make.words(BATCH, _codes(make), LENGTH),
            lambda make: make.words(BATCH, LENGTH, _codes(make)),
            lambda make: make.words(BATCH, 2),
        ),
    ),
    (
        "token_type_ids|.*_type_ids|.*_labels_ids",
        (lambda make: torch.zeros(BATCH, LENGTH, dtype=torch.long),),
    ),
    ("bbox", (_boxes,)),
    (
        "pixel_values_videos|pixel_values_video",
        (_videos, lambda make: make.floats(BATCH * GRID * GRID, make.patch_features)),
    ),
    (
        "pixel_values|.*_pixel_values|images?",
        (
            lambda make: make.floats(BATCH, *make.image()),
            _videos,
            lambda make: make.floats(BATCH, 1, *make.image()),
            lambda make: make.floats(BATCH * GRID * GRID, make.patch_features),
            lambda make: make.floats(BATCH, GRID * GRID, make.patch_features),
            _patches_as_images,
            lambda make: _patches_as_images(make)[None],
            lambda make: _videos(make).transpose(1, 2).contiguous(),
            lambda make: make.floats(BATCH, 2, *make.image()),
            lambda make: make.floats(BATCH, 1, make.number("max_num_tiles", default=1), *make.image()),
        ),
    ),
    ("grid_thw|.*_grid_thw", (lambda make: torch.tensor([[1, GRID, GRID]] * BATCH),)),
    (
        "target_sizes|image_sizes|spatial_shapes|patch_sizes",
        (
            lambda make: torch.tensor([[GRID, GRID]] * BATCH),
            lambda make: torch.tensor([make.image()[1:]] * BATCH),
        ),
    ),
    ("pixel_position_ids|image_position_ids", (_grid_positions,)),
    ("pixel_attention_mask", (_ones(BATCH, GRID * GRID), _ones(BATCH, 128, 128))),
    (
        "input_features_mask|feature_attention_mask|audio_mel_mask",
        (
            _ones(BATCH, FRAMES),
            _ones(BATCH, 2 * FRAMES),
            lambda make: torch.ones(BATCH, FRAMES, dtype=torch.bool),
        ),
    ),
    ("past_observed_mask", (lambda make: torch.ones_like(_series(make)),)),
    (
        ".*_mask",
        (
            _ones(BATCH, LENGTH),
            _ones(BATCH, DECODER_LENGTH),
            _ones(BATCH, FRAMES),
            lambda make: torch.ones(BATCH, FRAMES, dtype=torch.bool),
        ),
    ),
    (
        "input_features|audio_mel|input_audio_embeds|mel_spectrogram",
        (
            lambda make: make.floats(
                BATCH,
                make.mels,
                2 * make.number("max_source_positions", near=("audio", "encoder"), default=FRAMES),
            ),
            lambda make: make.floats(BATCH, FRAMES, make.mels),
            lambda make: make.floats(BATCH, 1, FRAMES, make.mels),
            lambda make: make.floats(make.mels, 2 * FRAMES),
            lambda make: make.floats(BATCH, FRAMES, make.number("input_dim", "input_size", default=80)),
        ),
    ),
    (
        "feature_lens|.*_lens|.*_lengths",
        (lambda make: torch.tensor([2 * FRAMES]), lambda make: torch.tensor([FRAMES] * BATCH)),
    ),
    ("spectrogram", (lambda make: make.floats(BATCH, FRAMES, make.mels),)),
    (
        "input_values|audio_values|input_audio",
        (
            lambda make: make.floats(BATCH, SAMPLES),
            lambda make: make.floats(BATCH, make.number("audio_channels", default=1), SAMPLES),
            lambda make: make.floats(BATCH, make.number("max_length", default=FRAMES), make.mels),
        ),
    ),
    (
        "hidden_states|.*_hidden_states|context|noise_embeds",
        (
            lambda make: make.floats(BATCH * GRID * GRID, make.patch_features),
            lambda make: make.floats(BATCH, LENGTH, make.width),
            lambda make: make.floats(BATCH, make.width, LENGTH),
            lambda make: make.floats(BATCH, *make.image()),
            lambda make: make.floats(BATCH, FRAMES, make.mels),
            lambda make: make.floats(BATCH, 1, SAMPLES),
            lambda make: make.floats(BATCH, LENGTH, make.number("encoder_hidden_size", default=64)),
        ),
    ),
    ("inputs_embeds|.*_embeds|query_embeds", (lambda make: make.floats(BATCH, LENGTH, make.width),)),
    (
        "flattened_patches",
        (
            lambda make: torch.cat(
                [
                    _grid_positions(make) + 1.0,
                    make.floats(
                        BATCH,
                        GRID * GRID,
                        make.number("patch_embed_hidden_size", near=("vision",), default=768),
                    ),
                ],
                -1,
            ),
        ),
    ),
    (
        "visual_feats",
        (lambda make: make.floats(BATCH, LENGTH, make.number("visual_feat_dim", default=2048)),),
    ),
    ("visual_pos", (lambda make: make.floats(BATCH, LENGTH, make.number("visual_pos_dim", default=4)),)),
    ("past_values", (_series, lambda make: _series(make).reshape(BATCH, -1)[:, :32])),
)
_COMPILED = tuple((re.compile(pattern), variants) for pattern, variants in _MAKERS)


def makers_of(name: str) -> tuple[Make, ...]:
    """The ways to make an argument; none if its name says nothing."""
    for pattern, variants in _COMPILED:
        if pattern.fullmatch(name):
            return variants
    return ()


def to_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The same arguments with their tensors on a device."""
    return {name: one.to(device) if isinstance(one, Tensor) else one for name, one in inputs.items()}

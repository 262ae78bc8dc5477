"""Tiny models for referring segmentation: configurations of several backbone families, and random inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.models import RISConfig, RISModel

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
}
FAMILIES = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 4,
            "img_size": 64,
            "strict_img_size": False,
        },
        (0, 1, 2, 3),
    ),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}, (0, 1, 2, 3)),
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24], "stem_width": 8}, (1, 2, 3, 4)),
    "mobilenetv4": ("mobilenetv4_conv_small_035", {}, (1, 2, 3, 4)),
    "efficientnet": ("efficientnet_lite0", {}, (0, 1, 2, 3, 4)),
    "byob": (
        "gernet_s",
        {
            "blocks": [{"type": "basic", "d": 1, "c": c, "s": s, "gs": 0} for c, s in ((8, 1), (16, 2), (24, 2))],
            "stem_chs": 8,
            "stem_type": "3x3",
            "num_features": 0,
        },
        (0, 1, 2),
    ),
}


def tiny(family: str = "byob", **changes: Any) -> RISConfig:
    """Return a configuration of one of `FAMILIES`."""
    name, args, out_indices = FAMILIES[family]
    values = {"backbone": name, "backbone_args": args, "out_indices": out_indices, "text": TEXT, "decoder_width": 12}
    return RISConfig(**{**values, **changes})


def build(config: RISConfig) -> RISModel:
    """Return a model with reproducible random weights."""
    torch.manual_seed(0)
    return RISModel(config)


def inputs(batch: int = 2, words: int = 7, size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Return an image, word ids and a mask whose last sentence is three words shorter."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 3, size, size, generator=generator)
    ids = torch.randint(1, 40, (batch, words), generator=generator)
    mask = torch.ones(batch, words, dtype=torch.bool)
    mask[-1, words - 3 :] = False
    return image, ids, mask

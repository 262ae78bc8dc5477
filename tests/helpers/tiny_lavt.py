"""Tiny LAVT models: weights as a function of their names, BERT weights, inputs, training checkpoints."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from lavt_oracle import lavt_names, lavt_weights
from torch import Tensor

DEPTHS, HEADS = (2, 2, 2, 2), (1, 2, 4, 8)
BERT = {
    "vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 96,
    "max_position_embeddings": 12, "type_vocab_size": 2,
}  # fmt: skip
CHECKPOINT_BERT = {
    "vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32,
    "max_position_embeddings": 20,
}  # fmt: skip
"""The text encoder of tests of checkpoints, with the vocabulary size of the shapes presets."""


def weights(
    embed: int = 8,
    depths: tuple[int, ...] = DEPTHS,
    heads: tuple[int, ...] = HEADS,
    window: int = 4,
    word_width: int = 64,
) -> dict[str, Tensor]:
    """Return a LAVT's weights without text encoder."""
    arrays = lavt_weights(lavt_names(embed, depths, heads, window, word_width))
    return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


def bert_weights(**sizes: int) -> dict[str, Tensor]:
    """Return the weights of a BERT of these sizes."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(**sizes), add_pooling_layer=False).state_dict()


def inputs(
    size: tuple[int, int] = (64, 64), words: int = 5, width: int = 64, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Return an image, word vectors and a mask whose second sentence is three words shorter."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 3, *size, generator=generator)
    mask = torch.arange(words) < torch.tensor([[words], [max(1, words - 3)]])[:batch]
    return image, torch.randn(batch, words, width, generator=generator), mask


def relative_error(ours: Any, theirs: Any) -> float:
    """Return the norm of the difference, relative to the norm of ``theirs``."""
    ours, theirs = (np.asarray(a, np.float64) for a in (ours, theirs))
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def training_checkpoint(
    vision: dict[str, Any], text: dict[str, Any], layout: str = "lavt", **args: Any
) -> dict[str, Any]:
    """Return a training run's checkpoint: weights, optimizer, scheduler and settings."""
    inside = {f"text_encoder.{name}": tensor for name, tensor in text.items()}
    weights = {"model": vision, "bert_model": text} if layout == "lavt" else {"model": vision | inside}
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return weights | {
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 39,
        "args": argparse.Namespace(lr=5e-5, model=layout, swin_type="base", **args),
    }

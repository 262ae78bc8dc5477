"""Tiny random CLIPSeg, SAM 3 and CLIP tokenizer, saved to folders by transformers."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KINDS = ("clipseg", "sam3")
SENTENCES = ["the red square", "the plain thing behind the striped cyan circle"]
POSITIONS, SIZES = 40, {"clipseg": 48, "sam3": 56}
# Different from ImageNet, so that missing renormalisation is detected.
MEAN, STD = {"clipseg": [0.48, 0.4, 0.45], "sam3": [0.5, 0.5, 0.5]}, {"clipseg": [0.3, 0.25, 0.2], "sam3": [0.5] * 3}


def tokenizer() -> Any:
    """Return a CLIP tokenizer with letters and the words of the procedural set."""
    from transformers import CLIPTokenizer

    from fastkd.data.shapes import vocabulary

    letters = string.ascii_lowercase
    pieces, merges = [*letters, *(c + "</w>" for c in letters)], []
    for word in filter(str.isalpha, vocabulary()):
        left = word[0]
        for right in [*word[1:-1], word[-1] + "</w>"]:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            pieces.append(left)
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges)


def _text(words: int) -> dict[str, Any]:
    return {
        "vocab_size": words, "bos_token_id": words - 2, "eos_token_id": words - 1, "max_position_embeddings": POSITIONS,
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip


def clipseg(words: int) -> Any:
    """Return a CLIPSeg with 8-pixel patches and position embeddings for 32 pixels."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    return CLIPSegForImageSegmentation(
        CLIPSegConfig(
            text_config=_text(words),
            vision_config=vision,
            projection_dim=16,
            extract_layers=[0, 1, 2],
            reduce_dim=8,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=16,
        )
    )


def sam3(words: int) -> Any:
    """Return a SAM 3 with 4×4 patches, two DETR encoder layers and five queries."""
    from transformers import Sam3Config, Sam3Model

    backbone = {
        "model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "window_size": 2, "global_attn_indexes": [1],
        "pretrain_image_size": 28,
    }  # fmt: skip
    sizes = {"hidden_size": 16, "num_attention_heads": 2}
    detr = {**sizes, "intermediate_size": 24}
    return Sam3Model(
        Sam3Config(
            vision_config={
                "backbone_config": backbone,
                "fpn_hidden_size": 16,
                "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            },
            text_config={"model_type": "clip_text_model", "projection_dim": 8, **_text(words)},
            geometry_encoder_config={"num_layers": 1, **detr},
            detr_encoder_config={"num_layers": 2, **detr},
            detr_decoder_config={"num_layers": 2, "num_queries": 5, **detr},
            mask_decoder_config={"num_upsampling_stages": 2, **sizes},
        )
    )


def write(kind: str, folder: Path) -> Path:
    """Write configuration, weights, tokenizer and preprocessor_config.json to a folder."""
    words = tokenizer()
    torch.manual_seed(0)
    model = (clipseg if kind == "clipseg" else sam3)(len(words))
    with torch.no_grad():
        for parameter in model.parameters():  # with transformers' small initial weights words have almost no effect
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    images = {"size": SIZES[kind], "image_mean": MEAN[kind], "image_std": STD[kind]}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


def write_all(root: Path) -> dict[str, Path]:
    """Write every kind; return its folder by kind."""
    return {kind: write(kind, root / kind) for kind in KINDS}


def load_all(folders: dict[str, Path]) -> dict[str, Any]:
    """Return a frozen teacher by kind."""
    from fastkd.models import TextPromptedTeacher

    return {kind: TextPromptedTeacher.from_pretrained(path).requires_grad_(False) for kind, path in folders.items()}


def tokens(teacher: Any, max_words: int | None = None) -> tuple[Tensor, Tensor]:
    """Return ids and mask of the two sentences from the teacher's own tokenizer."""
    from fastkd.data import load_tokenizer

    tokenizer = load_tokenizer(teacher.config.tokenizer, keep_end=True)
    return tokenizer(SENTENCES, max_words or teacher.config.max_words)


def picture(size: tuple[int, int] = (96, 80), seed: int = 0) -> Tensor:
    """Return two random images in [0, 1]."""
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def imagenet(pixels: Tensor) -> Tensor:
    """Normalise images as for a student."""
    from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD

    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std

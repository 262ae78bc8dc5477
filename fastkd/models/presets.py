"""Ready-made configurations, from networks that train in minutes on a laptop to full-size ones."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from fastkd.models.config import RISConfig

SHAPES_VOCABULARY = 256
"""Rows of the shapes presets' word table: room for the procedural set's word pieces."""


def _bert(width: int, layers: int, heads: int, *, vocab_size: int = 30522, positions: int = 512, mlp: int = 4) -> dict:
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp * width,
        "max_position_embeddings": positions,
    }


def _shapes(widths: list[int], depths: list[int], text: dict, decoder_hidden: int) -> RISConfig:
    # 64 px scenes: strides 2, 4, 8, 16. Plain 3×3 residual blocks, because depthwise convolutions are slow on a CPU.
    blocks = [
        {"type": "basic", "d": d, "c": c, "s": 1 if i == 0 else 2, "gs": 0, "br": 1.0}
        for i, (c, d) in enumerate(zip(widths, depths, strict=True))
    ]
    return RISConfig(
        backbone="gernet_s",
        backbone_args={"blocks": blocks, "stem_chs": widths[0], "stem_type": "3x3", "num_features": 0},
        out_indices=(0, 1, 2, 3),
        text={**text, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        decoder_width=64,
        decoder_hidden=decoder_hidden,
        image_size=64,
        max_words=20,
        tokenizer="shapes",
    )


def _shapes_teacher() -> RISConfig:
    text = _bert(128, 3, 4, vocab_size=SHAPES_VOCABULARY, positions=32, mlp=2)
    return _shapes([32, 64, 128, 192], [1, 2, 2, 1], text, decoder_hidden=64)


def _shapes_student() -> RISConfig:
    text = _bert(64, 1, 2, vocab_size=SHAPES_VOCABULARY, positions=32, mlp=2)
    return _shapes([16, 32, 48, 64], [1, 1, 1, 1], text, decoder_hidden=32)


_PRESETS: dict[str, tuple[str, Callable[[], RISConfig]]] = {
    "shapes-teacher": ("Teacher for the procedural 64 px scenes", _shapes_teacher),
    "shapes-student": ("Its student: the same strides and decoder width", _shapes_student),
}


def preset(name: str) -> RISConfig:
    """A fresh configuration by name.

    Raises:
        ValueError: No such preset; close matches are offered.

    Example::

        RISModel(preset("shapes-student"))
    """
    if name not in _PRESETS:
        close = difflib.get_close_matches(name, _PRESETS, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"there are: {', '.join(_PRESETS)}"
        raise ValueError(f"no preset {name!r}; {hint}")
    return _PRESETS[name][1]()


def list_presets() -> dict[str, str]:
    """Every preset's name and what it is for."""
    return {name: about for name, (about, _) in _PRESETS.items()}

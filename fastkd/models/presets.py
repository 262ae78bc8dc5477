"""Preset configurations, from networks that train in minutes on a laptop to full-size ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastkd._messages import suggestion
from fastkd.models.config import RISConfig

SHAPES_VOCABULARY = 160
"""Word embeddings of the shapes presets, enough for the procedural set's word pieces."""


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
    # For 64 px scenes: strides 2, 4, 8, 16; plain 3×3 residual blocks because depthwise convolutions are slow on CPUs.
    blocks = [
        {"type": "basic", "d": d, "c": c, "s": 1 if i == 0 else 2, "gs": 0, "br": 1.0}
        for i, (c, d) in enumerate(zip(widths, depths, strict=True))
    ]
    return RISConfig(
        backbone="gernet_s",
        backbone_args={"blocks": blocks, "stem_chs": widths[0], "stem_type": "3x3", "num_features": 0},
        out_indices=(0, 1, 2, 3),
        text={**text, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        # As in the shipped teacher: pixel–word logits of teacher and student are compared head by head.
        fusion_heads=(2, 4, 4, 4),
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


def _swin_tiny_bert() -> RISConfig:
    return RISConfig(
        backbone="swin_tiny_patch4_window7_224",
        backbone_args={"img_size": 480, "strict_img_size": False, "drop_path_rate": 0.2},
        out_indices=(0, 1, 2, 3),
        text=_bert(768, 12, 12),
        decoder_width=256,
    )


def _swin_base_bert() -> RISConfig:
    return replace(_swin_tiny_bert(), backbone="swin_base_patch4_window12_384", decoder_width=512)


def _convnext_tiny_bert() -> RISConfig:
    return RISConfig(
        backbone="convnext_tiny",
        backbone_args={"drop_path_rate": 0.1},
        out_indices=(0, 1, 2, 3),
        text=_bert(768, 6, 12),
        decoder_width=256,
    )


def _resnet50_bert() -> RISConfig:
    return RISConfig(backbone="resnet50", out_indices=(1, 2, 3, 4), text=_bert(512, 4, 8), decoder_width=256)


def _mobilenetv4_small_minilm() -> RISConfig:
    return RISConfig(
        backbone="mobilenetv4_conv_small", out_indices=(1, 2, 3, 4), text=_bert(384, 6, 12), decoder_width=96
    )


def _student(backbone: str, out_indices: tuple[int, ...], text: dict, decoder_width: int, **args: Any) -> RISConfig:
    return RISConfig(
        backbone=backbone, backbone_args=args, out_indices=out_indices, text=text, decoder_width=decoder_width
    )


# The text encoders have the sizes of the published small BERTs and of MiniLM-L6, so their weights load. Strides: 4–32.
def _student_5m() -> RISConfig:
    return _student("efficientvit_b0", (0, 1, 2, 3), _bert(128, 2, 2), 48)


def _student_5m_mobilenet() -> RISConfig:
    # Half width: at full width, the last stage's 960 channels would make the fusion larger than both encoders.
    return _student("mobilenetv4_conv_small_050", (1, 2, 3, 4), _bert(128, 2, 2), 48)


def _student_15m() -> RISConfig:
    return _student("efficientnet_b0", (1, 2, 3, 4), _bert(256, 4, 4), 96, drop_path_rate=0.1)


def _student_15m_convnext() -> RISConfig:
    return _student("convnext_atto", (0, 1, 2, 3), _bert(256, 4, 4), 96, drop_path_rate=0.05)


def _student_30m() -> RISConfig:
    return _student("convnext_femto", (0, 1, 2, 3), _bert(384, 6, 12), 128, drop_path_rate=0.05)


def _student_30m_resnet() -> RISConfig:
    return _student("resnet18", (1, 2, 3, 4), _bert(256, 8, 4), 128)


def _student_60m() -> RISConfig:
    return _student(
        "swin_tiny_patch4_window7_224",
        (0, 1, 2, 3),
        _bert(384, 6, 12),
        192,
        img_size=480,
        strict_img_size=False,
        drop_path_rate=0.1,
    )


_PRESETS: dict[str, tuple[str, Callable[[], RISConfig]]] = {
    "shapes-teacher": ("teacher for the procedural 64 px scenes", _shapes_teacher),
    "shapes-student": ("its student: the same strides and decoder width", _shapes_student),
    "student-5m": ("5.3 M parameters: EfficientViT-B0 and a 2-layer, 128-wide BERT", _student_5m),
    "student-5m-mobilenet": (
        "6.0 M: MobileNetV4-S of half the width and a 2-layer, 128-wide BERT",
        _student_5m_mobilenet,
    ),
    "student-15m": ("16 M: EfficientNet-B0 and a 4-layer, 256-wide BERT", _student_15m),
    "student-15m-convnext": ("16 M: ConvNeXt-Atto and a 4-layer, 256-wide BERT", _student_15m_convnext),
    "student-30m": ("30 M: ConvNeXt-Femto and a 6-layer, 384-wide BERT (MiniLM-L6)", _student_30m),
    "student-30m-resnet": ("28 M: ResNet-18 and an 8-layer, 256-wide BERT", _student_30m_resnet),
    "student-60m": ("57 M: Swin-T and a 6-layer, 384-wide BERT (MiniLM-L6)", _student_60m),
    "mobilenetv4-small-minilm": ("MobileNetV4-S and a 6-layer, 384-wide BERT (MiniLM-L6)", _mobilenetv4_small_minilm),
    "resnet50-bert-small": ("ResNet-50 and a 4-layer, 512-wide BERT", _resnet50_bert),
    "convnext-tiny-bert": ("ConvNeXt-T and a 6-layer, 768-wide BERT", _convnext_tiny_bert),
    "swin-tiny-bert": ("Swin-T and BERT-base", _swin_tiny_bert),
    "swin-base-bert": ("Swin-B and BERT-base, the towers of LAVT", _swin_base_bert),
}


def preset(name: str) -> RISConfig:
    """Return a new configuration of a preset.

    Raises:
        ValueError: There is no such preset.

    Example::

        RISModel(preset("shapes-student"))
    """
    if name not in _PRESETS:
        raise ValueError(f"no preset {name!r}.{suggestion(name, _PRESETS, limit=len(_PRESETS))}")
    return _PRESETS[name][1]()


_PUBLISHED_TEXT = {  # layers, width: English, uncased, BERT's vocabulary
    (2, 128): "google/bert_uncased_L-2_H-128_A-2",
    (4, 256): "google/bert_uncased_L-4_H-256_A-4",
    (8, 256): "google/bert_uncased_L-8_H-256_A-4",
    (4, 512): "google/bert_uncased_L-4_H-512_A-8",
    (6, 384): "nreimers/MiniLM-L6-H384-uncased",
    (6, 768): "google/bert_uncased_L-6_H-768_A-12",
    (12, 768): "google-bert/bert-base-uncased",
}


def published_text_weights(config: RISConfig) -> str | None:
    """Return the hub name of weights of the size of a configuration's text encoder; None if none is known."""
    sizes = (config.text.get("num_hidden_layers"), config.text.get("hidden_size"))
    is_bert = config.text_model == "bert" and config.text.get("vocab_size") == 30522
    return _PUBLISHED_TEXT.get(sizes) if is_bert else None  # type: ignore[arg-type]


def list_presets() -> dict[str, str]:
    """Return the presets' descriptions by name.

    Example:
        >>> for name, description in list_presets().items():
        ...     print(name, description)
    """
    return {name: about for name, (about, _) in _PRESETS.items()}

"""The quantities that distillation losses compare: pixel–word attention word by word, and relations of channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from fastkd.report import overlays, text

_TILE = 128  # side of a word's picture in pixels
_MATRIX = 288  # side of a matrix in pixels
# Ends of a colour scale from blue over white to orange, distinguishable with any type of colour vision.
_LOW, _HIGH = np.array([0, 90, 160], np.float32), np.array([200, 90, 0], np.float32)


@dataclass(frozen=True, eq=False)
class WordAttention:
    """Where networks see each word of a sentence in an image.

    Args:
        image: as in `Example`.
        words: the T words or word pieces.
        maps: model name to (T, h, w) attention, at least 0.

    Raises:
        ValueError: maps that are not (T, h, w), finite and at least 0.
    """

    image: Any
    words: Sequence[str]
    maps: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name, given in self.maps.items():
            values = _array(given)
            if values.ndim != 3 or len(values) != len(self.words) or not values.size or not (values >= 0).all():
                raise ValueError(
                    f"WordAttention: the maps of {name!r} must be (T, h, w), one per word ({len(self.words)}), finite "
                    f"and at least 0, got shape {values.shape}"
                )
            if not np.isfinite(values).all():
                raise ValueError(f"WordAttention: the maps of {name!r} hold Inf: pass probabilities, not logits")


@dataclass(frozen=True, eq=False)
class ChannelRelations:
    """Similarities of a map's channels in several networks.

    Args:
        matrices: model name to (C, C) similarities in [−1, 1]; the first is the reference, usually the teacher's.

    Raises:
        ValueError: a matrix that is not square, or values outside [−1, 1].
    """

    matrices: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name, given in self.matrices.items():
            values = _array(given)
            if values.ndim != 2 or values.shape[0] != values.shape[1] or not (np.abs(values) <= 1 + 1e-3).all():
                raise ValueError(
                    f"ChannelRelations: the matrix of {name!r} must be (C, C) with values from -1 to 1, got shape "
                    f"{values.shape}"
                )


def attention_probabilities(logits: Any, word_mask: Any) -> Any:
    """Return each pixel's attention over the words, averaged over the heads.

    Args:
        logits: (heads, N, T) pixel–word logits of one sample on a square map, before masking.
        word_mask: (T,) bool, True at words.

    Returns:
        (number of words, √N, √N) tensor of probabilities, without the padding.

    Raises:
        ValueError: a map that is not square.
    """
    side = math.isqrt(logits.shape[1])
    if side * side != logits.shape[1]:
        raise ValueError(f"logits must be those of a square map, got {logits.shape[1]} pixels: use square images")
    kept = logits.float()[..., word_mask.bool()]  # (heads, N, words)
    return kept.softmax(-1).mean(0).mT.reshape(-1, side, side)


def channel_similarities(features: Any) -> Any:
    """Return the cosines between centred channels pooled over a batch: (B, C, h, w) to (C, C)."""
    rows = features.float().transpose(0, 1).flatten(1)  # (C, B·h·w)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (rows @ rows.mT).clamp(-1, 1)


def attention_html(shown: WordAttention, index: int) -> str:
    """Return one sample: a row per model, a column per word."""
    image = overlays.as_image(shown.image, f"attention[{index}].image")
    maps = {name: _array(values) for name, values in shown.maps.items()}
    largest = [max(float(values[t].max()) for values in maps.values()) for t in range(len(shown.words))]
    header = "".join(
        f'<th scope="col">{escape(word)}<span class="note">0 – {top:.2f}</span></th>'
        for word, top in zip(shown.words, largest, strict=True)
    )
    lines = []
    for name, values in maps.items():
        cells = []
        for word, top, one in zip(shown.words, largest, values, strict=True):
            picture = _heat(image, one / top if top > 0 else one)
            alt = f"Attention of {name} to the word {word}, at most {float(one.max()):.2f}"
            cells.append(f"<td>{_img(picture, alt)}</td>")
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>\n')
    sentence = " ".join(shown.words)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Attention: {escape(sentence)}">\n'
        f'<table class="words">\n<thead><tr><td>{_img(_resized(image), "The image")}</td>{header}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody>\n</table>\n</div>"
    )


def relations_html(relations: ChannelRelations) -> str:
    """Return the matrices side by side, with the channels in one order: that of the first one's main axis."""
    matrices = {name: _array(values) for name, values in relations.matrices.items()}
    reference_name, reference = next(iter(matrices.items()))
    order = np.argsort(np.linalg.eigh(reference)[1][:, -1])
    panels = []
    for name, matrix in matrices.items():
        note = f"{len(matrix)} channels"
        if matrix.shape == reference.shape:
            if name != reference_name:
                distance = float(np.abs(matrix - reference).mean())
                note = f"mean |difference| from {reference_name}: {text.number(distance, 3)}"
            matrix = matrix[np.ix_(order, order)]
        else:  # other channels: their own order
            own = np.argsort(np.linalg.eigh(matrix)[1][:, -1])
            matrix = matrix[np.ix_(own, own)]
        side = len(matrix) * max(1, round(_MATRIX / len(matrix)))
        picture = Image.fromarray(_diverging(matrix)).resize((side, side), Image.Resampling.NEAREST)
        alt = f"Matrix of the similarities of {name}'s channels"
        panels.append(
            f'<div class="panel matrix">{_img(np.asarray(picture), alt)}{escape(name)} '
            f'<span class="iou">{escape(note)}</span></div>'
        )
    return '<div class="panels">\n' + "\n".join(panels) + "\n</div>"


def _array(values: Any) -> np.ndarray:
    values = values.detach().cpu().float() if hasattr(values, "detach") else values
    return np.asarray(values, dtype=np.float32)


def _img(picture: np.ndarray, alt: str) -> str:
    height, width = picture.shape[:2]
    return f'<img src="{overlays.data_uri(picture)}" width="{width}" height="{height}" alt="{escape(alt)}">'


def _resized(image: np.ndarray) -> np.ndarray:
    return overlays.overlay(image, longest=_TILE)


def _heat(image: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return the darkened grey image with a map (h, w) in [0, 1] over it, black to yellow."""
    canvas = _resized(image)
    height, width = canvas.shape[:2]
    heat = Image.fromarray(share.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    level = np.asarray(heat).clip(0, 1)[..., None]  # (H, W, 1)
    grey = canvas.mean(2, keepdims=True) * 0.45
    colour = np.array([255, 214, 64], np.float32)
    return (grey * (1 - 0.85 * level) + colour * 0.85 * level).clip(0, 255).astype(np.uint8)


def _diverging(matrix: np.ndarray) -> np.ndarray:
    """Return values in [−1, 1] as colours, blue over white to orange: (C, C, 3) uint8."""
    level = matrix.clip(-1, 1)[..., None]
    ends = np.where(level < 0, _LOW, _HIGH)
    return (255 + (ends - 255) * np.abs(level)).astype(np.uint8)

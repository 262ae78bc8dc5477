"""Draw samples of a set side by side: image with its mask, and the sentence below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastkd.report.overlays import TRUTH, as_image, as_mask, overlay

_LINES, _SIZE, _GAP = 3, 13, 10  # lines of text, size of the font, space between tiles


def contact_sheet(samples: Sequence[tuple[Any, Any, str]], *, columns: int = 4, tile: int = 256) -> np.ndarray:
    """Return a picture of samples in rows.

    Args:
        samples: Image, mask and text of each, as in `save_overlay`.
        columns: Samples per row.
        tile: Side of the square that an image is fitted into.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: There are no samples, or an image or mask is invalid.

    Example:
        >>> sheet = contact_sheet([(found.image, found.mask, found.sentence) for found in predictions])
    """
    if not samples:
        raise ValueError("contact_sheet got no samples")
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    line = _SIZE + 4
    width, height = tile + _GAP, tile + _LINES * line + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, mask, text) in enumerate(samples):
        left, top = _GAP + number % columns * width, _GAP + number // columns * height
        pixels = as_image(image)
        drawn = Image.fromarray(overlay(pixels, as_mask(mask, pixels.shape[:2]), TRUTH, longest=tile))
        sheet.paste(drawn, (left + (tile - drawn.width) // 2, top + (tile - drawn.height) // 2))
        for position, words in enumerate(_wrapped(text, tile)):
            draw.text((left, top + tile + 2 + position * line), words, fill="black", font=_font())
    return np.asarray(sheet)


def _wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text that fit the width; what does not fit is cut with an ellipsis."""
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    characters = max(4, int(width / _font().getlength("n")))
    return textwrap.wrap(text, characters, max_lines=_LINES, placeholder=" …")


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Return matplotlib's font, which has more scripts than Pillow's."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), _SIZE)

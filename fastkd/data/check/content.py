"""Checks of sentences, masks and images that all sets share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.data._values import brief, sentence_fault
from fastkd.data.check.findings import SetReport
from fastkd.data.images import image_size, orientation, read_image
from fastkd.data.masks import EmptyMask

_OTHER = re.compile(r"[^\w\s]")


def check_sentence(report: SetReport, where: str, text: str, full: str | None, max_words: int) -> None:
    """Check a sentence; ``full`` is the text that it was made from, if known."""
    if fault := sentence_fault(text):
        report.problem("unusable sentence", where, fault)
        return
    if full is not None:
        ours, theirs = (" ".join(_OTHER.sub(" ", each.lower()).split()) for each in (text, full))
        if theirs != ours and theirs.startswith(ours):
            report.problem("truncated sentence", where, f"{brief(text)} of {brief(full)}")
    words = len(text.split())
    if words > max_words - 2:  # [CLS] and [SEP]
        report.note(
            "long sentence", where, f"{words} words; at most {max_words - 2} are read with max_words={max_words}"
        )


def check_mask(report: SetReport, where: str, stored: Any, rasterised: Callable[..., np.ndarray]) -> None:
    """Check a mask; ``stored`` is how the set holds it, ``rasterised`` returns it under a rule."""
    try:
        union, overlap = rasterised(rule="union"), 0
        if isinstance(stored, list) and len(stored) > 1:
            overlap = int((union & ~rasterised(rule="lavt")).sum())
    except EmptyMask as error:
        report.problem("empty mask", where, error)
    except (ValueError, OSError) as error:
        report.problem("damaged mask", where, error)
    else:
        if overlap:
            report.note("overlapping parts of a mask", where, f"{overlap} pixels, background under mask_rule='lavt'")


def check_images(
    report: SetReport, images: Iterable[tuple[str, Path | bytes, tuple[int, int] | None]], decode: bool
) -> None:
    """Check images; each has a name, a file or its content, and the expected (height, width), if known."""

    def look(item: tuple[str, Path | bytes, tuple[int, int] | None]) -> tuple[str, str, int]:
        source, expected = item[1:]
        try:
            height, width = read_image(source).shape[:2] if decode else image_size(source)
            turned = orientation(source)
        except (ValueError, OSError) as error:
            return "unreadable image", str(error.__cause__ or error), 1
        if expected is None or (height, width) == expected:
            return "", "", turned
        after = " after its EXIF orientation" if turned > 4 and (width, height) == expected else ""
        sizes = f"{height} x {width}{after}, but {expected[0]} x {expected[1]} in instances.json (height x width)"
        return "image of another size", sizes, turned

    items = list(images)
    with ThreadPoolExecutor() as threads:  # Pillow releases the GIL while decoding
        for (name, _, _), (kind, text, turned) in zip(items, threads.map(look, items), strict=True):
            if kind:
                report.problem(kind, name, text)
            if turned != 1:
                report.note("EXIF orientation", name, f"{turned}; readers apply it")

"""One reader of images for training, evaluation and prediction, so that a network always sees the same picture."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_ORIENTATION = 0x0112  # EXIF


class WidePixels(ValueError):
    """The pixels of an image have more bits than there is a rule for."""


def read_image(image: str | os.PathLike[str] | Image.Image | np.ndarray) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB.

    An EXIF orientation is applied, of a file and of a PIL image; 16 bits of grey become 8; transparency is dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that Pillow cannot read, pixels of 32 bits, or an array of another shape.
        TypeError: an array that is not uint8.
    """
    if isinstance(image, Image.Image):
        return _upright(image)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"image must be (H, W, 3), got shape {image.shape}")
        if image.dtype != np.uint8:
            raise TypeError(f"image must be uint8, got {image.dtype}")
        return image
    path = Path(image)
    if not path.exists():
        raise FileNotFoundError(f"no image at {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give one image")
    try:
        with Image.open(path) as opened:
            return _upright(opened)
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise ValueError(
            f"{path} is not an image that can be read ({type(error).__name__}: {error}): give a JPEG, PNG, WebP, ..."
        ) from error


def find_damaged(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the files that :func:`read_image` cannot read, with the reasons; each is decoded once."""

    def look(path: Path) -> tuple[Path, str]:
        try:
            read_image(path)
        except (ValueError, OSError) as error:
            return path, str(error.__cause__ or error)
        return path, ""

    with ThreadPoolExecutor() as threads:  # Pillow decodes without Python's lock
        return {path: why for path, why in threads.map(look, paths) if why}


def is_turned(path: str | os.PathLike[str]) -> bool:
    """Return whether the EXIF orientation of an image file swaps its width and height."""
    with Image.open(path) as image:
        return image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)


def to_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 bilinearly to (size, size, 3), whatever its aspect."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def _upright(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    # Pillow's own conversion cuts wide pixels off at 255, which leaves little but white.
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise WidePixels("its pixels have 32 bits and no known range; save it with 8 or 16")
    elif image.mode == "P":
        image = image.convert("RGBA")  # the same colours; straight to RGB Pillow warns about transparent ones
    return np.array(image.convert("RGB"))

"""Read images for training, evaluation and prediction."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Decoders that Pillow itself contains or that run in its process: for EPS it would run Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
_ORIENTATION = 0x0112  # EXIF
_SIDEWAYS = (5, 6, 7, 8)
_TIFF_SIZE = (0x0100, 0x0101)  # width and height as stored


class UnsupportedBitDepth(ValueError):
    """The pixels of an image have an unsupported number of bits."""


def read_image(image: str | os.PathLike[str] | bytes | Image.Image | np.ndarray) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB, read in the same way for training, evaluation and prediction.

    The EXIF orientation of files and PIL images is applied, 16-bit grey reduced to 8 bits, CMYK, palettes and grey
    converted to RGB, and transparency dropped. Of a file with several frames, the first is read.

    Args:
        image: A file, its content, a PIL image, or an array (H, W, 3) uint8.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: Pillow cannot read the file, it has another format than `FORMATS` or more pixels than Pillow's
            limit, its pixels have 32 bits, or an array has another shape.
        TypeError: An array is not uint8.
    """
    if isinstance(image, Image.Image):
        return _upright(image)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"image must be (H, W, 3), got shape {image.shape}")
        if image.dtype != np.uint8:
            raise TypeError(f"image must be uint8, got {image.dtype}")
        return image
    name = "the image" if isinstance(image, bytes) else str(_regular_file(Path(image)))
    try:
        with open_image(image) as opened:
            return _upright(opened)
    except Exception as error:  # Pillow raises many types for damaged files
        raise ValueError(
            f"{name} can't be read as an image ({type(error).__name__}: {error}): pass a JPEG, PNG, WebP, ..."
        ) from error


def open_image(image: str | os.PathLike[str] | bytes) -> Image.Image:
    """Open a file or its content with Pillow's decoders of `FORMATS`, without decoding the pixels yet."""
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def extensions() -> frozenset[str]:
    """Return the suffixes of image files of `FORMATS`, such as ".jpg", in lower case."""
    names = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in names)


def _regular_file(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass an image file")
    if not path.exists():
        raise FileNotFoundError(f"no image at {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: pass an image file")
    return path


def find_damaged(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the files that `read_image` cannot read, with the reasons; decode each once."""

    def check(path: Path) -> tuple[Path, str]:
        try:
            read_image(path)
        except (ValueError, OSError) as error:
            return path, str(error.__cause__ or error)
        return path, ""

    with ThreadPoolExecutor() as threads:  # Pillow releases the GIL while decoding
        return {path: reason for path, reason in threads.map(check, paths) if reason}


def image_size(image: str | os.PathLike[str] | bytes) -> tuple[int, int]:
    """Return (height, width) of an image as `read_image` returns it, from its header.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: Pillow cannot read the header.
    """
    name = "the image" if isinstance(image, bytes) else str(_regular_file(Path(image)))
    try:
        with open_image(image) as opened:
            width, height = opened.size
            rotated = _orientation(opened) in _SIDEWAYS
            if opened.format == "TIFF" and rotated:  # its `size` is rotated already, depending on Pillow's version
                width, height = (opened.getexif()[tag] for tag in _TIFF_SIZE)
    except Exception as error:  # Pillow raises many types for damaged files
        raise ValueError(f"{name} can't be read as an image ({type(error).__name__}: {error})") from error
    return (width, height) if rotated else (height, width)


def orientation(image: str | os.PathLike[str] | bytes) -> int:
    """Return the EXIF orientation of an image, 1 to 8; 1 if it states none."""
    with open_image(image) as opened:
        return _orientation(opened)


def is_rotated(image: str | os.PathLike[str] | bytes) -> bool:
    """Return whether the EXIF orientation of an image swaps its width and height."""
    return orientation(image) in _SIDEWAYS


def _orientation(opened: Image.Image) -> int:
    stated = opened.getexif().get(_ORIENTATION)
    return stated if isinstance(stated, int) and 1 <= stated <= 8 else 1


def to_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 bilinearly to (size, size, 3), ignoring the aspect ratio."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def _upright(image: Image.Image) -> np.ndarray:
    image.load()  # some formats state the orientation after the pixels
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    # Pillow's own conversion clips wide pixels at 255, which makes images almost white.
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnsupportedBitDepth("its pixels have 32 bits and no defined range; save it with 8 or 16 bits")
    elif image.mode == "P":
        image = image.convert("RGBA")  # same colours; a direct conversion warns about transparency
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # convert copies even what is RGB

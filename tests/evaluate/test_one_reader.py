"""Training, evaluation and prediction read every kind of image file alike."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("timm", reason="needs the [ris] extra")

from PIL import Image
from refcoco_files import HEIGHT, WIDTH, box_mask, write_set
from stream_tools import Words
from tiny_models import build, tiny
from torch import nn

from fastkd.data import RefCOCO, ReferDataset, ReferFolder, ShardDataset, write_folder, write_shards
from fastkd.evaluate import predict
from fastkd.report.overlays import as_image

SIZE = 32
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
WIDE = RNG.integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
RGB, GREY = COLOURS[..., :3], np.repeat(COLOURS[..., :1], 3, axis=2)
BITS = box_mask(1, 1, 5, 5)
PALETTE = Image.fromarray(RGB).quantize(16)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    """Return `RGB` stored so that this EXIF orientation makes it upright again."""
    undo: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(np.ascontiguousarray(undo[orientation](RGB))), "PNG", exif=exif)


def wide_png(pixels: np.ndarray) -> bytes:
    """Return a PNG with 16 bits per channel, which Pillow reads but does not write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return content


def inverted_cmyk() -> bytes:
    """Return pure red as a CMYK JPEG, which stores inverted inks."""
    inks = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    inks[..., 1:3] = 255
    return saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)


CASES: dict[str, tuple[bytes, np.ndarray]] = {
    "16-bit grey": (saved(Image.fromarray(WIDE[..., 0]), "PNG"), np.repeat(WIDE[..., :1] >> 8, 3, axis=2)),
    "16-bit grey TIFF": (saved(Image.fromarray(WIDE[..., 0]), "TIFF"), np.repeat(WIDE[..., :1] >> 8, 3, axis=2)),
    "16-bit colour": (wide_png(WIDE), WIDE >> 8),
    "grey": (saved(Image.fromarray(COLOURS[..., 0]), "PNG"), GREY),
    "grey with alpha": (saved(Image.merge("LA", [Image.fromarray(COLOURS[..., k]) for k in (0, 3)]), "PNG"), GREY),
    "1 bit": (
        saved(Image.fromarray(box_mask(1, 1, 5, 5)), "PNG"),
        np.repeat(box_mask(1, 1, 5, 5)[..., None] * 255, 3, 2),
    ),
    "alpha": (saved(Image.fromarray(COLOURS), "PNG"), RGB),
    "palette": (saved(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
    "palette with transparency": (saved(PALETTE, "PNG", transparency=3), np.asarray(PALETTE.convert("RGB"))),
    "GIF": (saved(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB"))),
    "CMYK JPEG": (inverted_cmyk(), np.broadcast_to(np.array([255, 0, 0]), RGB.shape)),
    "CMYK TIFF": (saved(Image.fromarray(np.full_like(COLOURS, 255), "CMYK"), "TIFF"), np.zeros_like(RGB)),
    "lossless WebP": (saved(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
    **{f"orientation {number}": (turned(number), RGB) for number in range(2, 9)},
}


class Seen(nn.Module):
    """Record the image that a model gets."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build(tiny("byob", image_size=SIZE, max_words=12))
        self.config, self.images = self.model.config, []

    def forward(self, image: Any, *words: Any, **named: Any) -> Any:
        self.images.append(image)
        return self.model(image, *words, **named)


@pytest.fixture(scope="module")
def model() -> Seen:
    return Seen()


@pytest.mark.parametrize("name", CASES)
def test_every_reader_gives_the_network_the_same_tensor(tmp_path: Path, model: Seen, name: str) -> None:
    content, expected = CASES[name]
    refcoco = RefCOCO(write_set(tmp_path / "set"))
    path = refcoco.image_path(1)
    path.write_bytes(content)  # formats are detected from the content
    refcoco.refs = [refcoco.ref(0)]
    line = {"image": path.name, "mask": [[1, 2, 7, 2, 7, 8, 1, 8]], "sentence": "red circle"}
    (path.parent / "train.jsonl").write_text(json.dumps(line))
    write_shards(refcoco, tmp_path / "tar")
    write_folder(refcoco, tmp_path / "parquet", format="parquet")
    assert np.array_equal(refcoco.image(1), expected)
    assert np.array_equal(as_image(Image.open(path)), expected)

    options: dict[str, Any] = {"tokenizer": Words(), "image_size": SIZE}
    sets = [refcoco, ReferFolder(path.parent), ReferFolder(tmp_path / "parquet")]
    tensors = [ReferDataset(each, **options)[0]["image"] for each in sets]
    tensors.append(next(iter(ShardDataset(tmp_path / "tar", **options)))["image"])
    assert np.array_equal(predict(model, path, "red circle", Words()).image, expected)
    tensors.append(model.images.pop()[0])
    assert [tensor.equal(tensors[0]) for tensor in tensors] == [True] * 5

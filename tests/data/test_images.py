"""Images: orientation, bit depth, transparency, damaged files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refcoco_files import (
    HEIGHT,
    WIDTH,
    make_ref,
    write_set,
)

from fastkd.data import RefCOCO
from fastkd.data.images import image_size, read_image
from fastkd.errors import FastKDWarning


def with_image(
    root: Path, picture: Image.Image, declared: tuple[int, int] = (HEIGHT, WIDTH), **options: Any
) -> RefCOCO:
    """Return a set with ``picture`` as image 1 and the size ``declared`` (height, width) in instances.json."""
    path = write_set(root) / "images/train2014/COCO_train2014_000000000001.jpg"
    picture.save(path, "PNG", **options)  # lossless; the format is detected from the content
    content = json.loads((root / "refcoco/instances.json").read_text())
    content["images"][0] |= {"height": declared[0], "width": declared[1]}
    (root / "refcoco/instances.json").write_text(json.dumps(content))
    return RefCOCO(root)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def test_applies_exif_orientation(tmp_path: Path) -> None:
    upright, exif = noise(HEIGHT, WIDTH, 3), Image.Exif()
    rotations = {3: np.rot90(upright, 2), 2: upright[:, ::-1], 6: np.rot90(upright, 1), 8: np.rot90(upright, -1)}
    for number, stored in rotations.items():
        exif[0x0112] = number
        data = with_image(tmp_path / str(number), Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
        assert np.array_equal(data.image(1), upright)
        assert np.array_equal(read_image(data.image_path(1)), upright)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_size_and_pixels_follow_the_orientation_in_every_format(kind: str) -> None:
    upright = noise(HEIGHT, WIDTH, 3)
    turned = upright.transpose(1, 0, 2)  # stored with rows and columns exchanged
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    stored |= {5: turned, 6: turned[::-1], 7: turned[::-1, ::-1], 8: turned[:, ::-1]}
    for number, pixels in stored.items():
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = number
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, kind, exif=exif, lossless=True)
        assert image_size(file.getvalue()) == (HEIGHT, WIDTH)
        assert np.array_equal(read_image(file.getvalue()), upright), number


def test_rejects_sizes_of_the_unrotated_bitmap(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = with_image(tmp_path, Image.fromarray(noise(HEIGHT, WIDTH, 3)), exif=exif)
    with pytest.raises(ValueError, match=r"is 20 x 12 after its EXIF orientation, but instances\.json has .* 12 x 20"):
        data.image(1)


def test_scales_16_bit_pixels_and_drops_transparency(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    served = with_image(tmp_path / "wide", Image.fromarray(grey)).image(1)
    assert np.array_equal(served, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))
    colours = noise(HEIGHT, WIDTH, 4)
    assert np.array_equal(with_image(tmp_path / "clear", Image.fromarray(colours)).image(1), colours[..., :3])
    palette = Image.fromarray(noise(HEIGHT, WIDTH, 3)).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    data = with_image(tmp_path / "palette", palette, transparency=bytes(range(16)))
    assert np.array_equal(data.image(1), expected)


def test_rejects_32_bit_pixels(tmp_path: Path) -> None:
    data = RefCOCO(write_set(tmp_path))
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(data.image_path(1), "TIFF")
    with pytest.raises(ValueError, match=r"000001\.jpg can't be read as an image .*32 bits and no defined range"):
        data.image(1)


def test_reports_a_corrupt_jpeg(tmp_path: Path) -> None:
    refs = [make_ref(0, "train"), make_ref(5, "train", ann_id=2, image_id=2), make_ref(7, "train")]
    path = write_set(tmp_path, refs) / "images/train2014/COCO_train2014_000000000001.jpg"
    content = path.read_bytes()
    message = r"000000000001\.jpg of ref 0, ref 7 can't be decoded .*download it again; or skip .*skip_unusable=True"
    for damaged in (content[: len(content) // 2], b"GIF? no", b""):
        path.write_bytes(damaged)
        data = RefCOCO(tmp_path)
        with pytest.raises(ValueError, match=message):
            data.image(1)
        with pytest.warns(
            FastKDWarning, match=r"1 refs are used; skipped 2 × ref with a damaged image \(e\.g\. .*ref 0"
        ):
            data = RefCOCO(tmp_path, skip_unusable=True)
        assert [ref.ref_id for ref in data] == [5]
        assert data.skipped == {"ref with a damaged image": 2}
        assert data.image(2).shape == (HEIGHT, WIDTH, 3)


def test_rejects_an_image_of_another_size(tmp_path: Path) -> None:
    path = write_set(tmp_path) / "images/train2014/COCO_train2014_000000000001.jpg"
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(path)
    with pytest.raises(ValueError, match=r"000001\.jpg is 12 x 21, but its size in instances\.json is 12 x 20"):
        RefCOCO(tmp_path).image(1)

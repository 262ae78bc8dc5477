"""Malicious and broken inputs: each raises one clear error, and nothing in it is run, followed or expanded."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refcoco_files import HEIGHT, LEFT, WIDTH, make_ref, write_set
from stream_tools import Words, pictures

from fastkd.cli._convert import convert, read_yaml
from fastkd.data import RefCOCO, ShardDataset, write_shards
from fastkd.data.images import read_image
from fastkd.data.masks import rasterise

HEAD, TEXT_X = b"\x80\x02", b"X\x01\x00\x00\x00x"  # protocol 2; the string "x"


def doubled(levels: int) -> list[Any]:
    """Return nested lists of 2**levels elements, few of which are stored."""
    nested: list[Any] = ["x"]
    for _ in range(levels):
        nested = [nested, nested]
    return nested


def with_refs(root: Path, **fields: Any) -> Path:
    return write_set(root, [{**make_ref(0, "train"), **fields}])


PICKLES = {
    "function in protocol 4": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.", r"names posix\.system"),
    "function in protocol 0": (b"cos\nsystem\n(S'true'\ntR.", r"names os\.system"),
    "instance": (b"(S'true'\nios\nsystem\n.", r"names os\.system"),
    "builtin of Python 2": (b"c__builtin__\neval\n(S'1'\ntR.", r"names __builtin__\.eval"),
    "registered extension": (HEAD + b"\x82\x01.", "constructs an object .opcode EXT1"),
    "persistent id": (HEAD + b"K\x01Q.", "constructs an object .opcode BINPERSID"),
    "call of a string": (HEAD + TEXT_X + b")R.", "constructs an object .opcode REDUCE"),
    "new object": (HEAD + TEXT_X + b")\x81.", "constructs an object .opcode NEWOBJ"),
    "state of a list": (HEAD + b"]}b.", "constructs an object .opcode BUILD"),
    "set": (b"\x80\x04\x8f.", "constructs an object .opcode EMPTY_SET"),
    "bytes to fill": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "constructs an object .opcode BYTEARRAY8"),
    "index of 2**32 in the memo": (HEAD + b"}r\xff\xff\xff\xff.", "got dict"),  # the C reader allocates 64 GiB
    "deeply nested key": (
        HEAD + b"}" + b")" + b"\x85" * 300_000 + b"K\x01s.",
        "key of type tuple",
    ),  # overflows its stack
    "tuple as a key": (HEAD + b"}()\x85K\x01u.", "key of type tuple"),
    "list as a key": (HEAD + b"}]K\x01s.", "key of type list"),
    "nan as a key": (HEAD + b"(G\x7f\xf8\x00\x00\x00\x00\x00\x00K\x01d.", "key of type float"),
    "string of 2**62 bytes": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.", "can't be read as a pickle"),
    "unknown opcode": (b"\x80\x02\xff.", "can't be read as a pickle .opcode 255"),
    "protocol 9": (b"\x80\x09].", "can't be read as a pickle .unsupported pickle protocol: 9"),
    "no list": (pickle.dumps({"ref_id": 1}), "must hold a list of dicts, got dict"),
    "deeply nested list": (HEAD + b"]" * 10**5 + b"a" * (10**5 - 1) + b".", "must hold a list of dicts"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(tmp_path: Path, name: str) -> None:
    content, message = PICKLES[name]
    write_set(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        RefCOCO(tmp_path)


def test_a_memo_index_need_not_be_small(tmp_path: Path) -> None:
    content = pickle.dumps([make_ref(0, "train")], protocol=2)
    stored = b"]q\x00"  # EMPTY_LIST, BINPUT 0
    assert content[2:5] == stored
    write_set(tmp_path, content.replace(stored, b"]r\xff\xff\xff\xff", 1))
    assert len(RefCOCO(tmp_path)) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ref_id": True}, "ref_id of ref number 0 must be int, got True"),
        ({"ann_id": 2**63}, "ann_id of ref number 0 must be int"),
        ({"image_id": 10**5000}, "image_id of ref number 0 must be int, got a value of type int"),
        ({"image_id": 1.0}, "image_id of ref number 0 must be int, got 1.0"),
        ({"ann_id": doubled(60)}, r"ann_id of ref number 0 must be int, got \[\[\["),
        ({"sentences": [doubled(60)]}, "a sentence of ref 0 has no 'sent'"),
        ({"sentences": [{"sent": "a", "sent_id": True}]}, "no 'sent_id'"),
        ({"sentences": [{"sent": "a\ud800", "sent_id": 1}]}, "sentence 1 of ref 0 holds half of a surrogate pair"),
        ({"sentences": [{"sent": "a\0b", "sent_id": 1}]}, "sentence 1 of ref 0 holds a NUL character"),
        ({"sentences": [{"sent": "a" * 10_001, "sent_id": 1}]}, "sentence 1 of ref 0 has 10001 characters, more than"),
    ],
)
def test_refs(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with_refs(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as error:
        RefCOCO(tmp_path)
    assert len(str(error.value)) < 1500


def change_instances(root: Path, list_name: str = "images", **fields: Any) -> Path:
    """Change the first entry of a list in instances.json."""
    path = write_set(root) / "refcoco/instances.json"
    content = json.loads(path.read_text())
    content[list_name][0] |= fields
    path.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"file_name": "/etc/passwd"}, "points outside of its folder"),
        ({"file_name": "../../a.jpg"}, "points outside of its folder"),
        ({"file_name": "a/..\\..\\b.jpg"}, "points outside of its folder"),
        ({"file_name": "\\\\host\\share\\a.jpg"}, "points outside of its folder"),
        ({"file_name": "C:/a.jpg"}, "points outside of its folder"),
        ({"file_name": "a\\b.jpg"}, "with a backslash or a control character"),
        ({"file_name": "a\0.jpg"}, "with a backslash or a control character"),
        ({"file_name": "\x1b[2J.jpg"}, r"with a backslash or a control character: .*'/'"),
        ({"file_name": ""}, "has file name '': expected the name of a file"),
        ({"file_name": "x" * 1001}, "expected the name of a file, of at most 1000 characters"),
        ({"file_name": None}, "must have a string as file_name, got None"),
        ({"file_name": ["a.jpg"]}, r"must have a string as file_name, got \['a\.jpg'\]"),
        ({"height": True}, "must have integers as height and width, got True and 20"),
        ({"height": float("nan")}, "must have integers as height and width, got nan and 20"),
        ({"height": "12"}, "must have integers as height and width, got '12' and 20"),
        ({"height": 20_000, "width": 20_000}, "image 1 cannot be 20000 x 20000"),
        ({"height": 1, "width": 2**62}, "image 1 cannot be 1 x 4611686018427387904"),
        ({"id": [1]}, "is not a COCO instances file"),
        ({"id": 1.0}, r"is not a COCO instances file \(image id 1\.0 is not an integer"),
    ],
)
def test_images_of_instances(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    change_instances(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        RefCOCO(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "can't be read as JSON"),
        ('{"images": ' + "9" * 5000 + "}", "can't be read as JSON"),
        ("\xff\xfe", "can't be read as JSON"),
        ('{"images": {}, "annotations": []}', "no list 'images'"),
        ('{"images": [], "annotations": [], "categories": null}', "is not a COCO instances file"),
    ],
)
def test_instances(tmp_path: Path, content: str, message: str) -> None:
    (write_set(tmp_path) / "refcoco/instances.json").write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=message):
        RefCOCO(tmp_path)


class TestLinks:
    def test_an_image_outside(self, tmp_path: Path) -> None:
        root = write_set(tmp_path / "set")
        image = RefCOCO(root).image_path(1)
        image.rename(tmp_path / "private.jpg")
        image.symlink_to(tmp_path / "private.jpg")
        with pytest.raises(ValueError, match=r"000001\.jpg is a link to .*private\.jpg, outside of .*copy them"):
            RefCOCO(root)
        with pytest.raises(ValueError, match="outside of"):
            RefCOCO(root, image_root=image.parent)

    def test_an_image_inside(self, tmp_path: Path) -> None:
        image = RefCOCO(write_set(tmp_path)).image_path(1)
        image.rename(tmp_path / "stored.jpg")
        image.symlink_to(tmp_path / "stored.jpg")
        assert RefCOCO(tmp_path).image(1).shape == (HEIGHT, WIDTH, 3)

    @pytest.mark.parametrize("link", ["images", "images/train2014"])
    def test_the_image_folder(self, tmp_path: Path, link: str) -> None:
        root = write_set(tmp_path / "set")
        (root / link).rename(tmp_path / "elsewhere")
        (root / link).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=r"is a link to .*elsewhere.*Pass the folder .* as image_root"):
            RefCOCO(root)
        data = RefCOCO(root, image_root=root / "images/train2014")  # the user's choice
        assert data.image(1).shape == (HEIGHT, WIDTH, 3)

    def test_a_folder_in_a_name(self, tmp_path: Path) -> None:
        root = change_instances(tmp_path / "set", file_name="day/a.jpg")
        (tmp_path / "elsewhere").mkdir()
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "elsewhere/a.jpg")
        (root / "images/train2014/day").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=r"day is a link to .*elsewhere, outside of"):
            RefCOCO(root)

    def test_a_cycle(self, tmp_path: Path) -> None:
        image = RefCOCO(write_set(tmp_path)).image_path(1)
        image.unlink()
        image.symlink_to(image)
        with pytest.raises(OSError, match=r"no image at|Too many levels"):
            RefCOCO(tmp_path).image(1)


@pytest.mark.skipif(os.name != "posix", reason="named pipes of POSIX")
def test_named_pipes_are_not_opened(tmp_path: Path) -> None:
    image = RefCOCO(write_set(tmp_path)).image_path(1)
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(ValueError, match=r"000001\.jpg .*not a regular file"):
        RefCOCO(tmp_path).image(1)
    refs = tmp_path / "refcoco/refs(unc).p"
    refs.unlink()
    os.mkfifo(refs)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p is not a regular file"):
        RefCOCO(tmp_path)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG of this size without pixels."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))):
        chunks += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return chunks


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_header(30_000, 30_000), "DecompressionBombError"),
        (png_header(2**31 - 1, 1), "DecompressionBombError"),
        (png_header(20, 12), "can't be read as an image"),
        (png_header(0, 12), "can't be read as an image"),
        (encoded("EPS"), "UnidentifiedImageError"),  # Pillow would run Ghostscript
        (encoded("PDF"), "UnidentifiedImageError"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "UnidentifiedImageError"),
        (b"\xff\xd8\xff", "can't be read as an image"),
        (b"II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00", "can't be read as an image"),  # a TIFF directory in a loop
        (b"GIF89a", "can't be read as an image"),
        (encoded("JPEG")[:-200], "[Tt]runcated"),
        (b"", "UnidentifiedImageError"),
    ],
)
def test_images(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_image(content)


@pytest.mark.parametrize(
    ("segmentation", "size", "message"),
    [
        ([[1.5e9, 0, 1.6e9, 0, 1.6e9, 1]], (1, 170_000_000), "far outside"),  # overflows 32 bits in pycocotools
        ([[0.0, 0.0, 150.0, 1.0] * 1500] * 50, (HEIGHT, WIDTH), r"outline is 2\.25e\+07 pixels long"),
        ({"size": [2**40, 2**40], "counts": [2**80]}, (HEIGHT, WIDTH), "RLE without counts or size"),
        ({"size": [HEIGHT, WIDTH], "counts": "o" * 100}, (HEIGHT, WIDTH), "more than 40 bits"),
        ({"size": [HEIGHT, WIDTH], "counts": "0" * 10**5}, (HEIGHT, WIDTH), "do not fill"),
        ({"size": [HEIGHT, WIDTH], "counts": doubled(4)}, (HEIGHT, WIDTH), "can't be decoded"),
        ([LEFT, [LEFT]], (HEIGHT, WIDTH), "not a list of at least 3 points"),
    ],
)
def test_segmentations(segmentation: Any, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rasterise(segmentation, *size)


def test_many_parts_need_the_memory_of_one() -> None:
    import tracemalloc

    tracemalloc.start()
    mask = rasterise([LEFT] * 200, 200, 200)
    assert mask.sum() == 36
    assert tracemalloc.get_traced_memory()[1] < 50 * mask.size  # not 200 times
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "/etc/a.tar"}, "points outside of its folder"),
        ({"path": "../a.tar"}, "points outside of its folder"),
        ({"samples": -1}, "must be an integer >= 0, got -1"),
        ({"samples": float("inf")}, "must be an integer >= 0, got inf"),
        ({"samples": "2"}, "must be an integer >= 0, got '2'"),
    ],
)
def test_indices_of_shards(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    write_shards(pictures(2), tmp_path / "shards")
    index = tmp_path / "shards/index.json"
    content = json.loads(index.read_text())
    content["shards"][0] |= entry
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        ShardDataset(tmp_path / "shards", Words())


def test_shards(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "a.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(ValueError, match=r"a\.tar can't be read as a tar file"):
        ShardDataset(folder, Words())
    (folder / "a.tar").unlink()
    image = encoded("PNG")
    for sentence, message in (
        (7, r"sentence must be a string or a list of strings, got 7"),
        ([["x"]], r"sentence must be a string or a list of strings, got \[\['x'\]\]"),
        (b"caf\xe9", "its sentence holds half of a surrogate pair"),
        (["  "], "has an empty sentence"),
    ):
        row = {"image": image, "mask": image, "sentence": sentence, "id": "a"}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "a.parquet")
        with pytest.raises(ValueError, match=message):
            next(ShardDataset(folder, Words(), image_size=8).read(0, 1))


def test_yaml() -> None:
    levels = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    with pytest.raises(ValueError, match="lr must be a number, got ") as error:
        convert(read_yaml("\n".join(levels))["a39"], float, "lr")
    assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match="not YAML"):
        read_yaml("? " + "[" * 1200)
    with pytest.raises(ValueError, match="not YAML"):
        read_yaml("\n".join([*levels, "? *a39\n: 1"]))


def test_arrays_of_objects_are_no_images() -> None:
    with pytest.raises(TypeError, match="image must be uint8, got object"):
        read_image(np.empty((2, 2, 3), dtype=object))

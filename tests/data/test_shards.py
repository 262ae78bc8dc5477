"""Shards on disk: written, indexed, read, divided between readers, and damaged."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

pytest.importorskip("webdataset", reason="needs the [stream] extra")
pytest.importorskip("pyarrow", reason="needs the [stream] extra")

from stream_tools import Words, pictures

from fastkd.data import ShardDataset, collate, write_shards
from fastkd.data.masks import decode_mask
from fastkd.data.shards import Shard, find_shards


def dataset(folder: Path, **options: Any) -> ShardDataset:
    return ShardDataset(folder, Words(), **{"image_size": 8, "max_words": 5, **options})


@pytest.mark.parametrize("format", ["tar", "parquet"])
def test_samples_come_back(tmp_path: Path, format: str) -> None:
    samples = pictures(7)
    shards = write_shards(samples, tmp_path / "shards", samples_per_shard=3, format=format)
    assert [shard.samples for shard in shards] == [3, 3, 1]
    assert find_shards(tmp_path / "shards") == shards
    (tmp_path / "shards" / "index.json").unlink()
    assert find_shards(tmp_path / "shards") == shards  # counted
    data = dataset(tmp_path / "shards", buffer=1, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    found = {sample["id"]: sample for sample in data}
    assert len(data) == len(found) == 7
    for sample in samples:
        read = found[sample["id"]]
        expected = torch.from_numpy(sample["image"]).permute(2, 0, 1) / 255
        torch.testing.assert_close(read["image"], expected)
        assert torch.equal(read["mask"], torch.from_numpy(sample["mask"]))
        assert read["sentence"] in sample["sentence"]
        assert torch.equal(read["input_ids"], Words()([read["sentence"]], 5)[0][0])


def test_shards_of_a_split_hold_the_samples_of_the_split(tmp_path: Path) -> None:
    """The command line's transform included, so a teacher cache of the split serves its shards too."""
    pytest.importorskip("pycocotools", reason="needs the [ris] extra")
    from fastkd.cli._data import DataArgs
    from fastkd.data import RefCOCO, make_shapes
    from fastkd.models import RISModel, preset

    make_shapes(tmp_path / "shapes", images=20, image_size=64)
    write_shards(RefCOCO(tmp_path / "shapes"), tmp_path / "shards", samples_per_shard=20)
    model, data = RISModel(preset("shapes-student")), DataArgs(tmp_path / "shapes")
    split = data.open("train", model, sentences="all")
    expected = {(str(sample["ref_id"]), sample["sentence"]): sample for sample in split}
    stream = data.open_shards(tmp_path / "shards", model, buffer=10, seed=0)
    read = list(stream)
    assert len(read) == len(split.refcoco)
    for sample in read:
        same = expected[sample["id"], sample["sentence"]]
        for key in ("image", "mask", "input_ids", "word_mask"):
            assert torch.equal(sample[key], same[key]), key
    stream.set_epoch(1)
    assert {s["sentence"] for s in stream} != {s["sentence"] for s in read}  # others are drawn


def test_files_of_other_writers_are_read(tmp_path: Path) -> None:
    [sample] = pictures(1)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (
            ("x/1.PNG", png(sample["image"])),
            ("x/1.seg.png", png(sample["mask"].astype(np.uint8))),
            ("x/1.cap", b"left one\n"),
            ("x/1.json", b"{}"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    [read] = dataset(tmp_path, fields={"mask": "seg.png", "sentence": "cap"})
    assert (read["id"], read["sentence"]) == ("x/1", "left one")
    assert torch.equal(read["mask"], torch.from_numpy(sample["mask"]))
    with pytest.raises(
        ValueError, match=r"a.tar, sample 0 has no mask .*it has 'png', 'seg.png', 'cap', 'json'.*fields="
    ):
        list(dataset(tmp_path))


@pytest.mark.parametrize(
    ("mode", "values"), [("1", (0, 1)), ("L", (0, 9)), ("P", (0, 1)), ("RGBA", (0, 7)), ("LA", (0, 7))]
)
def test_masks_of_all_modes(mode: str, values: tuple[int, int]) -> None:
    picture = Image.new(mode, (3, 2), 0)
    bands = len(picture.getbands())
    off, on = [(v if bands == 1 else (v, *[0] * (bands - 2), 255)) for v in values]
    picture.paste(off, (0, 0, 3, 2))
    picture.putpixel((2, 1), on)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    expected = np.zeros((2, 3), bool)
    expected[1, 2] = True
    assert np.array_equal(decode_mask(buffer.getvalue()), expected)


@pytest.mark.parametrize(("readers", "buffer"), [(1, 1), (1, 5), (4, 5), (6, 100)])
def test_every_sample_once_per_pass_over_all_readers(tmp_path: Path, readers: int, buffer: int) -> None:
    write_shards(pictures(23), tmp_path / "shards", samples_per_shard=4)
    data = dataset(tmp_path / "shards", buffer=buffer)
    orders: list[list[int]] = []
    for number in range(2):
        found: list[int] = []
        for reader in range(readers):
            found += [n for p, n in take(data.order(reader, readers), 46) if p == number]
        assert Counter(found) == dict.fromkeys(range(23), 1)
        orders.append(found)
    assert orders[0] != orders[1]


def test_a_buffer_shuffles_across_shards(tmp_path: Path) -> None:
    write_shards(pictures(24), tmp_path / "shards", samples_per_shard=4)
    sequence = [n // 4 for _, n in take(dataset(tmp_path / "shards", buffer=12).order(0, 1), 24)]
    assert len(set(sequence[:4])) > 1
    again = [n // 4 for _, n in take(dataset(tmp_path / "shards", buffer=12, seed=1).order(0, 1), 24)]
    assert sequence != again


def test_reading_starts_anywhere(tmp_path: Path) -> None:
    """The samples read are those of the order, and a later start continues it, without reading finished shards."""
    write_shards(pictures(20), tmp_path / "shards", samples_per_shard=4)
    data = dataset(tmp_path / "shards", buffer=5)
    names = [f"s{n}" for _, n in take(data.order(1, 2), 30)]
    whole = take(data.read(1, 2), 30)
    assert [sample["id"] for sample in whole] == names
    for start in (1, 7, 13, 26):
        for sample, expected in zip(take(data.read(1, 2, start), 4), whole[start:], strict=False):
            assert sample["id"] == expected["id"]
            assert sample["sentence"] == expected["sentence"]
    opened: list[str] = []
    import fastkd.data.stream as module

    read_shard = module.read_shard
    try:
        module.read_shard = lambda shard, fields: opened.append(shard.path) or read_shard(shard, fields)
        take(data.read(0, 1, 18), 2)
    finally:
        module.read_shard = read_shard
    assert len(opened) < 5


def test_a_loader_divides_a_pass_between_workers(tmp_path: Path) -> None:
    write_shards(pictures(9), tmp_path / "shards", samples_per_shard=3)
    loader = DataLoader(dataset(tmp_path / "shards"), batch_size=2, num_workers=2, collate_fn=collate)
    assert sorted(name for batch in loader for name in batch["id"]) == sorted(f"s{n}" for n in range(9))


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(pictures(4), folder, samples_per_shard=2)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1]["samples"] = 3
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"shard-00001.tar holds 2 samples, but 3 were counted"):
        list(dataset(folder))
    with pytest.raises(ValueError, match="2 shards cannot be divided between 3 readers"):
        dataset(folder).check_readers(3)
    (folder / "shard-00001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001.tar, which does not exist"):
        dataset(folder)
    for path in ("pipe:touch x", "https://host/a'; touch x; '.tar", "file:///etc/passwd"):
        (folder / "index.json").write_text(json.dumps({"shards": [{"path": path, "samples": 1}]}))
        with pytest.raises(ValueError, match="is not a URL that shards are read from"):
            dataset(folder)
    (folder / "index.json").write_text(json.dumps({"shards": [{"path": "https://host/a.tar", "samples": 1}]}))
    assert dataset(folder).shards == [Shard("https://host/a.tar", 1)]
    (folder / "index.json").write_text("[]")
    with pytest.raises(ValueError, match="is not an index of shards"):
        dataset(folder)
    [sample] = pictures(1)
    write_shards([{**sample, "image": png(sample["image"])[:60]}], folder, format="parquet", overwrite=True)
    with pytest.raises(ValueError, match=r"sample 's0' of .*shard-00000.parquet can't be decoded"):
        list(dataset(folder))
    write_shards([{**sample, "mask": np.ones((3, 3), bool)}], folder, overwrite=True)
    with pytest.raises(ValueError, match=r"its mask is \(3, 3\), its image \(8, 8\)"):
        list(dataset(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "a.b"}, "id 'a.b' occurs twice, is empty, holds"),
        ({"image": b"no image"}, "sample 's0': its image cannot be read"),
        ({"sentence": ["one\ntwo"]}, "sentence must be one or more lines of text"),
        ({"mask": np.zeros((8, 8))}, r"mask must be \(H, W\) bool, got float64"),
    ],
)
def test_samples_that_cannot_be_stored_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards([{**pictures(1)[0], **change}], tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_a_folder_is_not_replaced_unasked(tmp_path: Path) -> None:
    write_shards(pictures(1), tmp_path / "shards")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        write_shards(pictures(1), tmp_path / "shards")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def take(iterator: Any, count: int) -> list[Any]:
    return list(itertools.islice(iterator, count))

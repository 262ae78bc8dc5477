"""The RefCOCO reader on small hand-made files."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from fastkd.data import RefCOCO
from fastkd.data.images import read_image
from fastkd.data.masks import rasterise
from fastkd.errors import FastKDWarning

HEIGHT, WIDTH = 12, 20
LEFT = [1, 2, 7, 2, 7, 8, 1, 8]  # columns 1-6, rows 2-7
RIGHT = [5, 4, 11, 4, 11, 10, 5, 10]  # columns 5-10, rows 4-9
SENTENCES = ("red circle", "leftmost circle", "the one on top")


def a_ref(ref_id: int, split: str, image_id: int = 1, ann_id: int = 1, sentences: tuple[str, ...] = SENTENCES) -> dict:
    said = [
        {"raw": f"{text.title()}.", "sent": text, "sent_id": 10 * ref_id + k, "tokens": text.split()}
        for k, text in enumerate(sentences)
    ]
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "category_id": 7,
        "image_id": image_id,
        "split": split,
        "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg",
        "sent_ids": [s["sent_id"] for s in said],
        "sentences": said,
    }


def write_set(
    root: Path,
    refs: Any = None,
    segmentations: dict[int, Any] | None = None,
    name: str = "refcoco",
    split_by: str = "unc",
    images: str | None = "images/train2014",
) -> Path:
    """A set of two images; ``refs`` may be bytes of a pickle."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    if refs is None:
        refs = [a_ref(0, "train"), a_ref(1, "val", image_id=2, ann_id=2), a_ref(2, "train", image_id=2, ann_id=2)]
    content = refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=2)
    (folder / f"refs({split_by}).p").write_bytes(content)
    segmentations = {1: [LEFT], 2: [RIGHT], **(segmentations or {})}
    instances = {
        "images": [
            {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": HEIGHT, "width": WIDTH} for i in (1, 2)
        ],
        "annotations": [
            {"id": k, "image_id": min(k, 2), "category_id": 7, "segmentation": s} for k, s in segmentations.items()
        ],
        "categories": [{"id": 7, "name": "circle"}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    if images is not None:
        (root / images).mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for i in (1, 2):
            picture = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
            picture.save(root / images / f"COCO_train2014_{i:012d}.jpg", quality=95)
    return root


def box(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


# ---- the reader


def test_reads_refs_images_and_masks(tmp_path: Path) -> None:
    data = RefCOCO(write_set(tmp_path))
    assert [ref.ref_id for ref in data] == [0, 2]
    assert len(data) == 2
    assert data.sentence_count == 6
    ref = data.ref(2)
    assert (ref.image_id, ref.ann_id, ref.category_id, ref.split) == (2, 2, 7, "train")
    assert [s.text for s in ref.sentences] == list(SENTENCES)
    assert [s.sent_id for s in ref.sentences] == [20, 21, 22]
    assert data.categories == {7: "circle"}
    assert data.image(1).shape == (HEIGHT, WIDTH, 3)
    assert data.image(1).dtype == np.uint8
    assert np.array_equal(data.mask(0), box(1, 2, 7, 8))
    assert "2 refs" in repr(data)
    with pytest.raises(KeyError, match="ref_id 1 is not in split 'train'"):
        data.ref(1)


def test_two_refs_of_one_annotation_stay_two(tmp_path: Path) -> None:
    refs = [a_ref(0, "train", sentences=("one",)), a_ref(1, "train", sentences=("two",))]
    data = RefCOCO(write_set(tmp_path, refs))
    assert [data.ref(i).sentences[0].text for i in (0, 1)] == ["one", "two"]
    assert np.array_equal(data.mask(0), data.mask(1))


@pytest.mark.parametrize(("split", "expected"), [("testA", [0, 2]), ("testB", [1, 2]), ("val", [4])])
def test_test_splits_go_by_their_letter(tmp_path: Path, split: str, expected: list[int]) -> None:
    splits = ["testA", "testB", "testAB", "train", "val"]
    write_set(tmp_path, [a_ref(k, s) for k, s in enumerate(splits)])
    assert [ref.ref_id for ref in RefCOCO(tmp_path, split=split)] == expected


@pytest.mark.parametrize(
    ("name", "split_by", "split"),
    [("refcoco", "google", "test"), ("refcoco+", "unc", "testB"), ("refcocog", "umd", "test")],
)
def test_other_sets_and_splits(tmp_path: Path, name: str, split_by: str, split: str) -> None:
    write_set(tmp_path, [a_ref(0, split)], name=name, split_by=split_by)
    assert len(RefCOCO(tmp_path, name, split_by, split)) == 1


def test_sentence_field(tmp_path: Path) -> None:
    write_set(tmp_path)
    for field, text in (("sent", "red circle"), ("raw", "Red Circle."), ("raw.lower", "red circle.")):
        assert RefCOCO(tmp_path, sentence_field=field).refs[0].sentences[0].text == text


@pytest.mark.parametrize(
    "folder", ["images/mscoco/images/train2014", "images/train2014", "train2014", "coco/train2014"]
)
def test_image_folders_are_probed(tmp_path: Path, folder: str) -> None:
    data = RefCOCO(write_set(tmp_path, images=folder))
    assert data.image_root == tmp_path / folder
    assert data.image(1).shape == (HEIGHT, WIDTH, 3)


def test_image_root_can_be_named(tmp_path: Path) -> None:
    write_set(tmp_path / "set", images=None)
    write_set(tmp_path / "elsewhere", images="photos")
    data = RefCOCO(tmp_path / "set", image_root=tmp_path / "elsewhere/photos")
    assert data.image(1).shape == (HEIGHT, WIDTH, 3)


def test_mask_rules(tmp_path: Path) -> None:
    write_set(tmp_path, segmentations={1: [LEFT, RIGHT]})
    left, right = box(1, 2, 7, 8), box(5, 4, 11, 10)
    assert np.array_equal(RefCOCO(tmp_path).mask(0), left | right)
    assert np.array_equal(RefCOCO(tmp_path, mask_rule="lavt").mask(0), left ^ right)


@pytest.mark.parametrize("rule", ["union", "lavt"])
@pytest.mark.parametrize("compressed", [False, True])
def test_rle_masks(tmp_path: Path, rule: str, compressed: bool) -> None:
    truth = box(3, 1, 9, 5)
    if compressed:
        rle = coco_mask.encode(np.asfortranarray(truth.astype(np.uint8)))
        segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    else:
        runs = np.diff(np.flatnonzero(np.diff(np.r_[2, truth.T.ravel(), 2])))  # columns first, starting with zeros
        segmentation = {"size": [HEIGHT, WIDTH], "counts": runs.tolist()}
    write_set(tmp_path, segmentations={1: segmentation})
    assert np.array_equal(RefCOCO(tmp_path, mask_rule=rule).mask(0), truth)


# ---- images


def with_image(root: Path, picture: Image.Image, shown: tuple[int, int] = (HEIGHT, WIDTH), **options: Any) -> RefCOCO:
    """A set whose image 1 is ``picture``, of a size ``shown`` in instances.json (height, width)."""
    path = write_set(root) / "images/train2014/COCO_train2014_000000000001.jpg"
    picture.save(path, "PNG", **options)  # lossless; readers look at the content, not at the name
    content = json.loads((root / "refcoco/instances.json").read_text())
    content["images"][0] |= {"height": shown[0], "width": shown[1]}
    (root / "refcoco/instances.json").write_text(json.dumps(content))
    return RefCOCO(root)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def test_images_are_upright_by_their_orientation(tmp_path: Path) -> None:
    upright, exif = noise(HEIGHT, WIDTH, 3), Image.Exif()
    turns = {3: np.rot90(upright, 2), 2: upright[:, ::-1], 6: np.rot90(upright, 1), 8: np.rot90(upright, -1)}
    for number, stored in turns.items():
        exif[0x0112] = number
        data = with_image(tmp_path / str(number), Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
        assert np.array_equal(data.image(1), upright)
        assert np.array_equal(read_image(data.image_path(1)), upright)


def test_masks_drawn_on_the_bitmap_of_a_turned_photograph_are_named(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = with_image(tmp_path, Image.fromarray(noise(HEIGHT, WIDTH, 3)), exif=exif)
    with pytest.raises(ValueError, match=r"by its EXIF orientation, 20 x 12, but instances\.json has .* 12 x 20"):
        data.image(1)


def test_wide_pixels_are_scaled_and_transparent_ones_keep_their_colour(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    served = with_image(tmp_path / "wide", Image.fromarray(grey)).image(1)
    assert np.array_equal(served, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))
    colours = noise(HEIGHT, WIDTH, 4)
    assert np.array_equal(with_image(tmp_path / "clear", Image.fromarray(colours)).image(1), colours[..., :3])
    palette = Image.fromarray(noise(HEIGHT, WIDTH, 3)).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    data = with_image(tmp_path / "palette", palette, transparency=bytes(range(16)))
    assert np.array_equal(data.image(1), expected)


def test_pixels_of_32_bits_are_named(tmp_path: Path) -> None:
    data = RefCOCO(write_set(tmp_path))
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(data.image_path(1), "TIFF")
    with pytest.raises(ValueError, match=r"000001\.jpg is not an image that can be read .*32 bits and no known range"):
        data.image(1)


# ---- refs pickles


class Boom:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_pickle_that_names_a_class_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    write_set(tmp_path, pickle.dumps([{"ref_id": Boom(trap)}]))
    with pytest.raises(pickle.UnpicklingError, match=r"refs\(unc\)\.p names pathlib.*not trusted") as error:
        RefCOCO(tmp_path)
    assert "original source" in str(error.value)
    assert not trap.exists()


@pytest.mark.parametrize("harmless", [OrderedDict(a=1), complex(1, 2), {1, 2}, np.int64(3), bytearray(b"x")])
@pytest.mark.parametrize("protocol", [0, 2])
def test_even_harmless_classes_are_refused(tmp_path: Path, harmless: Any, protocol: int) -> None:
    write_set(tmp_path, pickle.dumps([harmless], protocol=protocol))
    with pytest.raises(pickle.UnpicklingError, match="not trusted"):
        RefCOCO(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", pickle.dumps([a_ref(0, "train")])[:-20], b"\x80\x02}K\x01s."]
)
def test_a_damaged_pickle_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    write_set(tmp_path, content)
    with pytest.raises(pickle.UnpicklingError, match=r"refs\(unc\)\.p can't be read as a pickle .*fetch it again"):
        RefCOCO(tmp_path)


def python2(refs: list[dict], text: str, stored: bytes) -> bytes:
    """The pickle of Python 2, where ``text`` is a byte string holding ``stored``."""
    unicode = b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()
    content = pickle.dumps(refs, protocol=2)
    assert unicode in content
    return content.replace(unicode, b"U" + bytes([len(stored)]) + stored)


def test_python_2_strings_are_utf8_then_latin1_with_a_warning(tmp_path: Path) -> None:
    refs = [a_ref(0, "train", sentences=("the cafe",))]
    write_set(tmp_path, python2(refs, "the cafe", "the café".encode()))
    assert RefCOCO(tmp_path).refs[0].sentences[0].text == "the café"
    write_set(tmp_path, python2(refs, "the cafe", "the café".encode("latin1")))
    with pytest.warns(FastKDWarning, match="not utf-8.*latin1"):
        data = RefCOCO(tmp_path)
    assert data.refs[0].sentences[0].text == "the café"


# ---- bad files


def test_missing_files_name_the_path_and_the_layout(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"refcoco.refs\(unc\)\.p doesn't exist; expected layout") as error:
        RefCOCO(tmp_path / "nowhere")
    assert "<root>/refcoco/{instances.json" in str(error.value)
    (write_set(tmp_path) / "refcoco/instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances\.json doesn't exist; expected layout"):
        RefCOCO(tmp_path)


def test_missing_images_name_what_was_tried(tmp_path: Path) -> None:
    write_set(tmp_path, images=None)
    with pytest.raises(FileNotFoundError, match="no folder of images; tried") as error:
        RefCOCO(tmp_path)
    for folder in ("images/mscoco/images/train2014", "images/train2014", "train2014", "coco/train2014"):
        assert str(tmp_path / folder) in str(error.value)
    write_set(tmp_path)
    (tmp_path / "images/train2014/COCO_train2014_000000000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images are missing, such as .*000002\.jpg"):
        RefCOCO(tmp_path)
    with pytest.raises(FileNotFoundError, match="image_root is not a folder"):
        RefCOCO(tmp_path, image_root=tmp_path / "nowhere")


def test_a_corrupt_jpeg_is_named(tmp_path: Path) -> None:
    refs = [a_ref(0, "train"), a_ref(5, "train", ann_id=2, image_id=2), a_ref(7, "train")]
    path = write_set(tmp_path, refs) / "images/train2014/COCO_train2014_000000000001.jpg"
    content = path.read_bytes()
    message = r"000000000001\.jpg of ref 0, ref 7 can't be decoded .*fetch it again; or skip .*skip_unusable=True"
    for damaged in (content[: len(content) // 2], b"GIF? no", b""):
        path.write_bytes(damaged)
        data = RefCOCO(tmp_path)
        with pytest.raises(ValueError, match=message):
            data.image(1)
        with pytest.warns(
            FastKDWarning, match=r"1 refs are used; skipped 2 × ref with a damaged image \(such as: .*ref 0"
        ):
            data = RefCOCO(tmp_path, skip_unusable=True)
        assert [ref.ref_id for ref in data] == [5]
        assert data.skipped == {"ref with a damaged image": 2}
        assert data.image(2).shape == (HEIGHT, WIDTH, 3)


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    path = write_set(tmp_path) / "images/train2014/COCO_train2014_000000000001.jpg"
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(path)
    with pytest.raises(ValueError, match=r"000001\.jpg is 12 x 21 but instances\.json says 12 x 20"):
        RefCOCO(tmp_path).image(1)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "annotation 1 .ref 0. has an empty segmentation"),
        ([[]], "not a list of at least 3 points"),
        ([[1, 2, 7, 8]], "not a list of at least 3 points"),
        ([LEFT, [1, 2, 3]], "not a list of at least 3 points"),
        ({"size": [HEIGHT, WIDTH], "counts": []}, "RLE without counts or size"),
        ({"counts": [4]}, "RLE without counts or size"),
        ({"counts": [4], "size": 5}, "RLE without counts or size"),
        ([["a", "b", "c", "d", "e", "f"]], "holds something else than numbers"),
        (None, "segmentation of type NoneType"),
    ],
)
def test_an_unusable_segmentation_is_named_before_training(tmp_path: Path, segmentation: Any, message: str) -> None:
    write_set(tmp_path, segmentations={1: segmentation})
    with pytest.raises(ValueError, match=message):
        RefCOCO(tmp_path)
    assert len(RefCOCO(tmp_path, split="val")) == 1  # the other split doesn't use it


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (float("nan"), "NaN or infinite"),
        (float("inf"), "NaN or infinite"),
        (10**400, "NaN or infinite"),
        (2.5e8, r"coordinate of 2.5e\+08, far outside its 12 x 20 image"),
        (-1e300, "far outside"),
    ],
)
def test_a_polygon_that_would_crash_c_code_is_named(tmp_path: Path, number: float, message: str) -> None:
    write_set(tmp_path, segmentations={1: [RIGHT, [1, 2, 7, 2, 7, number, 1, 8]]})
    with pytest.raises(ValueError, match=rf"annotation 1 \(ref 0\) has a polygon .*{message}"):
        RefCOCO(tmp_path)
    with pytest.raises(ValueError, match=f"my object has a polygon .*{message}"):
        rasterise([[1, 2, 7, 2, 7, number, 1, 8]], HEIGHT, WIDTH, what="my object")


def test_an_endless_outline_is_named() -> None:
    zigzag = [0.0, 0.0, 150.0, 1.0] * 50_000
    with pytest.raises(ValueError, match=r"outline is 1.5e\+07 pixels long"):
        rasterise([zigzag], HEIGHT, WIDTH)


def test_a_polygon_that_leaves_its_image_is_cut_off(tmp_path: Path) -> None:
    write_set(tmp_path, segmentations={1: [[-3.5, -2, 4, -2, 4, 30, -3.5, 30]]})
    assert np.array_equal(RefCOCO(tmp_path).mask(0), box(0, 0, 4, HEIGHT))


def compressed(mask: np.ndarray) -> str:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def test_compressed_rles_are_decoded_as_pycocotools_does() -> None:
    rng = np.random.default_rng(0)
    for density in (0.02, 0.5, 0.98):
        for height, width in ((1, 7), (9, 1), (40, 70), (300, 200)):
            truth = rng.random((height, width)) < density
            truth[-1, -1] = True  # some pixel
            rle = {"size": [height, width], "counts": compressed(truth)}
            assert np.array_equal(rasterise(rle, height, width), truth)
    block = np.zeros((3000, 2000), dtype=bool)
    block[10:2000, 700:1900] = True  # runs of more than 20 bits
    assert np.array_equal(rasterise({"size": [3000, 2000], "counts": compressed(block)}, 3000, 2000), block)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-1], "can't be decoded .its last number is cut off"),
        (lambda text: text + "9", "do not fill 12 x 20 pixels"),
        (lambda text: "94", "do not fill 12 x 20 pixels"),
        (lambda text: text[:-1] + "o", "can't be decoded .its last number is cut off"),
        (lambda text: text + "o" * 30, "can't be decoded .a number of more than 40 bits"),
        (lambda text: "~" + text, "can't be decoded .character '~'"),
        (lambda text: "é" + text, "can't be decoded"),
        (lambda text: "O" + text, "can't be decoded .a run whose length"),
        (lambda text: [240.5], "can't be decoded .a run whose length"),
        (lambda text: [float("nan"), 240], "can't be decoded .a run whose length"),
        (lambda text: [[240]], "can't be decoded"),
        (lambda text: ["2", "x"], "can't be decoded"),
        (lambda text: [2**70], "do not fill"),
        (lambda text: 240, "can't be decoded .counts of type int"),
    ],
)
def test_a_damaged_rle_is_named_before_training(tmp_path: Path, damage: Any, message: str) -> None:
    counts = damage(compressed(box(3, 1, 9, 5)))
    write_set(tmp_path, segmentations={1: {"size": [HEIGHT, WIDTH], "counts": counts}})
    with pytest.raises(ValueError, match=rf"annotation 1 \(ref 0\) has an RLE .*({message})"):
        RefCOCO(tmp_path)


def test_a_mask_as_a_list_of_rles(tmp_path: Path) -> None:
    left, right = box(3, 1, 9, 5), box(7, 2, 12, 8)
    rles = [{"size": [HEIGHT, WIDTH], "counts": compressed(mask)} for mask in (left, right)]
    for count, union, lavt in ((1, left, left), (2, left | right, left ^ right)):
        write_set(tmp_path, segmentations={1: rles[:count]})
        assert np.array_equal(RefCOCO(tmp_path).mask(0), union)
        assert np.array_equal(RefCOCO(tmp_path, mask_rule="lavt").mask(0), lavt)
    write_set(tmp_path, segmentations={1: [rles[0], LEFT]})
    with pytest.raises(ValueError, match=r"annotation 1 \(ref 0\) mixes RLEs with list in one list"):
        RefCOCO(tmp_path)


def rename_images(root: Path, folder: str) -> Path:
    """Put a folder before every file_name of instances.json."""
    path = root / "refcoco/instances.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = folder + image["file_name"]
    path.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("folder", "images", "image_root"),
    [
        ("train2014/", "images/train2014", None),
        ("train2014/", "train2014", None),
        ("day/one/", "images/train2014/day/one", None),
        ("JPEGImages/", "photos/JPEGImages", "photos"),
        ("JPEGImages/", "photos/JPEGImages", "photos/JPEGImages"),
    ],
)
def test_file_names_with_a_folder(tmp_path: Path, folder: str, images: str, image_root: str | None) -> None:
    rename_images(write_set(tmp_path, images=images), folder)
    data = RefCOCO(tmp_path, image_root=None if image_root is None else tmp_path / image_root)
    assert data.image_path(1) == tmp_path / images / "COCO_train2014_000000000001.jpg"
    assert data.image(1).shape == (HEIGHT, WIDTH, 3)
    data.image_path(2).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images are missing, such as .*000002\.jpg"):
        RefCOCO(tmp_path, image_root=data.image_root)


@pytest.mark.parametrize("folder", ["/etc/", "../", "train2014/../../"])
def test_file_names_that_lead_elsewhere_are_refused(tmp_path: Path, folder: str) -> None:
    rename_images(write_set(tmp_path), folder)
    with pytest.raises(ValueError, match="leads out of the folder"):
        RefCOCO(tmp_path)


def test_unusable_refs_are_skipped_and_counted_on_request(tmp_path: Path) -> None:
    refs = [
        a_ref(0, "train"),
        a_ref(1, "train", sentences=()),
        a_ref(2, "train", sentences=("fine", " ")),
        a_ref(3, "train", sentences=("",)),
        a_ref(4, "train", ann_id=3, image_id=2),
        a_ref(5, "train", ann_id=9),
        a_ref(6, "train", image_id=9),
        a_ref(7, "train", ann_id=2, image_id=2),
        a_ref(8, "val", sentences=()),
    ]
    write_set(tmp_path, refs, segmentations={3: []})
    with pytest.raises(ValueError, match=r"ref 1 has no sentence; leave .* skip_unusable=True \(--skip-unusable\)"):
        RefCOCO(tmp_path)
    with pytest.warns(FastKDWarning, match=r"3 refs are used; skipped 2 × ref without a sentence \(such as: .*ref 1 "):
        data = RefCOCO(tmp_path, skip_unusable=True)
    assert [ref.ref_id for ref in data] == [0, 2, 7]
    assert [s.text for s in data.ref(2).sentences] == ["fine"]
    expected = {
        "ref without a sentence": 2,
        "empty sentence": 2,
        "ref with an unusable segmentation": 1,
        "ref without an annotation": 1,
        "ref without an image": 1,
    }
    assert data.skipped == expected
    data.image_path(2).unlink()
    with pytest.warns(FastKDWarning, match=r"1 × ref without its image file \(such as: .*000002\.jpg of ref 7"):
        data = RefCOCO(tmp_path, skip_unusable=True)
    assert data.skipped == expected | {"ref without its image file": 1}
    assert [ref.ref_id for ref in data] == [0, 2]
    assert "1 images" in repr(data)
    with pytest.raises(ValueError, match="nothing is left after skipping 1 × ref without a sentence"):
        RefCOCO(tmp_path, split="val", skip_unusable=True)


def test_skipping_changes_nothing_of_a_whole_set_and_excuses_no_contradiction(tmp_path: Path) -> None:
    data = RefCOCO(write_set(tmp_path), skip_unusable=True)
    assert (len(data), data.skipped) == (2, {})
    write_set(tmp_path, [a_ref(0, "train"), a_ref(1, "train", image_id=2)])
    with pytest.raises(ValueError, match="annotation 1 has image_id 1"):
        RefCOCO(tmp_path, skip_unusable=True)
    write_set(tmp_path)
    for path in (tmp_path / "images/train2014").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="images are missing"):
        RefCOCO(tmp_path, skip_unusable=True)


def edit_instances(root: Path, **more: list[dict]) -> Path:
    """Append entries to the lists of instances.json."""
    path = root / "refcoco/instances.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: entries + more.get(key, []) for key, entries in content.items()}))
    return root


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"annotations": [{"id": 1, "image_id": 2, "category_id": 7, "segmentation": [LEFT]}]},
            "annotation 1 .image_id",
        ),
        (
            {"annotations": [{"id": 1, "image_id": 1, "category_id": 7, "segmentation": [RIGHT]}]},
            "annotation 1 .segment",
        ),
        (
            {"annotations": [{"id": 1, "image_id": 1, "category_id": 8, "segmentation": [LEFT]}]},
            "annotation 1 .category",
        ),
        ({"images": [{"id": 1, "file_name": "b.jpg", "height": HEIGHT, "width": WIDTH}]}, "image 1 .file_name differs"),
        (
            {"images": [{"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "height": 13, "width": WIDTH}]},
            "image 1 .height differs: 12 and 13",
        ),
        ({"categories": [{"id": 7, "name": "square"}]}, "category 7 .name differs: 'circle' and 'square'"),
    ],
)
def test_two_different_entries_of_one_id_are_named(tmp_path: Path, more: dict, message: str) -> None:
    edit_instances(write_set(tmp_path), **more)
    with pytest.raises(ValueError, match=rf"instances\.json has two different entries for {message}"):
        RefCOCO(tmp_path)


def test_exact_repetitions_and_ambiguous_ids_that_no_ref_uses_are_harmless(tmp_path: Path) -> None:
    path = write_set(tmp_path) / "refcoco/instances.json"
    content = json.loads(path.read_text())
    unused = [{"id": 5, "image_id": i, "category_id": 7, "segmentation": [LEFT]} for i in (1, 2)]
    edit_instances(
        tmp_path,
        annotations=[{**content["annotations"][0], "area": 36.0}, *unused],
        images=content["images"],
        categories=content["categories"],
    )
    assert np.array_equal(RefCOCO(tmp_path).mask(0), box(1, 2, 7, 8))


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (a_ref(3, "train", image_id=2, ann_id=1), "annotation 1 has image_id 1, but ref 3, which refers to it, has 2"),
        ({**a_ref(3, "train"), "category_id": 9}, "annotation 1 has category_id 7, but ref 3, .* has 9"),
    ],
)
def test_a_ref_that_contradicts_its_annotation_is_named(tmp_path: Path, ref: dict, message: str) -> None:
    write_set(tmp_path, [a_ref(0, "train"), ref])
    with pytest.raises(ValueError, match=message):
        RefCOCO(tmp_path)


@pytest.mark.parametrize("size", [(0, WIDTH), (HEIGHT, -1), (10**6, 10**6)])
def test_an_impossible_image_size_is_named(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_set(tmp_path) / "refcoco/instances.json"
    content = json.loads(path.read_text())
    content["images"][0] |= {"height": size[0], "width": size[1]}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="image 1 cannot be "):
        RefCOCO(tmp_path)


def test_a_mask_without_pixels_or_of_another_size_is_an_error(tmp_path: Path) -> None:
    write_set(tmp_path, segmentations={1: [[30, 30, 40, 30, 40, 40]]})
    with pytest.raises(ValueError, match=r"annotation 1 \(ref 0\) covers no pixel of its 12 x 20 image"):
        RefCOCO(tmp_path)
    write_set(tmp_path, segmentations={1: [[-9, 2, -1, 2, -1, 8, -9, 8], LEFT]})  # one part inside is enough
    assert np.array_equal(RefCOCO(tmp_path).mask(0), box(1, 2, 7, 8))
    write_set(tmp_path, segmentations={1: {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}})
    with pytest.raises(ValueError, match=r"annotation 1 \(ref 0\) covers no pixel of its 12 x 20 image"):
        RefCOCO(tmp_path).mask(0)
    write_set(tmp_path, segmentations={1: {"size": [5, 5], "counts": [3, 4, 18]}})
    with pytest.raises(ValueError, match=r"RLE of size \[5, 5\] for an image of \[12, 20\]"):
        RefCOCO(tmp_path).mask(0)
    for counts, message in (([3, 4], "do not fill 12 x 20 pixels"), ([-5, 245], "RLE that can't be decoded")):
        write_set(tmp_path, segmentations={1: {"size": [HEIGHT, WIDTH], "counts": counts}})
        with pytest.raises(ValueError, match=message):
            RefCOCO(tmp_path).mask(0)
    with pytest.raises(ValueError, match="mask rule must be one of 'union', 'lavt'; got 'xor'"):
        rasterise([LEFT], HEIGHT, WIDTH, rule="xor")


def test_damaged_json_and_missing_entries_are_named(tmp_path: Path) -> None:
    write_set(tmp_path, [a_ref(0, "train", image_id=9)])
    with pytest.raises(ValueError, match=r"no image 9, which ref 0"):
        RefCOCO(tmp_path)
    write_set(tmp_path, [a_ref(0, "train", ann_id=9)])
    with pytest.raises(ValueError, match=r"no annotation 9, which ref 0"):
        RefCOCO(tmp_path)
    path = write_set(tmp_path) / "refcoco/instances.json"
    for content, message in (
        ("{", "can't be read as JSON"),
        ("[]", "no list 'images'"),
        ('{"images": []}', "no list 'annotations'"),
        ('{"images": [{}], "annotations": []}', "without the field 'id'"),
        ('{"images": [1], "annotations": []}', "is not a COCO instances file"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            RefCOCO(tmp_path)


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ({"a": 1}, "must hold a list of dicts; got dict"),
        ([{**a_ref(0, "train"), "ann_id": [1]}], r"ref number 0 has ann_id = \[1\], where int is expected"),
        ([{k: v for k, v in a_ref(0, "train").items() if k != "split"}], "split = None, where str is expected"),
        ([a_ref(0, "train"), a_ref(0, "train")], "ref_id 0 more than once"),
        (
            [a_ref(0, "train"), {**a_ref(1, "train"), "sentences": a_ref(0, "train")["sentences"]}],
            "sent_id 0 more than",
        ),
        (
            [{**a_ref(0, "train"), "sentences": [{"sent": t, "sent_id": 8} for t in ("red", "left")]}],
            "sent_id 8 more than once",
        ),
        ([a_ref(0, "train", sentences=())], "ref 0 has no sentence"),
        ([a_ref(0, "train", sentences=("fine", " "))], "sentence 1 of ref 0 is empty in the field 'sent'"),
        ([{**a_ref(0, "train"), "sentences": [{"raw": "x"}]}], "a sentence of ref 0 has no 'sent'"),
        ([{**a_ref(0, "train"), "sentences": [{"sent": "x", "sent_id": "y"}]}], "or no 'sent_id'"),
        ([a_ref(0, "val"), a_ref(1, "val")], r"no ref of split 'train'; it has val \(2\)"),
    ],
)
def test_bad_refs_are_named(tmp_path: Path, refs: Any, message: str) -> None:
    write_set(tmp_path, refs)
    with pytest.raises(ValueError, match=message):
        RefCOCO(tmp_path)


def test_unknown_ids_are_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    data = RefCOCO(tmp_path)
    for ask, message in ((data.image, "image_id 99"), (data.image_size, "image_id 99"), (data.mask, "ref_id 99")):
        with pytest.raises(KeyError, match=f"{message} is not in split 'train' of refcoco"):
            ask(99)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, r"unknown split 'test': refcoco \(unc\) has 'train', 'val', 'testA', 'testB'"),
        ({"name": "grefcoco"}, r"name='grefcoco' with split_by='unc' is not a known set; known: refcoco \(unc\)"),
        ({"split_by": "umd"}, "split_by='umd' is not a known set"),
        ({"mask_rule": "xor"}, "mask_rule must be one of 'union', 'lavt'; got 'xor'"),
        ({"sentence_field": "text"}, "sentence_field must be one of 'sent', 'raw', 'raw.lower'; got 'text'"),
        ({"check_counts": True}, "has 2 refs of split 'train', but the published set has 42404"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict, message: str) -> None:
    write_set(tmp_path)
    with pytest.raises(ValueError, match=message):
        RefCOCO(tmp_path, **options)

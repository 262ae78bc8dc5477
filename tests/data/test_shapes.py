"""The procedural set: files, masks, images, and proportions of sentences."""

from __future__ import annotations

import json
import pickle
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from fastkd.data import RefCOCO, load_tokenizer, make_shapes
from fastkd.data._assets import SHAPES_VOCABULARY_FILE
from fastkd.data.masks import rasterise
from fastkd.data.shapes import KIND_SHARES, language, scene, sentence_kinds, vocab, write
from fastkd.data.shapes.contours import mask_polygons
from fastkd.data.shapes.render import render

IMAGES, SIZE, SEED = 120, 64, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "set"
    make_shapes(path, images=IMAGES, image_size=SIZE, seed=SEED)
    return path


@pytest.fixture(scope="module")
def refs(root: Path) -> list[dict]:
    return pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())


@pytest.fixture(scope="module")
def instances(root: Path) -> dict:
    return json.loads((root / "refcoco" / "instances.json").read_text())


@pytest.fixture(scope="module")
def objects(root: Path) -> dict[int, dict]:
    return {int(k): v for k, v in json.loads((root / "shapes.json").read_text())["objects"].items()}


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_layout_matches_refcoco(root: Path, refs: list[dict], instances: dict) -> None:
    assert set(files_of(root)) == {
        "refcoco/instances.json",
        "refcoco/refs(unc).p",
        "shapes.json",
        *(f"images/train2014/COCO_train2014_{i + 1:012d}.jpg" for i in range(IMAGES)),
    }
    assert type(refs) is list
    ref_keys = {"sent_ids", "file_name", "ann_id", "ref_id", "image_id", "split", "sentences", "category_id"}
    annotations = {a["id"]: a for a in instances["annotations"]}
    names = {i["id"]: i["file_name"] for i in instances["images"]}
    for ref in refs:
        assert type(ref) is dict
        assert set(ref) == ref_keys
        assert ref["sent_ids"] == [s["sent_id"] for s in ref["sentences"]]
        assert ref["file_name"] != names[ref["image_id"]]
        annotation = annotations[ref["ann_id"]]
        assert annotation["image_id"] == ref["image_id"]
        assert annotation["category_id"] == ref["category_id"]
        for sentence in ref["sentences"]:
            assert set(sentence) == {"tokens", "raw", "sent_id", "sent"}
            assert sentence["tokens"] == sentence["sent"].split()
            assert sentence["raw"].lower().rstrip(".") == sentence["sent"]
    assert len({r["ref_id"] for r in refs}) == len(refs)
    assert {r["split"] for r in refs} == {"train", "val", "testA", "testB"}
    for image in instances["images"]:
        assert (image["height"], image["width"]) == (SIZE, SIZE)
        with Image.open(root / "images/train2014" / image["file_name"]) as picture:
            assert (picture.size, picture.mode, picture.format) == ((SIZE, SIZE), "RGB", "JPEG")
    keys = {"segmentation", "area", "iscrowd", "image_id", "bbox", "category_id", "id"}
    assert all(set(a) == keys for a in instances["annotations"])


def test_same_seed_writes_identical_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_shapes(tmp_path / name, images=12, image_size=48, seed=seed)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a)


def test_larger_set_starts_with_the_smaller(root: Path, refs: list[dict], instances: dict, tmp_path: Path) -> None:
    make_shapes(tmp_path / "few", images=10, image_size=SIZE, seed=SEED)
    few, many = files_of(tmp_path / "few"), files_of(root)
    jpegs = [name for name in few if name.endswith(".jpg")]
    assert len(jpegs) == 10
    assert all(few[name] == many[name] for name in jpegs)
    few_refs = pickle.loads(few["refcoco/refs(unc).p"])
    assert few_refs == refs[: len(few_refs)]
    few_annotations = json.loads(few["refcoco/instances.json"])["annotations"]
    assert few_annotations == instances["annotations"][: len(few_annotations)]


def test_sentences_do_not_depend_on_the_image_size(refs: list[dict], tmp_path: Path) -> None:
    make_shapes(tmp_path / "big", images=6, image_size=160, seed=SEED)
    big = pickle.loads((tmp_path / "big/refcoco/refs(unc).p").read_bytes())
    assert big == refs[: len(big)]


def test_four_images_cover_every_split(tmp_path: Path) -> None:
    counts = make_shapes(tmp_path / "four", images=4, image_size=32)
    assert set(counts["refs_by_split"]) == {"train", "val", "testA", "testB"}
    for split in counts["refs_by_split"]:
        assert len(RefCOCO(tmp_path / "four", split=split)) == counts["refs_by_split"][split]
    assert Counter(write.split_of(i) for i in range(100)) == {"train": 80, "val": 10, "testA": 5, "testB": 5}


def test_polygons_reproduce_the_rendered_masks(root: Path, instances: dict) -> None:
    several = holed = 0
    by_image = defaultdict(list)
    for annotation in instances["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    for index in range(IMAGES):
        labels = render(write.draw(index, SEED)[0], SIZE, Random(0))[1]
        for k, annotation in enumerate(by_image[index + 1]):
            truth = labels == k + 1
            for rule in ("union", "lavt"):
                mask = rasterise(annotation["segmentation"], SIZE, SIZE, rule=rule)
                assert (mask & truth).sum() / (mask | truth).sum() >= 0.95
                assert np.array_equal(mask, truth)
            assert annotation["area"] == truth.sum() >= 25
            x, y, w, h = map(int, annotation["bbox"])
            assert truth[y : y + h, x : x + w].sum() == truth.sum()
            assert truth[y].any()
            assert truth[:, x].any()
            several += len(annotation["segmentation"]) > 1
            holed += bool(_has_hole(truth))
        assert k + 1 == labels.max()
    assert several > 10, "occlusion should split some shapes into several polygons"
    assert holed > 0, "some shape should have a hole, which a single polygon cannot represent"


def _has_hole(mask: np.ndarray) -> bool:
    picture = Image.fromarray(np.pad(mask, 1).astype(np.uint8))
    ImageDraw.floodfill(picture, (0, 0), 2)
    return bool((np.asarray(picture) == 0).any())


def test_contours_of_random_masks_are_exact() -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        mask = rng.random(rng.integers(1, 14, size=2)) < rng.choice([0.2, 0.5, 0.8, 0.95])
        polygons = mask_polygons(mask)
        assert bool(polygons) == bool(mask.any())
        if polygons:
            assert np.array_equal(rasterise(polygons, *mask.shape, rule="lavt"), mask)


def test_image_colours_match_the_annotations(root: Path, instances: dict, objects: dict[int, dict]) -> None:
    """The inner pixels of a plain shape are closest to its declared colour."""
    correct = total = 0
    for annotation in instances["annotations"]:
        mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], SIZE, SIZE))) > 0
        inner = mask.copy()
        for axis in (0, 1):
            for shift in (-2, -1, 1, 2):
                inner &= np.roll(mask, shift, axis)
        if objects[annotation["id"]]["texture"] != "plain" or inner.sum() < 8:
            continue
        name = f"COCO_train2014_{annotation['image_id']:012d}.jpg"
        colour = np.asarray(Image.open(root / "images/train2014" / name))[inner].mean(axis=0)
        nearest = min(scene.COLOURS, key=lambda c: np.abs(np.subtract(scene.COLOURS[c], colour)).sum())
        correct += nearest == objects[annotation["id"]]["colour"]
        total += 1
    assert total > 100
    assert correct / total > 0.98


def test_scenes_are_visible_and_often_occluded() -> None:
    counts, hidden = Counter(), 0
    for index in range(200):
        drawn, _ = write.draw(index, 11)
        counts[len(drawn)] += 1
        assert min(drawn.visible) >= scene.MIN_VISIBLE_SHARE
        assert min(drawn.area) >= scene.MIN_VISIBLE_AREA
        hidden += any(share < 0.9 for share in drawn.visible)
        corners = np.concatenate([shape.outline() for shape in drawn.shapes])
        assert corners.min() >= 0
        assert corners.max() <= 1
        if write.split_of(index) == "testB":
            assert len(drawn) >= 6
    assert set(counts) == set(range(3, 9))
    assert 60 < hidden < 195, "most scenes, not all, should have occlusion"


def test_outlines_have_area_one_and_centre_zero() -> None:
    for kind in scene.KINDS:
        x, y = scene.unit_outline(kind).T
        area = np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2
        assert abs(area) == pytest.approx(1)
    assert set(scene.SIZES) == {"small", "medium", "large"}


def test_kinds_follow_the_documented_shares() -> None:
    assert sum(KIND_SHARES.values()) == pytest.approx(1)
    kinds: Counter[str] = Counter()
    for index in range(400):
        expressions = write.draw(index, 1)[1]
        assert 3 <= len(expressions) <= 7
        kinds.update(one.kind for one in expressions)
    for kind, share in KIND_SHARES.items():
        spread = (share * (1 - share) / kinds.total()) ** 0.5
        assert abs(kinds[kind] / kinds.total() - share) < 4 * spread, kinds


def test_refs_have_one_to_four_sentences_of_distinct_kinds(root: Path, refs: list[dict]) -> None:
    kinds = sentence_kinds(root)
    assert len(kinds) == sum(len(ref["sentences"]) for ref in refs)
    lengths = Counter(len(ref["sentences"]) for ref in refs)
    assert set(lengths) == {1, 2, 3, 4}
    for ref in refs:
        mine = [kinds[s] for s in ref["sent_ids"]]
        assert len(set(mine)) == len(mine)
    assert len({(ref["image_id"], ref["ann_id"]) for ref in refs}) == len(refs)


def test_sentences_use_the_declared_words(refs: list[dict]) -> None:
    sentences = [s["sent"] for ref in refs for s in ref["sentences"]]
    assert max(len(s.split()) for s in sentences) <= language.MAX_WORDS
    assert set(" ".join(sentences).split()) <= language.words()
    pieces = vocab.vocabulary()
    assert language.words() <= set(pieces)
    assert all("[UNK]" not in word for word in language.words())


def test_shipped_vocabulary_matches_the_language() -> None:
    assert SHAPES_VOCABULARY_FILE.read_text().splitlines() == vocab.vocabulary(), (
        "run: python -m fastkd.data.shapes.vocab"
    )
    assert vocab.vocabulary()[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(vocab.vocabulary())) == len(vocab.vocabulary())
    tokenizer = load_tokenizer("shapes")
    for word in sorted(language.words()):
        assert tokenizer([word], 8)[1].sum() == 3, f"{word} should be one piece between [CLS] and [SEP]"


def test_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shapes(tmp_path / "old", images=4, image_size=32)
    before = files_of(tmp_path)
    calls = []

    def fail(done: int, images: int) -> None:
        calls.append((done, images))
        if done == 3:
            raise KeyboardInterrupt

    for target, overwrite in (("new", False), ("old", True)):
        with pytest.raises(KeyboardInterrupt):
            make_shapes(tmp_path / target, images=5, image_size=32, progress=fail, overwrite=overwrite)
    assert files_of(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert calls == [(1, 5), (2, 5), (3, 5)] * 2

    rename = Path.rename

    def fail_to_publish(source: Path, target: Path) -> Path:
        if source.name.endswith(".partial"):
            raise OSError("disk")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail_to_publish)
    with pytest.raises(OSError, match="disk"):
        make_shapes(tmp_path / "old", images=5, image_size=32, overwrite=True)
    assert files_of(tmp_path) == before


def test_overwrites_only_shapes_sets_on_request(tmp_path: Path) -> None:
    make_shapes(tmp_path / "set", images=4, image_size=32)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        make_shapes(tmp_path / "set", images=4, image_size=32)
    make_shapes(tmp_path / "set", images=5, image_size=32, overwrite=True)
    assert len(list((tmp_path / "set/images/train2014").iterdir())) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    (tmp_path / "home").mkdir()
    make_shapes(tmp_path / "home", images=4, image_size=32)  # an empty folder is accepted
    (tmp_path / "home" / "thesis.tex").write_text("dear")
    with pytest.raises(FileExistsError, match=r"thesis\.tex|not a shapes set"):
        make_shapes(tmp_path / "home", images=4, image_size=32, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "dear"
    with pytest.raises(FileExistsError, match="is a file"):
        make_shapes(tmp_path / "home" / "thesis.tex", images=4, image_size=32, overwrite=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": 3}, r"images must be an integer of at least 4.*got 3"),
        ({"images": 10.0}, r"images must be .*got 10\.0"),
        ({"image_size": 16}, r"image_size must be .* 32 pixels, got 16"),
        ({"seed": "x"}, r"seed must be an integer, got 'x'"),
    ],
)
def test_rejects_bad_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_shapes(tmp_path / "set", **{"images": 4, "image_size": 32, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_sentence_kinds_reports_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"shapes\.json.*make_shapes"):
        sentence_kinds(tmp_path)

"""ShapesRef: proportions, visibility, splits, identical bytes, and sentences that refer to exactly one shape."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import pytest

from fastkd.data import RefCOCO, load_tokenizer, make_shapesref
from fastkd.data.shapes import sentence_kinds
from fastkd.data.shapesref import KIND_SHARES, PLACELESS_SHARES, SPLITS, VERSION, generate
from tests.helpers.shapes_interpreter import World, read_worlds

IMAGES, SIZE, SEED = 125, 64, 4
DIGESTS = ["43133a0f40be432b", "79a5ecd089ab1ff2", "5db84d2afea7fb8e"]  # of sentences, masks and pixels
PLACE = (
    "left leftmost right rightmost top topmost bottom bottommost middle center above below under behind front "
    "highest lowest furthest far side half closest nearest between second third fourth"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapesref") / "set"
    make_shapesref(path, images=IMAGES, image_size=SIZE, seed=SEED)
    return path


@pytest.fixture(scope="module")
def refs(root: Path) -> list[dict]:
    return pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())


@pytest.fixture(scope="module")
def worlds(root: Path) -> dict[int, World]:
    return read_worlds(root, lambda index: generate.draw(index, SEED)[0])


def test_every_sentence_refers_to_its_shape_only(root: Path, refs: list[dict], worlds: dict[int, World]) -> None:
    kinds, read = sentence_kinds(root), Counter()
    for ref in refs:
        for sentence in ref["sentences"]:
            found = worlds[ref["image_id"]].read(sentence["sent"])
            assert found == [ref["ann_id"]], (ref["image_id"], sentence["sent"])
            read[kinds[sentence["sent_id"]]] += 1
    assert set(read) == set(KIND_SHARES)
    assert min(read.values()) > 15


@pytest.mark.parametrize(
    ("word", "other"),
    [("that is not", "that is"), ("color", "texture"), ("between", "behind"), ("second", "third"), ("left", "right")],
)
def test_swapped_words_change_the_referent(refs: list[dict], worlds: dict[int, World], word: str, other: str) -> None:
    """The interpreter notices a wrong sentence, so the previous test can fail."""
    changed = total = 0
    for ref in refs:
        for sentence in ref["sentences"]:
            swapped = sentence["sent"].replace(f" {word} ", f" {other} ")
            if swapped != sentence["sent"]:
                total += 1
                try:
                    changed += worlds[ref["image_id"]].read(swapped) != [ref["ann_id"]]
                except (AssertionError, ValueError, IndexError):  # no such shape
                    changed += 1
    assert total >= 4
    assert changed / total > 0.6  # in a few scenes both wordings fit the same shape


def test_kinds_follow_the_documented_shares() -> None:
    kinds: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for index in range(200):
        placeless = index % 4 == 0
        expressions = generate.draw(index // 4 * 25 + 4 if placeless else index * 25, 1)[1]
        assert 2 <= len(expressions) <= 5
        kinds[placeless].update(one.kind for one in expressions)
    for placeless, shares in ((True, PLACELESS_SHARES), (False, KIND_SHARES)):
        assert sum(shares.values()) == pytest.approx(1)
        assert set(kinds[placeless]) == set(shares)
        for kind, share in shares.items():
            spread = (share * (1 - share) / kinds[placeless].total()) ** 0.5
            assert abs(kinds[placeless][kind] / kinds[placeless].total() - share) < 4 * spread, kinds


def test_splits(root: Path, refs: list[dict]) -> None:
    assert [generate.split_of(index) for index in range(5)] == list(SPLITS)
    assert Counter(map(generate.split_of, range(100))) == {"train": 84, "val": 4, "testA": 4, "testB": 4, "testC": 4}
    kinds = sentence_kinds(root)
    for split in SPLITS:
        mine = [ref for ref in refs if ref["split"] == split]
        assert len(RefCOCO(root, split=split)) == len(mine) > 0
    for ref in (ref for ref in refs if ref["split"] == "testC"):
        assert {kinds[number] for number in ref["sent_ids"]} <= set(PLACELESS_SHARES)
        for sentence in ref["sentences"]:
            assert not set(PLACE.split()) & set(sentence["tokens"]), sentence["sent"]


def test_attributes_need_every_word(root: Path, refs: list[dict], worlds: dict[int, World]) -> None:
    kinds, checked = sentence_kinds(root), 0
    for ref in refs:
        for sentence in ref["sentences"]:
            if kinds[sentence["sent_id"]] != "attribute":
                continue
            words = [word for word in sentence["sent"].split() if word not in ("the", "shape", "object", "thing")]
            assert len(words) >= 2
            for word in words:
                rest = " ".join(other for other in words if other != word)
                assert len(worlds[ref["image_id"]].read(rest)) > 1, sentence["sent"]
                checked += 1
    assert checked > 60


def test_shapes_have_look_alikes_and_a_minimum_size(root: Path) -> None:
    alike = hidden = small = total = 0
    for index in range(IMAGES):
        scene = generate.draw(index, SEED)[0]
        assert min(scene.visible) >= 0.4
        low, high = (9, 12) if generate.split_of(index) == "testB" else (5, 9)
        assert low <= len(scene) <= high
        looks = Counter((shape.kind, shape.colour) for shape in scene.shapes)
        alike += sum(looks[shape.kind, shape.colour] > 1 for shape in scene.shapes)
        small += sum(shape.size == "small" for shape in scene.shapes)
        hidden += sum(share < 0.95 for share in scene.visible)
        total += len(scene)
    assert alike / total > 0.5
    assert hidden / total > 0.25
    assert small / total > 0.3
    areas = [one["area"] for one in json.loads((root / "refcoco/instances.json").read_text())["annotations"]]
    assert len(areas) == total
    assert min(areas) >= 20  # measured on a finer grid: at least 28 of 64 x 64


def test_sentences_use_the_shipped_vocabulary(refs: list[dict]) -> None:
    tokenizer = load_tokenizer("shapes")
    sentences = [sentence["tokens"] for ref in refs for sentence in ref["sentences"]]
    assert max(map(len, sentences)) <= 18  # of the models' 20 word ids
    pieces = tokenizer([" ".join(tokens) for tokens in sentences], 24)[1].sum(1)
    assert pieces.tolist() == [len(tokens) + 2 for tokens in sentences]


def test_content_depends_on_version_seed_and_index_only() -> None:
    """Digests agree on other machines, and change only with the version."""
    assert VERSION == "fastkd-shapesref-1"
    texts, masks, pixels = (hashlib.sha256() for _ in range(3))
    for index in range(40):
        scene, expressions = generate.draw(index, seed=0)
        image, labels, _ = generate.SHAPESREF.image(scene, SIZE, index, seed=0)
        texts.update("\n".join(f"{one.kind} {one.target} {one.text}" for one in expressions).encode())
        masks.update(np.ascontiguousarray(labels))
        pixels.update(np.ascontiguousarray(image))
    digests = [digest.hexdigest()[:16] for digest in (texts, masks, pixels)]
    older = tuple(map(int, PIL.__version__.split(".")[:2])) < (11, 3)  # 11.0 and 11.1 draw a few pixels differently
    assert digests[: 1 if older else 3] == DIGESTS[: 1 if older else 3]


def test_larger_images_show_the_same_scenes(refs: list[dict], tmp_path: Path) -> None:
    make_shapesref(tmp_path / "set", images=6, image_size=96, seed=SEED)
    large = pickle.loads((tmp_path / "set/refcoco/refs(unc).p").read_bytes())
    assert large == refs[: len(large)]


@pytest.mark.parametrize(("arguments", "message"), [({"images": 4}, "at least 5.*got 4"), ({"seed": 0.5}, "got 0.5")])
def test_rejects_bad_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_shapesref(tmp_path / "set", **{"images": 5, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_shipped_teacher_knows_the_set(root: Path) -> None:
    pytest.importorskip("timm", reason="needs the [ris] extra")
    from fastkd.cli._data import open_split
    from fastkd.cli._models import load_model
    from fastkd.cli._shipped import SHIPPED
    from fastkd.evaluate import evaluate

    assert sum(file.stat().st_size for file in SHIPPED["shapesref"].iterdir()) < 8 * 2**20
    teacher = load_model("shapesref")
    val = open_split(root, "val", teacher, sentences="all")
    assert len(val) >= 10
    assert evaluate(teacher, val, device="cpu").miou > 35

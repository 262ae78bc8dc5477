"""Verify the procedural set's sentences with an independent interpreter.

It uses only the files (masks, attributes, depth), not the meanings that generated the sentences; only occlusion is
computed from the full outlines.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from fastkd.data import make_shapes
from fastkd.data.shapes import KIND_SHARES, sentence_kinds, write

IMAGES, SIZE, SEED = 150, 64, 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "set"
    make_shapes(path, images=IMAGES, image_size=SIZE, seed=SEED)
    return path


@pytest.fixture(scope="module")
def refs(root: Path) -> list[dict]:
    return pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())


@pytest.fixture(scope="module")
def worlds(root: Path) -> dict[int, World]:
    """Return each image's World by image id."""
    objects = {int(k): v for k, v in json.loads((root / "shapes.json").read_text())["objects"].items()}
    by_image = defaultdict(list)
    for annotation in json.loads((root / "refcoco" / "instances.json").read_text())["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    return {image_id: World(image_id - 1, ones, objects) for image_id, ones in by_image.items()}


class World:
    """One image as described by the files."""

    def __init__(self, index: int, annotations: list[dict], objects: dict[int, dict]) -> None:
        self.ids = [a["id"] for a in annotations]
        self.what = {i: objects[i] for i in self.ids}
        self.at, self.size = {}, {}
        grid = np.arange(SIZE) + 0.5
        for a in annotations:
            rle = coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], SIZE, SIZE))
            mask = coco_mask.decode(rle).astype(float)
            self.at[a["id"]] = (mask.sum(0) @ grid / mask.sum(), mask.sum(1) @ grid / mask.sum())
            self.size[a["id"]] = mask.sum() / objects[a["id"]]["visible"]
        shapes = write.draw(index, SEED)[0].shapes
        full = [coco_mask.frPyObjects([(s.outline() * 256).ravel().tolist()], 256, 256) for s in shapes]
        self.full = {i: coco_mask.merge(f) for i, f in zip(self.ids, full, strict=True)}

    def hides(self, over: int, under: int) -> bool:
        both = coco_mask.area(coco_mask.merge([self.full[over], self.full[under]], intersect=True))
        return self.what[over]["depth"] > self.what[under]["depth"] and both > 16  # pixels of 256 x 256: ignore contact

    def nouns(self, phrase: str) -> list[int]:
        words = [w for w in phrase.split() if w not in ("the", "shape", "object", "thing")]
        sizes = {"small": "small", "little": "small", "big": "large", "large": "large"}
        values = [sizes.get(w, w) for w in words]
        found = [
            i
            for i in self.ids
            if all(v in {self.what[i][k] for k in ("kind", "colour", "texture", "size")} for v in values)
        ]
        assert all(any(v in {o[k] for o in self.what.values() for k in o} for v in [value]) for value in values), phrase
        return found

    def read(self, text: str) -> list[int]:
        """Return the shapes that a sentence may refer to, read as loosely as possible."""
        text = text.removeprefix("the ")
        for words, axis, sign in (
            ("leftmost {}|{} furthest to the left|{} on the far left", 0, 1),
            ("rightmost {}|{} furthest to the right|{} on the far right", 0, -1),
            ("topmost {}|highest {}|{} at the very top", 1, 1),
            ("bottommost {}|lowest {}|{} at the very bottom", 1, -1),
        ):
            noun = match(words, text)
            if noun is not None:
                return [min(self.nouns(noun), key=lambda i: sign * self.at[i][axis])]
        for rank, word in enumerate(("second", "third", "fourth"), start=1):
            for side, axis, sign in (("left", 0, 1), ("right", 0, -1), ("top", 1, 1), ("bottom", 1, -1)):
                noun = match(word + " {} from the " + side, text)
                if noun is not None:
                    return [sorted(self.nouns(noun), key=lambda i: sign * self.at[i][axis])[rank]]
        for words, pick in (("biggest {}|largest {}", max), ("smallest {}", min)):
            noun = match(words, text)
            if noun is not None:
                return [pick(self.nouns(noun), key=lambda i: self.size[i])]
        for relation in (
            "to the left of", "left of", "to the right of", "right of", "above", "below", "under",
            "closest to", "nearest to", "behind", "in front of",
        ):  # fmt: skip
            if f" {relation} the " in text:
                noun, anchor = text.split(f" {relation} the ")
                (to,) = self.nouns(anchor)
                return self.related(relation.removeprefix("to the "), [i for i in self.nouns(noun) if i != to], to)
        half = SIZE / 2
        for words, test in (
            ("{} at the top left|top left {}", lambda x, y: x < half and y < half),
            ("{} at the top right|top right {}", lambda x, y: x > half and y < half),
            ("{} at the bottom left|bottom left {}", lambda x, y: x < half and y > half),
            ("{} at the bottom right|bottom right {}", lambda x, y: x > half and y > half),
            ("{} on the left|{} on the left side", lambda x, y: x < half),
            ("{} on the right|{} on the right side", lambda x, y: x > half),
            ("{} at the top|{} in the top half", lambda x, y: y < half),
            ("{} at the bottom|{} in the bottom half", lambda x, y: y > half),
            ("{} in the middle|{} in the center", lambda x, y: max(abs(x - half), abs(y - half)) < SIZE / 6),
        ):
            noun = match(words, text)
            if noun is not None:
                return [i for i in self.nouns(noun) if test(*self.at[i])]
        return self.nouns(text)

    def related(self, relation: str, members: list[int], to: int) -> list[int]:
        if relation == "behind":
            return [i for i in members if self.hides(to, i)]
        if relation == "in front of":
            return [i for i in members if self.hides(i, to)]
        x, y = self.at[to]
        if relation in ("closest to", "nearest to"):
            return [min(members, key=lambda i: np.hypot(self.at[i][0] - x, self.at[i][1] - y))]
        side = {
            "left of": lambda i: self.at[i][0] < x,
            "right of": lambda i: self.at[i][0] > x,
            "above": lambda i: self.at[i][1] < y,
            "below": lambda i: self.at[i][1] > y,
            "under": lambda i: self.at[i][1] > y,
        }[relation]
        return [i for i in members if side(i) or (relation == "under" and self.hides(to, i))]


def match(patterns: str, text: str) -> str | None:
    for pattern in patterns.split("|"):
        before, after = pattern.split("{}")
        if text.startswith(before) and text.endswith(after) and len(text) > len(before + after):
            return text[len(before) : len(text) - len(after)]
    return None


def test_every_sentence_refers_to_its_shape_only(root: Path, refs: list[dict], worlds: dict[int, World]) -> None:
    kinds, read = sentence_kinds(root), Counter()
    for ref in refs:
        for sentence in ref["sentences"]:
            found = worlds[ref["image_id"]].read(sentence["sent"])
            assert found == [ref["ann_id"]], (ref["image_id"], sentence["sent"])
            read[kinds[sentence["sent_id"]]] += 1
    assert set(read) == set(KIND_SHARES)
    assert min(read.values()) > 20


def test_interpreter_detects_wrong_sentences(refs: list[dict], worlds: dict[int, World]) -> None:
    """For the next image most sentences are wrong, so the previous test can fail."""
    wrong = total = 0
    for ref in refs:
        world = worlds[ref["image_id"] % IMAGES + 1]
        for sentence in ref["sentences"]:
            try:
                wrong += len(world.read(sentence["sent"])) != 1
            except (AssertionError, ValueError, IndexError):  # no such shape
                wrong += 1
            total += 1
    assert wrong / total > 0.5


def test_swapped_words_change_the_referent(refs: list[dict], worlds: dict[int, World]) -> None:
    """Replacing words by opposites (left, right; biggest, smallest; ...) refers to another shape or none."""
    opposite = {"left": "right", "leftmost": "rightmost", "biggest": "smallest", "above": "below", "top": "bottom"}
    changed = total = 0
    for ref in refs:
        for sentence in ref["sentences"]:
            words = sentence["sent"].split()
            swapped = " ".join(opposite.get(word, word) for word in words)
            if swapped != sentence["sent"] and words[0] not in ("second", "third") and "second" not in words:
                changed += worlds[ref["image_id"]].read(swapped) != [ref["ann_id"]]
                total += 1
    assert total > 50
    assert changed / total > 0.95

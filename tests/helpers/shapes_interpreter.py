"""An interpreter of the procedural sets' sentences, independent of the code that generates them.

It uses only the files (masks, attributes, depth), not the meanings that generated the sentences; only occlusion is
computed from the full outlines.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from fastkd.data.shapes.scene import Scene, Shape


def read_worlds(root: Path, draw: Callable[[int], Scene]) -> dict[int, World]:
    """Return each image's World by image id; ``draw(index)`` returns a scene."""
    settings = json.loads((root / "shapes.json").read_text())
    objects = {int(k): v for k, v in settings["objects"].items()}
    by_image = defaultdict(list)
    for annotation in json.loads((root / "refcoco" / "instances.json").read_text())["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    size = settings["image_size"]
    return {number: World(ones, objects, draw(number - 1).shapes, size) for number, ones in by_image.items()}


class World:
    """One image as described by the files."""

    def __init__(self, annotations: list[dict], objects: dict[int, dict], shapes: Sequence[Shape], size: int) -> None:
        self.ids = [a["id"] for a in annotations]
        self.what = {i: objects[i] for i in self.ids}
        self.at, self.size = {}, {}
        self.side, grid = size, np.arange(size) + 0.5
        for a in annotations:
            rle = coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], size, size))
            mask = coco_mask.decode(rle).astype(float)
            self.at[a["id"]] = (mask.sum(0) @ grid / mask.sum(), mask.sum(1) @ grid / mask.sum())
            self.size[a["id"]] = mask.sum() / objects[a["id"]]["visible"]
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
        if " that is not " in text:
            noun, value = text.split(" that is not ")
            (value,) = value.removeprefix("a ").split()
            return [i for i in self.nouns(noun) if value not in self.what[i].values()]
        for phrase, attribute in (("of the same color as", "colour"), ("with the same texture as", "texture")):
            if f" {phrase} the " in text:
                noun, anchor = text.split(f" {phrase} the ")
                (to,) = self.nouns(anchor)
                return [i for i in self.nouns(noun) if i != to and self.what[i][attribute] == self.what[to][attribute]]
        if " between the " in text:
            noun, ends = text.split(" between the ")
            (first,), (second,) = map(self.nouns, ends.split(" and the "))
            return [i for i in self.nouns(noun) if i not in (first, second) and self.is_between(i, first, second)]
        for relation in (
            "to the left of", "left of", "to the right of", "right of", "above", "below", "under",
            "closest to", "nearest to", "behind", "in front of",
        ):  # fmt: skip
            if f" {relation} the " in text:
                noun, anchor = text.split(f" {relation} the ")
                (to,) = self.read(anchor)
                return self.related(relation.removeprefix("to the "), [i for i in self.nouns(noun) if i != to], to)
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
        half = self.side / 2
        for words, test in (
            ("{} at the top left|top left {}", lambda x, y: x < half and y < half),
            ("{} at the top right|top right {}", lambda x, y: x > half and y < half),
            ("{} at the bottom left|bottom left {}", lambda x, y: x < half and y > half),
            ("{} at the bottom right|bottom right {}", lambda x, y: x > half and y > half),
            ("{} on the left|{} on the left side", lambda x, y: x < half),
            ("{} on the right|{} on the right side", lambda x, y: x > half),
            ("{} at the top|{} in the top half", lambda x, y: y < half),
            ("{} at the bottom|{} in the bottom half", lambda x, y: y > half),
            ("{} in the middle|{} in the center", lambda x, y: max(abs(x - half), abs(y - half)) < self.side / 6),
        ):
            noun = match(words, text)
            if noun is not None:
                return [i for i in self.nouns(noun) if test(*self.at[i])]
        return self.nouns(text)

    def is_between(self, i: int, first: int, second: int) -> bool:
        """Return whether i sees the two at more than about 100 degrees."""
        a, b = np.subtract(self.at[first], self.at[i]), np.subtract(self.at[second], self.at[i])
        return bool(a @ b < -0.18 * np.linalg.norm(a) * np.linalg.norm(b))

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

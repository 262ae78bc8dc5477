"""Read RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO, RefCLEF and RRSIS-D from the published files."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.data._files import find_images, read_instances, read_refs
from fastkd.data._join import Contradiction, check_agreement, check_unique, image_fault, index
from fastkd.data._known_sets import PUBLISHED_REFS, SPLITS, image_folders, in_split, refs_file
from fastkd.data._records import NO_TARGET, Ref, Sentence
from fastkd.data._skip import SKIP_HINT, Skips
from fastkd.data._values import brief, is_int, sentence_fault
from fastkd.data.images import UnsupportedBitDepth, find_damaged, is_rotated, read_image
from fastkd.data.masks import RULES, check_segmentation, rasterise
from fastkd.data.referring_set import ReferringSet

SENTENCE_FIELDS = ("sent", "raw", "raw.lower")


class RefCOCO(ReferringSet):
    """One split of RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO, RefCLEF or RRSIS-D, read from the published files.

    The refs pickle is read by an unpickler that rejects every class, as utf-8 or, with a warning, as latin1. The
    constructor checks files, segmentations and sentences; images and masks are read on access. It rejects an id shared
    by two different images or annotations, a repeated ref or sentence id, and a ref whose image or category differs
    from its annotation's; exact repetitions of an image or annotation are accepted.

    A ref of gRefCOCO may have several targets, whose masks are united, or none: then its mask is empty.

    Args:
        root: The folder that holds ``refcoco/``, ``refcoco+/``, ... and the images.
        name: ``"refcoco"``, ``"refcoco+"``, ``"refcocog"``, ``"grefcoco"``, ``"refclef"`` or ``"rrsisd"``.
        split_by: Author of the split: ``"unc"``, ``"google"``, ``"umd"`` or ``"berkeley"``.
        split: ``"train"``, ``"val"``, ``"testA"``, ``"testB"``, ``"testC"`` or ``"test"``. A ref of
            split ``"testAB"`` is in both testA and testB.
        image_root: The folder of the image files; default: the first of the usual ones in ``root`` that has them all.
        mask_rule: ``"union"`` of an object's polygons, or ``"lavt"``: pixels covered by exactly one polygon.
        sentence_field: ``"sent"`` (lower-case, no punctuation), ``"raw"``, or ``"raw.lower"``.
        skip_unusable: Skip unusable sentences, and refs without a sentence, with an unusable segmentation, or with a
            missing or damaged annotation or image, instead of raising. The attribute ``skipped`` counts them by reason,
            and one `FastKDWarning` reports them. Contradictions still raise. Decodes every image of the split once.
        check_counts: Raise unless the number of refs equals the published one.

    Raises:
        FileNotFoundError: A file or image is missing; the message lists the paths tried and the expected layout.
        pickle.UnpicklingError: The refs file names a class or is damaged.
        ValueError: An option or split is unknown, the content is damaged or contradictory, a segmentation is unusable,
            or the count is wrong.

    Example::

        val = RefCOCO("data", "refcoco", "unc", "val")
        ref = val.refs[0]
        image, mask = val.image(ref.image_id), val.mask(ref.ref_id)   # (H, W, 3) uint8, (H, W) bool

    Reference: Yu et al., "Modeling Context in Referring Expressions", ECCV 2016 (RefCOCO, RefCOCO+); Mao et al.,
    "Generation and Comprehension of Unambiguous Object Descriptions", CVPR 2016 (RefCOCOg); Liu et al., "GRES:
    Generalized Referring Expression Segmentation", CVPR 2023 (gRefCOCO); Kazemzadeh et al., "ReferItGame", EMNLP 2014
    (RefCLEF); Liu et al., "Rotated Multi-Scale Interaction Network for Referring Remote Sensing Image Segmentation",
    CVPR 2024 (RRSIS-D).
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        name: str = "refcoco",
        split_by: str = "unc",
        split: str = "train",
        *,
        image_root: str | os.PathLike[str] | None = None,
        mask_rule: str = "union",
        sentence_field: str = "sent",
        skip_unusable: bool = False,
        check_counts: bool = False,
    ) -> None:
        _check_options(name, split_by, split, mask_rule, sentence_field)
        self.root = Path(root)
        self.name, self.split_by, self.split = name, split_by, split
        self.mask_rule, self.sentence_field = mask_rule, sentence_field
        path = self.root / name / refs_file(name, split_by)
        all_refs = read_refs(path)
        chosen = [ref for ref in all_refs if in_split(ref["split"], split)]
        if not chosen:
            splits = ", ".join(f"{name} ({n})" for name, n in sorted(Counter(ref["split"] for ref in all_refs).items()))
            raise ValueError(f"{path} has no ref of split {split!r}; it has {splits or 'no refs'}")
        if check_counts:
            self._check_count(path, len(chosen))
        skips = Skips(skip_unusable)
        self._images: dict[int, dict[str, Any]] = {}
        refs = [ref for raw in chosen if (ref := _parse_ref(raw, sentence_field, path, skips)) is not None]
        check_unique(refs, path)
        refs = self._load_instances(self.root / name / "instances.json", refs, skips)
        self.refs = self._with_images(refs, image_root, skips)
        self._by_id = {ref.ref_id: ref for ref in self.refs}
        used = {ref.image_id for ref in self.refs}
        self._images = {number: image for number, image in self._images.items() if number in used}
        self.skipped: dict[str, int] = dict(skips.counts)
        skips.report(f"{path}, split {split!r}", len(self.refs))

    def _origin(self) -> str:
        return f"{str(self.root)!r}, {self.name!r}, {self.split_by!r}, {self.split!r}"

    def image_path(self, image_id: int) -> Path:
        """Return the path of an image, from instances.json."""
        return self.image_root / self._entry(image_id)["file_name"]

    def image_name(self, image_id: int) -> str:
        """Return the name of an image in the image folder, from instances.json."""
        return str(self._entry(image_id)["file_name"])

    def image_bytes(self, image_id: int) -> bytes:
        """Return the content of an image file."""
        return self.image_path(image_id).read_bytes()

    def image_size(self, image_id: int) -> tuple[int, int]:
        """Return the (height, width) of an image, from instances.json."""
        entry = self._entry(image_id)
        return entry["height"], entry["width"]

    def image(self, image_id: int) -> np.ndarray:
        """Return an image, (H, W, 3) uint8 RGB, rotated by its EXIF orientation as in `fastkd.evaluate.predict`.

        Raises:
            ValueError: The file is damaged, or its size differs from instances.json.
        """
        path = self.image_path(image_id)
        try:
            pixels = read_image(path)
        except ValueError as error:
            if isinstance(error.__cause__, UnsupportedBitDepth):
                raise
            users = [f"ref {ref.ref_id}" for ref in self.refs if ref.image_id == image_id]
            raise ValueError(_damaged(path, error.__cause__ or error, ", ".join(users)) + SKIP_HINT) from error
        if pixels.shape[:2] != self.image_size(image_id):
            if pixels.shape[1::-1] == self.image_size(image_id) and is_rotated(path):
                height, width = pixels.shape[:2]
                raise ValueError(
                    f"image {path} is {height} x {width} after its EXIF orientation, but instances.json has the size "
                    f"of its bitmap, {width} x {height} (height x width): the masks were drawn on the stored bitmap; "
                    "remove the orientation tag from these files"
                )
            raise ValueError(
                f"image {path} is {pixels.shape[0]} x {pixels.shape[1]}, but its size in instances.json is "
                f"{' x '.join(map(str, self.image_size(image_id)))} (height x width): these files don't belong together"
            )
        return pixels

    def mask(self, ref_id: int | str) -> np.ndarray:
        """Return the mask of all targets of a ref at the image's original size, (H, W) bool."""
        ref = self.ref(ref_id)
        height, width = self.image_size(ref.image_id)
        mask: np.ndarray | None = None
        for ann_id in ref.targets:
            owner = f"annotation {ann_id} (ref {ref_id})"
            target = rasterise(self._segmentations[ann_id], height, width, rule=self.mask_rule, owner=owner)
            mask = target if mask is None else mask | target
        return np.zeros((height, width), dtype=bool) if mask is None else mask

    def _with_images(self, refs: list[Ref], image_root: str | os.PathLike[str] | None, skips: Skips) -> list[Ref]:
        """Set ``image_root``; return the refs whose image exists and, if skipping is enabled, can be decoded."""
        files: dict[int | str, str] = {ref.ref_id: self._images[ref.image_id]["file_name"] for ref in refs}
        needed = sorted(set(files.values()))
        self.image_root, missing = find_images(self.root, image_root, needed, skips.enabled, image_folders(self.name))
        present = [self.image_root / file for file in needed if file not in missing]
        damaged = find_damaged(present) if skips.enabled else {}
        usable = []
        for ref in refs:
            path = self.image_root / files[ref.ref_id]
            if files[ref.ref_id] in missing:
                skips.add("ref without its image file", f"{path} of ref {ref.ref_id} is missing")
            elif path in damaged:
                skips.add("ref with a damaged image", _damaged(path, damaged[path], f"ref {ref.ref_id}"))
            else:
                usable.append(ref)
        return usable

    def _entry(self, image_id: int) -> dict[str, Any]:
        try:
            return self._images[image_id]
        except KeyError:
            raise KeyError(f"image_id {image_id!r} is not in split {self.split!r} of {self.name}") from None

    def _load_instances(self, path: Path, refs: list[Ref], skips: Skips) -> list[Ref]:
        """Read the refs' images and annotations; return the usable refs."""
        content = read_instances(path)
        images, annotations = {ref.image_id for ref in refs}, {number for ref in refs for number in ref.targets}
        try:
            fields = ("file_name", "height", "width")
            found = index(content["images"], "image", path, fields, images)
            self._images = {i: {key: found[i][key] for key in fields} for i in found}
            fields = ("segmentation", "image_id", "category_id")
            objects = index(content["annotations"], "annotation", path, fields, annotations)
            self._segmentations: dict[int, Any] = {a: objects[a]["segmentation"] for a in objects}
            names = index(content.get("categories", ()), "category", path, ("name",))
            self.categories: dict[int, str] = {c: names[c]["name"] for c in names}
        except KeyError as error:
            raise ValueError(f"{path} has an entry without the field {error}: download the file again") from error
        except TypeError as error:
            raise ValueError(f"{path} is not a COCO instances file ({error}): download it again") from error
        for number, image in self._images.items():
            if fault := image_fault(image):
                raise ValueError(f"{path}: image {number} {fault}: download the file again")
        usable = []
        for ref in refs:
            if ref.image_id not in self._images:
                message = f"{path} has no image {ref.image_id}, which ref {ref.ref_id} refers to"
                skips.add("ref without an image", message)
                continue
            missing = [number for number in ref.targets if number not in self._segmentations]
            if missing:
                message = f"{path} has no annotation {missing[0]}, which ref {ref.ref_id} refers to"
                skips.add("ref without an annotation", message)
                continue
            try:
                for number in ref.targets:
                    check_agreement(ref, number, objects[number], path)
                    owner = f"{path}: annotation {number} (ref {ref.ref_id})"
                    check_segmentation(self._segmentations[number], owner, self.image_size(ref.image_id))
            except Contradiction:
                raise
            except ValueError as error:
                skips.add("ref with an unusable segmentation", str(error))
                continue
            usable.append(ref)
        return usable

    def _check_count(self, path: Path, count: int) -> None:
        published = PUBLISHED_REFS.get((self.name, self.split_by), {}).get(self.split)
        if published is None:
            raise ValueError(
                f"check_counts: no published count is known for {self.name} ({self.split_by}) {self.split}; "
                "pass check_counts=False"
            )
        if published != count:
            raise ValueError(
                f"{path} has {count} refs of split {self.split!r}, but the published set has {published}: "
                "download the file again, or pass check_counts=False for another set in this layout"
            )


def _check_options(name: str, split_by: str, split: str, mask_rule: str, sentence_field: str) -> None:
    if (name, split_by) not in SPLITS:
        known = ", ".join(f"{n} ({by})" for n, by in SPLITS)
        raise ValueError(f"name={name!r} with split_by={split_by!r} is not a known set; known sets: {known}")
    if split not in SPLITS[name, split_by]:
        raise ValueError(
            f"unknown split {split!r}: {name} ({split_by}) has {', '.join(map(repr, SPLITS[name, split_by]))}"
        )
    if mask_rule not in RULES:
        raise ValueError(f"mask_rule must be one of {', '.join(map(repr, RULES))}, got {mask_rule!r}")
    if sentence_field not in SENTENCE_FIELDS:
        raise ValueError(
            f"sentence_field must be one of {', '.join(map(repr, SENTENCE_FIELDS))}, got {sentence_field!r}"
        )


def _damaged(path: Path, reason: object, users: str) -> str:
    return f"image {path} of {users} can't be decoded ({reason}): the file is damaged, download it again"


def _parse_ref(ref: dict[str, Any], field: str, path: Path, skips: Skips) -> Ref | None:
    """Return the ref with its non-empty sentences, or None if there are none."""
    sentences = []
    for sentence in ref["sentences"]:
        key = field.partition(".")[0]
        complete = isinstance(sentence, dict) and is_int(sentence.get("sent_id"))
        if not complete or not isinstance(sentence.get(key), str):
            raise ValueError(
                f"{path}: a sentence of ref {ref['ref_id']} has no {key!r} or no 'sent_id': {brief(sentence)}"
            )
        text = sentence[key].lower() if field == "raw.lower" else sentence[key]
        if fault := sentence_fault(text):
            skips.add(
                "empty sentence" if not text.strip() else "unusable sentence",
                f"{path}: sentence {sentence['sent_id']} of ref {ref['ref_id']} {fault} in the field {key!r}; "
                "try another sentence_field, or remove the sentence from the file",
            )
            continue
        sentences.append(Sentence(sentence["sent_id"], text))
    if not sentences:
        skips.add(
            "ref without a sentence", f"{path}: ref {ref['ref_id']} has no sentence; remove the ref from the file"
        )
        return None
    targets, categories = ref["ann_id"], ref["category_id"]
    if isinstance(targets, list):  # gRefCOCO
        targets = [number for number in targets if number != NO_TARGET]
        category = categories if isinstance(categories, int) else categories[0] if targets and categories else NO_TARGET
        first = targets[0] if targets else NO_TARGET
        return Ref(ref["ref_id"], first, ref["image_id"], category, ref["split"], tuple(sentences), tuple(targets))
    return Ref(ref["ref_id"], targets, ref["image_id"], categories, ref["split"], tuple(sentences))

"""Check a set in the layout of RefCOCO."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from fastkd.data._confine import check_inside, check_name
from fastkd.data._files import best_folder, lists_targets, load_refs, read_instances, ref_fault
from fastkd.data._join import image_fault
from fastkd.data._known_sets import PUBLISHED_REFS, SPLITS, image_folders, in_split, refs_file
from fastkd.data._records import NO_TARGET
from fastkd.data._values import brief, is_int
from fastkd.data.check.content import check_images, check_mask, check_sentence
from fastkd.data.check.findings import SetReport
from fastkd.data.masks import rasterise

_IMAGE_FIELDS = ("file_name", "height", "width")
_ANNOTATION_FIELDS = ("image_id", "category_id", "segmentation")


def check_refs(root: Path, key: tuple[str, str], *, image_root: Path | None, images: bool, max_words: int) -> SetReport:
    """Check one refs file, its instances.json and its images."""
    name, split_by = key
    path = root / name / refs_file(name, split_by)
    report = SetReport(f"{name}/{path.name}")
    raw, content = load_refs(path), read_instances(root / name / "instances.json")
    pictures = _by_id(report, content["images"], "image", ("file_name", "height", "width"))
    annotations = _by_id(report, content["annotations"], "annotation", _ANNOTATION_FIELDS)
    for number, picture in list(pictures.items()):
        if fault := image_fault({field: picture.get(field) for field in _IMAGE_FIELDS}):
            report.problem("invalid image entry", f"image {number}", fault)
            del pictures[number]
    refs = [ref for number, ref in enumerate(raw) if _is_complete(report, ref, number, lists_targets(path))]
    _check_ids(report, refs)
    used: dict[int, None] = {}  # images, in order
    checked: set[int] = set()
    for ref in refs:
        _check_sentences(report, ref, max_words)
        if ref["image_id"] not in pictures:
            report.problem("image not in instances.json", f"ref {ref['ref_id']}", f"image {ref['image_id']}")
            continue
        used[ref["image_id"]] = None
        picture = pictures[ref["image_id"]]
        for number in targets_of(ref):
            if number not in annotations:
                report.problem("annotation not in instances.json", f"ref {ref['ref_id']}", f"annotation {number}")
                continue
            _check_agreement(report, ref, number, annotations[number])
            if number not in checked:
                checked.add(number)
                segmentation, size = annotations[number].get("segmentation"), (picture["height"], picture["width"])
                where = f"annotation {number} (ref {ref['ref_id']})"
                check_mask(report, where, segmentation, partial(rasterise, segmentation, *size))
    _count(report, key, refs)
    _check_files(report, root, name, {number: pictures[number] for number in used}, image_root, images)
    return report


def targets_of(ref: dict[str, Any]) -> list[int]:
    """Return the annotations of a raw ref; none without a target."""
    numbers = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    return [number for number in numbers if number != NO_TARGET]


def _by_id(report: SetReport, records: Iterable[Any], kind: str, fields: tuple[str, ...]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for position, record in enumerate(records):
        number: Any = record.get("id") if isinstance(record, dict) else None
        if not is_int(number):
            report.problem(f"invalid {kind} entry", f"{kind} number {position}", f"id is {brief(number)}")
            continue
        first = found.setdefault(number, record)
        if first is not record:
            differing = [field for field in fields if first.get(field) != record.get(field)]
            if differing:
                report.problem(f"{kind} id occurs twice", f"{kind} {number}", f"with another {differing[0]}")
            else:
                report.note(f"repeated {kind} entry", f"{kind} {number}")
    return found


def _is_complete(report: SetReport, ref: Any, number: int, several: bool) -> bool:
    if not isinstance(ref, dict):
        report.problem("invalid ref", f"ref number {number}", f"not a dict: {brief(ref)}")
        return False
    if fault := ref_fault(ref, several):
        report.problem("invalid ref", f"ref number {number}", f"{fault[0]} must be {fault[1]}, got {fault[2]}")
    return not fault


def _check_ids(report: SetReport, refs: list[dict[str, Any]]) -> None:
    seen: dict[str, set[int]] = {"ref": set(), "sentence": set()}
    for ref in refs:
        sentences = [s for s in ref["sentences"] if isinstance(s, dict) and is_int(s.get("sent_id"))]
        ids = [("ref", ref["ref_id"]), *(("sentence", sentence["sent_id"]) for sentence in sentences)]
        for kind, number in ids:
            if number in seen[kind]:
                report.problem(f"{kind} id occurs twice", f"{kind} {number}", f"in ref {ref['ref_id']}")
            seen[kind].add(number)


def _check_sentences(report: SetReport, ref: dict[str, Any], max_words: int) -> None:
    if not ref["sentences"]:
        report.problem("ref without a sentence", f"ref {ref['ref_id']}")
    for position, sentence in enumerate(ref["sentences"]):
        number = sentence.get("sent_id") if isinstance(sentence, dict) else None
        if not isinstance(sentence, dict) or not is_int(number) or not isinstance(sentence.get("sent"), str):
            report.problem("invalid sentence", f"ref {ref['ref_id']}, sentence number {position}", brief(sentence))
            continue
        raw, tokens = sentence.get("raw"), sentence.get("tokens")
        if not isinstance(raw, str) and isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
            raw = " ".join(tokens)
        where = f"sentence {number} (ref {ref['ref_id']})"
        check_sentence(report, where, sentence["sent"], raw if isinstance(raw, str) else None, max_words)


def _check_agreement(report: SetReport, ref: dict[str, Any], number: int, annotation: dict[str, Any]) -> None:
    image, category = annotation.get("image_id"), annotation.get("category_id")
    where = f"annotation {number} (ref {ref['ref_id']})"
    if image is not None and image != ref["image_id"]:
        report.problem("annotation of another image", where, f"of image {brief(image)}, the ref of {ref['image_id']}")
    expected = ref["category_id"]
    if category is not None and is_int(expected) and category != expected:
        report.problem("annotation of another category", where, f"category {brief(category)}, the ref has {expected}")


def _count(report: SetReport, key: tuple[str, str], refs: list[dict[str, Any]]) -> None:
    images: dict[str, set[int]] = {}
    for ref in refs:
        split = ref["split"]
        if not any(in_split(split, known) for known in SPLITS[key]):
            report.problem("unknown split", f"ref {ref['ref_id']}", f"{brief(split)}; known: {', '.join(SPLITS[key])}")
        report.counts[split].update(refs=1, sentences=len(ref["sentences"]))
        images.setdefault(split, set()).add(ref["image_id"])
        if not targets_of(ref):
            report.counts[split].update({"refs without a target": 1})
    for split, numbers in images.items():
        report.counts[split]["images"] = len(numbers)
    for split, published in PUBLISHED_REFS.get(key, {}).items():
        found = sum(in_split(ref["split"], split) for ref in refs)
        if found != published:
            report.note("another number of refs", split, f"{found}; the published set has {published}")


def _check_files(
    report: SetReport, root: Path, name: str, pictures: dict[int, Any], image_root: Path | None, decode: bool
) -> None:
    named: dict[str, Any] = {}
    for number, picture in pictures.items():
        try:
            named[check_name(picture["file_name"], f"image {number}")] = picture
        except ValueError as error:
            report.problem("file name outside of the folder", f"image {number}", error)
    folders, best = best_folder(root, image_root, list(named), image_folders(name))
    if best is None:
        tried = ", ".join(map(str, folders))
        report.problem("no image folder", f"{len(named)} images are not checked", f"tried {tried}")
        return
    folder, missing, links = best
    for file in named:
        if file in missing:
            report.problem("missing image", folder / file)
    outside = set()
    for link in ("", *sorted(links)):
        try:
            check_inside(folder / link, root if image_root is None else folder)
        except ValueError as error:
            report.problem("link out of the folder", folder / link, error)
            outside |= {file for file in named if not link or file == link or file.startswith(f"{link}/")}
    present = [file for file in named if file not in missing | outside]
    sizes = {file: (named[file]["height"], named[file]["width"]) for file in present}
    check_images(report, [(str(folder / file), folder / file, sizes[file]) for file in present], decode)

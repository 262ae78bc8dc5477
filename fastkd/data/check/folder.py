"""Check a JSONL or parquet file and the images and masks that it names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fastkd.data._confine import check_inside
from fastkd.data._files import find_missing
from fastkd.data._folder_rows import Row, Rows, open_rows
from fastkd.data.check.content import check_images, check_mask, check_sentence
from fastkd.data.check.findings import SetReport
from fastkd.data.images import image_size


def check_folder(root: Path, path: Path, *, image_root: Path | None, images: bool, max_words: int) -> SetReport:
    """Check one split of a `ReferFolder`."""
    report = SetReport(path.name)
    faults: list[ValueError] = []
    rows = open_rows(path, faults)
    for fault in faults:
        where, _, text = str(fault).partition(": ")
        report.problem("invalid row", where, text)
    folders = {"image": image_root or root, "mask": root}
    absent = {field: _absent(report, rows, field, folder) for field, folder in folders.items()}
    counts = report.counts[path.stem]
    ids: set[Any] = set()
    sentence_ids: set[int] = set()
    if not rows.rows and not faults:
        report.problem("no rows", str(path))
    sentences = 0
    files: dict[str, tuple[str, Path | bytes, None]] = {}
    for index, row in enumerate(rows.rows):
        _check_row(report, row, rows.numbers[index], ids, max_words)
        for number in row.sent_ids or range(sentences, sentences + len(row.sentences)):  # as `ReferFolder` counts them
            if number in sentence_ids:
                report.problem("sent_id occurs twice", row.where, f"sent_id {number}")
            sentence_ids.add(number)
        sentences += len(row.sentences)
        counts.update(refs=1, sentences=len(row.sentences), **{"refs without a target": row.mask is None})
        bad_image = isinstance(row.image, str) and row.image in absent["image"]
        bad_mask = isinstance(row.mask, str) and row.mask in absent["mask"]
        if bad_image:
            continue
        name = row.image if isinstance(row.image, str) else row.where
        try:
            source = rows.image_source(index, folders["image"])
            files.setdefault(name, (name, source if isinstance(source, Path) else b"", None))
            size = image_size(source)
        except (ValueError, OSError) as error:
            if isinstance(row.image, str) and images:
                continue  # reported below
            report.problem("unreadable image", name, error)
            continue
        if isinstance(source, bytes):  # looked at now, to hold one at a time
            check_images(report, [(name, source, None)], images)
        if not bad_mask and row.mask is not None:
            check_mask(report, row.where, row.mask, partial(rows.mask, index, root, size))
    check_images(report, [item for item in files.values() if isinstance(item[1], Path)], images)
    counts["images"] = len(files)
    return report


def _check_row(report: SetReport, row: Row, number: int, ids: set[Any], max_words: int) -> None:
    key = number if row.id is None else row.id
    if key in ids:
        report.problem("id occurs twice", row.where, f"id {key!r}")
    ids.add(key)
    if not row.sentences:
        report.problem("ref without a sentence", row.where)
    for text in row.sentences:
        check_sentence(report, row.where, text, None, max_words)


def _absent(report: SetReport, rows: Rows, field: str, folder: Path) -> set[str]:
    """Report missing files and links out of the folder; return their names."""
    named: dict[str, str] = {}
    for row in rows.rows:
        if isinstance(name := getattr(row, field), str):
            named.setdefault(name, row.where)
    absent, links = find_missing(folder, list(named))
    for name in named:
        if name in absent:
            report.problem(f"missing {field}", name, f"of {named[name]}")
    for name in sorted(links):
        try:
            check_inside(folder / name, folder)
        except ValueError as error:
            report.problem("link out of the folder", name, error)
            absent |= {each for each in named if each == name or each.startswith(f"{name}/")}
    return absent

"""``fastkd data check``, ``convert`` and ``show``: look at a set on disk, and write it as JSONL or parquet."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastkd._atomic import replace_files
from fastkd._console import show

if TYPE_CHECKING:
    from fastkd.data import ReferringSet

_Root = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
_Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


def check(
    root: _Root,
    image_root: Path | None = None,
    images: bool = True,
    max_words: int = 20,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Check every set in a folder and list everything that is wrong with it; nothing is changed.

    Exits with status 0 if there are no problems, 1 if there are, and 2 if nothing can be read. Notes are printed, but
    do not count as problems: sentences that are cut, masks whose parts overlap, images with an EXIF orientation, and
    numbers of refs other than the published ones.

    Args:
        root: folder that holds ``refcoco/`` and ``images/``, or ``train.jsonl`` (or parquet).
        image_root: folder of the image files; if omitted, the usual ones under the root.
        images: decode every image once; --no-images looks only at their headers.
        max_words: word limit of the model, [CLS] and [SEP] included.
        json_file: JSON file to also write the report to.
    """
    from fastkd.data import check_set

    report = check_set(root, image_root=image_root, images=images, max_words=max_words)
    if json_file is not None:
        with replace_files(json_file) as (partial,):
            partial.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    show(str(report))
    if report.problems:
        sys.exit(1)


def convert(
    root: _Root,
    out: _Out,
    dataset: str = "refcoco",
    split_by: str | None = None,
    splits: tuple[str, ...] = (),
    format: Literal["jsonl", "parquet"] = "jsonl",
    copy_images: bool = False,
    image_root: Path | None = None,
    mask_rule: Literal["union", "lavt"] = "union",
    sentence_field: Literal["sent", "raw", "raw.lower"] = "sent",
    skip_bad: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the splits of a set as JSONL or parquet, which ``--dataset folder`` reads without pickles.

    Args:
        root: folder that holds ``refcoco/`` and ``images/``.
        out: folder to write ``train.jsonl``, ``val.jsonl``, ... to.
        dataset: refcoco, refcoco+, refcocog, grefcoco, refclef or rrsisd; or folder.
        split_by: author of the splits; if omitted, the first that the set has.
        splits: the splits to write; if omitted, all that the set has refs of.
        format: jsonl names the image files; parquet holds the images (pip install 'fastkd[stream]').
        copy_images: with jsonl, also copy the image files to the folder.
        image_root: folder of the image files; if omitted, the usual ones under the root.
        mask_rule: union of an object's polygons, or lavt: pixels covered by exactly one.
        sentence_field: sent (lower-case, no punctuation), raw, or raw.lower.
        skip_bad: skip and count refs without a sentence, a mask or a readable image, instead of raising an error.
        overwrite: replace existing files.
    """
    from fastkd.cli._arguments import check_folder
    from fastkd.data import open_set, write_folder
    from fastkd.data.opening import splits_of

    check_folder("OUT", out)
    for split in splits or splits_of(root, dataset, split_by):
        opened = open_set(
            root,
            split,
            dataset,
            split_by,
            image_root=image_root,
            mask_rule=mask_rule,
            sentence_field=sentence_field,
            skip_unusable=skip_bad,
        )
        path = write_folder(opened, out, format=format, copy_images=copy_images, overwrite=overwrite)
        show(f"{path}: {len(opened)} refs, {opened.sentence_count} sentences{_skipped(opened)}")
    if format == "jsonl" and not copy_images:
        show(f"read it with: --data {out} --dataset folder --image-root {opened.image_root}")  # type: ignore[attr-defined]
    else:
        show(f"read it with: --data {out} --dataset folder")


def show_samples(
    root: _Root,
    out: Path = Path("samples.png"),
    dataset: str = "refcoco",
    split_by: str | None = None,
    split: str = "train",
    count: int = 12,
    columns: int = 4,
    tile: int = 256,
    seed: int = 0,
    image_root: Path | None = None,
    mask_rule: Literal["union", "lavt"] = "union",
    skip_bad: bool = False,
) -> None:
    """Write a contact sheet: random samples of a split with their masks and sentences, as PNG.

    Args:
        root: folder that holds ``refcoco/`` and ``images/``, or ``train.jsonl``.
        out: PNG file to write.
        dataset: refcoco, refcoco+, refcocog, grefcoco, refclef or rrsisd; or folder.
        split_by: author of the splits; if omitted, the first that the set has.
        split: train, val, test, testA, ...
        count: number of samples.
        columns: samples per row.
        tile: side of a sample in pixels.
        seed: seed of the choice.
        image_root: folder of the image files; if omitted, the usual ones under the root.
        mask_rule: union of an object's polygons, or lavt: pixels covered by exactly one.
        skip_bad: skip and count refs without a sentence, a mask or a readable image, instead of raising an error.
    """
    from random import Random

    from fastkd.data import open_set
    from fastkd.report import contact_sheet
    from fastkd.report.overlays import write_png

    for name, value in (("count", count), ("columns", columns), ("tile", tile)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    opened = open_set(
        root, split, dataset, split_by, image_root=image_root, mask_rule=mask_rule, skip_unusable=skip_bad
    )
    refs = Random(seed).sample(opened.refs, min(count, len(opened)))
    samples = [(opened.image(r.image_id), opened.mask(r.ref_id), f"{r.ref_id}: {r.sentences[0].text}") for r in refs]
    sheet = contact_sheet(samples, columns=columns, tile=tile)
    with replace_files(out) as (partial,):
        write_png(sheet, partial)
    show(f"{out}: {len(samples)} of {len(opened)} refs{_skipped(opened)}")


def _skipped(opened: ReferringSet) -> str:
    counts = ", ".join(f"{number} × {reason}" for reason, number in opened.skipped.items())
    return f"; skipped {counts}" if counts else ""

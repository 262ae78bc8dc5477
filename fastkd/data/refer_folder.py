"""Read a folder of images and masks, described by a JSONL or parquet file."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastkd.data._confine import check_inside
from fastkd.data._files import absolute, find_missing, read_bytes
from fastkd.data._folder_rows import Row, open_rows
from fastkd.data._join import check_unique
from fastkd.data._records import NO_TARGET, Ref, Sentence
from fastkd.data._skip import Skips
from fastkd.data._values import sentence_fault
from fastkd.data.images import image_size, read_image
from fastkd.data.masks import RULES
from fastkd.data.referring_set import ReferringSet


class ReferFolder(ReferringSet):
    """One split of a set of your own: ``SPLIT.jsonl`` or ``SPLIT.parquet`` next to images and masks.

    A line of the JSONL file, or row of the parquet file, is a ref::

        {"image": "images/a.jpg", "mask": "masks/a.png", "sentence": "the red cup"}

    ``image`` is the name of an image file in the folder; in parquet also the encoded image (binary, or the struct of
    the library datasets). ``mask`` is the name of an image file of the same size, not 0 on the object; or COCO polygons
    or an RLE; in parquet also an encoded image; null if the sentence refers to nothing in the image. ``sentence`` is
    one sentence or a list. ``id``, an integer or string, is optional; default: the number of the row, from 0. So is
    ``sent_id``, a list with an integer per sentence.

    The constructor checks names, ids and sentences, and that the files exist; images and masks are read on access.

    Args:
        root: The folder.
        split: Name of the JSONL or parquet file without its suffix.
        image_root: Folder of the image files; default: ``root``. Mask files are below ``root``.
        mask_rule: How polygons of one mask are combined; see `RefCOCO`.
        skip_unusable: Skip unusable sentences, and refs whose image or mask is missing or damaged, instead of raising;
            counted in ``skipped``. Reads every image and mask once.
        name: Name of the set in logs; default: that of the folder.

    Raises:
        FileNotFoundError: the file, an image or a mask is missing.
        ValueError: A row is invalid, a name or a link leads out of the folder, or an id occurs twice.
        ImportError: Parquet needs ``pip install 'fastkd[stream]'``.

    Example::

        train_set = ReferDataset(ReferFolder("data/cups", "train"), load_tokenizer("vocab.txt"), image_size=480)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        image_root: str | os.PathLike[str] | None = None,
        mask_rule: str = "union",
        skip_unusable: bool = False,
        name: str | None = None,
    ) -> None:
        if mask_rule not in RULES:
            raise ValueError(f"mask_rule must be one of {', '.join(map(repr, RULES))}, got {mask_rule!r}")
        self.root = Path(root)
        self.image_root = self.root if image_root is None else Path(image_root)
        self.name, self.split, self.mask_rule = name or absolute(self.root).name, split, mask_rule
        path = find_rows(self.root, split)
        self._rows = open_rows(path)
        skips = Skips(skip_unusable)
        missing = self._missing(skip_unusable)
        self._number_of: dict[int | str, int] = {}  # ref_id to row
        self._image_rows: list[int] = []  # image_id to the first row with this image
        images: dict[str | int, int] = {}
        self.refs, sent_id = [], 0
        for number, row in enumerate(self._rows.rows):
            absent = [name for name in (row.image, row.mask) if isinstance(name, str) and name in missing]
            if absent:
                skips.add("ref without its image or mask file", f"{row.where}: {absent[0]} is missing")
                continue
            sentences = self._sentences(row, sent_id, skips)
            sent_id += len(row.sentences)
            if not sentences:
                skips.add("ref without a sentence", f"{row.where} has no sentence; remove it from the file")
                continue
            image_id = images.setdefault(number if row.image_key is None else row.image_key, len(images))
            self._image_rows += [number] * (image_id == len(self._image_rows))
            ref_id = number if row.id is None else row.id
            ann_id = NO_TARGET if row.mask is None else number
            self.refs.append(Ref(ref_id, ann_id, image_id, NO_TARGET if row.mask is None else 0, split, sentences))
            self._number_of[ref_id] = number
        check_unique(self.refs, path)
        if skip_unusable:
            self._skip_damaged(skips)
        self.skipped = dict(skips.counts)
        skips.report(str(path), len(self.refs))
        if not self.refs:
            raise ValueError(f"{path} has no rows")

    def _origin(self) -> str:
        return f"{str(self.root)!r}, {self.split!r}"

    def image_size(self, image_id: int) -> tuple[int, int]:
        """Return the (height, width) of an image, from its header."""
        return image_size(self._image_source(image_id))

    def image(self, image_id: int) -> np.ndarray:
        """Return an image, (H, W, 3) uint8 RGB."""
        source = self._image_source(image_id)
        try:
            return read_image(source)
        except ValueError as error:
            if isinstance(source, bytes):
                raise ValueError(f"{self._row(image_id).where}: {error}") from error
            raise

    def image_name(self, image_id: int) -> str:
        """Return the name of an image file, or the row that holds the image."""
        row = self._row(image_id)
        return row.image if isinstance(row.image, str) else row.where

    def image_bytes(self, image_id: int) -> bytes:
        """Return the encoded image."""
        source = self._image_source(image_id)
        return source if isinstance(source, bytes) else read_bytes(source)

    def mask(self, ref_id: int | str) -> np.ndarray:
        """Return the mask of a ref at the image's original size, (H, W) bool."""
        ref = self.ref(ref_id)
        number = self._number_of[ref_id]
        return self._rows.mask(number, self.root, self.image_size(ref.image_id), self.mask_rule)

    def _row(self, image_id: int) -> Row:
        return self._rows.rows[self._image_rows[image_id]]

    def _image_source(self, image_id: int) -> Path | bytes:
        return self._rows.image_source(self._image_rows[image_id], self.image_root)

    def _sentences(self, row: Row, first_id: int, skips: Skips) -> tuple[Sentence, ...]:
        found = []
        ids = row.sent_ids or range(first_id, first_id + len(row.sentences))
        for number, text in zip(ids, row.sentences, strict=True):
            if fault := sentence_fault(text):
                reason = "empty sentence" if not text.strip() else "unusable sentence"
                skips.add(reason, f"{row.where}: its sentence {fault}; remove it from the file")
            else:
                found.append(Sentence(number, text))
        return tuple(found)

    def _missing(self, partial: bool) -> set[str]:
        """Return the names of files that do not exist; refuse links out of the folder."""
        missing: set[str] = set()
        for folder, field in ((self.image_root, "image"), (self.root, "mask")):
            rows = {str(name): row for row in self._rows.rows if isinstance(name := getattr(row, field), str)}
            absent, links = find_missing(folder, list(rows))
            if absent and not partial:
                example = min(absent)
                raise FileNotFoundError(
                    f"{len(absent)} of {len(rows)} {field} files are missing, such as {folder / example} of "
                    f"{rows[example].where}"
                )
            for name in sorted(links):
                check_inside(folder / name, folder)
            missing |= absent
        return missing

    def _skip_damaged(self, skips: Skips) -> None:
        def fault(ref: Ref) -> str:
            try:
                self.image(ref.image_id)
                self.mask(ref.ref_id)
            except (ValueError, OSError) as error:
                return str(error)
            return ""

        with ThreadPoolExecutor() as threads:
            faults = list(threads.map(fault, self.refs))
        for reason in filter(None, faults):
            skips.add("ref with a damaged image or mask", reason)
        self.refs = [ref for ref, reason in zip(self.refs, faults, strict=True) if not reason]


def find_rows(root: Path, split: str) -> Path:
    """Return the JSONL or parquet file of a split.

    Raises:
        FileNotFoundError: the split is missing; the message lists those of the folder.
        ValueError: There are both.
    """
    found = [path for suffix in (".jsonl", ".parquet") if (path := root / f"{split}{suffix}").is_file()]
    if len(found) == 1 and Path(split).name == split:
        return found[0]
    if found:
        raise ValueError(f"{root} has {' and '.join(path.name for path in found)}: remove one of them")
    present = ", ".join(sorted(path.stem for path in folder_files(root))) or "none"
    raise FileNotFoundError(f"no {split}.jsonl or {split}.parquet in {root}; splits there: {present}")


def folder_files(root: Path) -> list[Path]:
    """Return the JSONL and parquet files of a folder."""
    return sorted(path for path in root.glob("*") if path.suffix in (".jsonl", ".parquet") and path.is_file())

"""Rows of a `ReferFolder`: lines of a JSONL file, or rows of a parquet file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.data._confine import check_name
from fastkd.data._files import read_bytes, read_json
from fastkd.data._parquet import STORED, ParquetTable, Stored
from fastkd.data._values import brief, is_int
from fastkd.data.masks import EmptyMask, decode_mask, rasterise

FIELDS = ("image", "mask", "sentence", "id", "sent_id", "image_name")


@dataclass(slots=True)
class Row:
    """A checked row.

    Attributes:
        where: File and line, for messages.
        image: Name of the image file, or `STORED`.
        mask: Name of the mask file, a segmentation, `STORED`, or None without a target.
        sentences: One or more texts, not yet checked.
        id: Integer or string, or None.
        sent_ids: Ids of the sentences, or None.
        image_key: What rows with the same image share, or None if that is unknown.
    """

    where: str
    image: str | Stored
    mask: Any
    sentences: list[str]
    id: int | str | None
    sent_ids: list[int] | None
    image_key: str | None


class Rows:
    """The rows of a file.

    Args:
        contents: The content of each row, and where it is.
        faults: A list that collects the errors of invalid rows, which are then skipped; default: they are raised.
    """

    def __init__(self, contents: Iterable[tuple[Any, str]], faults: list[ValueError] | None = None) -> None:
        self.rows: list[Row] = []
        self.numbers: list[int] = []  # of the rows in the file
        for number, (content, where) in enumerate(contents):
            try:
                self.rows.append(_row(read_json(content, where) if isinstance(content, bytes) else content, where))
                self.numbers.append(number)
            except ValueError as error:
                if faults is None:
                    raise
                faults.append(error)

    def stored(self, index: int, field: str) -> bytes:
        """Return the bytes of an image or mask that the file itself holds."""
        raise NotImplementedError

    def image_source(self, index: int, folder: Path) -> Path | bytes:
        """Return the path of a row's image, or its content."""
        image = self.rows[index].image
        return folder / image if isinstance(image, str) else self.stored(index, "image")

    def mask(self, index: int, folder: Path, size: tuple[int, int], rule: str) -> np.ndarray:
        """Return the mask of a row, (H, W) bool, for an image of this (height, width)."""
        row = self.rows[index]
        if row.mask is None:
            return np.zeros(size, dtype=bool)
        if isinstance(row.mask, list | dict):
            return rasterise(row.mask, *size, rule=rule, owner=row.where)
        content = read_bytes(folder / row.mask) if isinstance(row.mask, str) else self.stored(index, "mask")
        try:
            mask = decode_mask(content)
        except Exception as error:  # Pillow raises many types for damaged files
            raise ValueError(f"{row.where}: its mask can't be read ({type(error).__name__}: {error})") from error
        if mask.shape != size:
            raise ValueError(
                f"{row.where}: its mask is {mask.shape}, its image {size} (height, width); they must be equal"
            )
        if not mask.any():
            raise EmptyMask(f"{row.where}: its mask covers no pixel; write null if the sentence has no target")
        return mask


class JsonRows(Rows):
    """The lines of a JSONL file."""

    def __init__(self, path: Path, faults: list[ValueError] | None = None) -> None:
        lines = enumerate(read_bytes(path).split(b"\n"), start=1)
        super().__init__(((line, f"{path}, line {number}") for number, line in lines if line.strip()), faults)


class ParquetRows(Rows):
    """The rows of a parquet file; images and masks stored in it are read on access."""

    def __init__(self, path: Path, faults: list[ValueError] | None = None) -> None:
        self.table = ParquetTable(path, ("image", "mask", "sentence"), FIELDS, ("image", "mask"), ("mask",))
        super().__init__(self.table.contents(), faults)

    def stored(self, index: int, field: str) -> bytes:
        """Return the bytes of an image or mask."""
        return self.table.stored(self.numbers[index], field)


def _row(content: Any, where: str) -> Row:
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be an object with image, mask and sentence, got {brief(content)}")
    if missing := [field for field in ("image", "mask", "sentence") if field not in content]:
        raise ValueError(f"{where} has no {missing[0]!r}: expected image, mask (null without a target) and sentence")
    image, mask, texts, number, sent_ids, image_name = (content.get(field) for field in FIELDS)
    if image is not STORED:
        image = check_name(image, where)
    if isinstance(mask, str):
        mask = check_name(mask, where)
    elif mask is not None and mask is not STORED and not isinstance(mask, list | dict):
        raise ValueError(f"{where}: mask must be a file name, a segmentation or null, got {brief(mask)}")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: sentence must be a string or a list of strings, got {brief(content['sentence'])}")
    if not (number is None or is_int(number) or (isinstance(number, str) and 0 < len(number) <= 200)):
        raise ValueError(f"{where}: id must be an integer or a short string, got {brief(number)}")
    if sent_ids is not None and not (
        isinstance(sent_ids, list) and len(sent_ids) == len(texts) and all(is_int(each) for each in sent_ids)
    ):
        raise ValueError(f"{where}: sent_id must be a list with an integer per sentence, got {brief(sent_ids)}")
    if not (image_name is None or isinstance(image_name, str)):
        raise ValueError(f"{where}: image_name must be text, got {brief(image_name)}")
    return Row(where, image, mask, texts, number, sent_ids, image_name if image is STORED else str(image))


def open_rows(path: Path, faults: list[ValueError] | None = None) -> Rows:
    """Return the rows of a JSONL or parquet file; see `Rows`."""
    return (JsonRows if path.suffix == ".jsonl" else ParquetRows)(path, faults)

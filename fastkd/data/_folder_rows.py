"""Rows of a `ReferFolder`: lines of a JSONL file, or rows of a parquet file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.data._confine import check_name
from fastkd.data._files import read_bytes, read_json
from fastkd.data._values import brief, is_int
from fastkd.data.shards import import_reader

_ROW_GROUPS = 2  # kept decoded per process
FIELDS = ("image", "mask", "sentence", "id")


class Stored:
    """An image or mask whose bytes are in the parquet file itself."""


STORED = Stored()


@dataclass(slots=True)
class Row:
    """A checked row.

    Attributes:
        where: File and line, for messages.
        image: Name of the image file, or `STORED`.
        mask: Name of the mask file, a segmentation, `STORED`, or None without a target.
        sentences: One or more texts, not yet checked.
        id: Integer or string, or None.
    """

    where: str
    image: str | Stored
    mask: Any
    sentences: list[str]
    id: int | str | None


class JsonRows:
    """The lines of a JSONL file."""

    def __init__(self, path: Path) -> None:
        lines = [line for line in enumerate(read_bytes(path).split(b"\n"), start=1) if line[1].strip()]
        wheres = [f"{path}, line {number}" for number, _ in lines]
        self.rows = [_row(read_json(line, where), where) for (_, line), where in zip(lines, wheres, strict=True)]

    def stored(self, number: int, field: str) -> bytes:
        """Never called: lines hold names."""
        raise NotImplementedError


class ParquetRows:
    """The rows of a parquet file; images and masks stored in it are read on access, a row group at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = self._open()
        names = file.schema_arrow.names
        if missing := [name for name in ("image", "mask", "sentence") if name not in names]:
            raise ValueError(f"{path} has no column {missing[0]!r}: expected image, mask, sentence and perhaps id")
        stored = {name for name in ("image", "mask") if _holds_bytes(file.schema_arrow.field(name).type)}
        columns = [name for name in FIELDS if name in names and name not in stored]
        table = file.read(columns=columns).to_pylist()
        self.rows = [
            _row({**row, **dict.fromkeys(stored, STORED)}, f"{path}, row {number}") for number, row in enumerate(table)
        ]
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        self._places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
        self._columns = sorted(stored)
        self._groups: dict[tuple[int, int], Any] = {}

    def stored(self, number: int, field: str) -> bytes:
        """Return the bytes of an image or mask."""
        group, row = self._places[number]
        key = (os.getpid(), group)  # a forked process opens the file again
        if key not in self._groups:
            while len(self._groups) >= _ROW_GROUPS:
                del self._groups[next(iter(self._groups))]
            self._groups[key] = self._open().read_row_group(group, columns=self._columns)
        value = self._groups[key].column(field)[row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise ValueError(f"{self.path}, row {number}: {field} holds no bytes: expected an encoded image")
        return value

    def _open(self) -> Any:
        parquet = import_reader("pyarrow.parquet")
        try:
            return parquet.ParquetFile(self.path)
        except ValueError as error:  # ArrowInvalid
            raise ValueError(f"{self.path} can't be read as parquet ({error}): copy it again") from error


def _holds_bytes(kind: Any) -> bool:
    """Return whether an Arrow type is binary, or the image type of the library datasets."""
    types = import_reader("pyarrow").types
    if types.is_struct(kind):
        return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _row(content: Any, where: str) -> Row:
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be an object with image, mask and sentence, got {brief(content)}")
    if missing := [field for field in ("image", "mask", "sentence") if field not in content]:
        raise ValueError(f"{where} has no {missing[0]!r}: expected image, mask (null without a target) and sentence")
    image, mask, texts, number = (content.get(field) for field in FIELDS)
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
    return Row(where, image, mask, texts, number)

"""Rows of a parquet file, some of whose columns may hold encoded images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastkd.data.shards import import_reader

_ROW_GROUPS = 2  # kept decoded per process


class Stored:
    """An image or mask whose bytes are in the parquet file itself."""


STORED = Stored()


class ParquetTable:
    """The rows of a parquet file; encoded images are read on access, a row group at a time.

    Args:
        path: The file.
        required: Columns that must exist.
        fields: Columns to read, as far as they exist.
        images: Those of them that may hold encoded images.
        nullable: Those of them where null means none.

    Raises:
        ValueError: The file cannot be read, or lacks a column.
        ImportError: ``pip install 'fastkd[stream]'`` is missing.
    """

    def __init__(
        self,
        path: Path,
        required: Sequence[str],
        fields: Sequence[str],
        images: Sequence[str] = ("image",),
        nullable: Sequence[str] = (),
    ) -> None:
        self.path = path
        file = self._open()
        names = file.schema_arrow.names
        if missing := [name for name in required if name not in names]:
            raise ValueError(f"{path} has no column {missing[0]!r}: expected {', '.join(required)} and perhaps id")
        self._held = [name for name in images if name in names and _holds_bytes(file.schema_arrow.field(name).type)]
        columns = [name for name in fields if name in names and name not in self._held]
        self._rows: list[dict[str, Any]] = file.read(columns=columns).to_pylist()
        self._null = {name: _null_rows(file, name) if name in nullable else set() for name in self._held}
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        self._places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
        self._groups: dict[tuple[int, int], Any] = {}

    def contents(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield the content of each row and where it is; an image in the file itself is `STORED`."""
        for number, row in enumerate(self._rows):
            held = {name: None if number in self._null[name] else STORED for name in self._held}
            yield {**row, **held}, f"{self.path}, row {number}"

    def stored(self, number: int, field: str) -> bytes:
        """Return the bytes of an image in a row."""
        group, row = self._places[number]
        key = (os.getpid(), group)  # a forked process opens the file again
        if key not in self._groups:
            while len(self._groups) >= _ROW_GROUPS:
                del self._groups[next(iter(self._groups))]
            self._groups[key] = self._open().read_row_group(group, columns=self._held)
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


def _null_rows(file: Any, column: str) -> set[int]:
    """Return the rows in which a column is null; only row groups with nulls are read."""
    compute = import_reader("pyarrow.compute")
    found: set[int] = set()
    first = 0
    for group in range(file.metadata.num_row_groups):
        part = file.metadata.row_group(group)
        leaves = [part.column(leaf) for leaf in range(part.num_columns)]
        statistics = next(leaf.statistics for leaf in leaves if leaf.path_in_schema.split(".")[0] == column)
        if statistics is None or not statistics.has_null_count or statistics.null_count:
            values = file.read_row_group(group, columns=[column]).column(column)
            null = compute.is_null(values).to_pylist()
            found |= {first + row for row, is_null in enumerate(null) if is_null}
        first += part.num_rows
    return found

"""Scores of every sample of an evaluation, as a JSONL or parquet file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkd._atomic import replace_files
from fastkd._messages import shortened
from fastkd.data._files import read_bytes, read_json
from fastkd.data.shards import import_reader
from fastkd.evaluate.protocols import protocol
from fastkd.evaluate.result import EvalResult

SUFFIXES = (".jsonl", ".parquet")
_CONDITIONS = (
    "dataset",
    "split_by",
    "split",
    "protocol",
    "resolution",
    "decision",
    "threshold",
    "mask_rule",
    "precision",
)
_COUNTS = ("intersection", "union", "target_pixels", "predicted_pixels")


@dataclass(frozen=True)
class SampleScores:
    """Scores of the samples of one evaluation, from a file or an `EvalResult`.

    Attributes:
        source: name of the file, or "this evaluation".
        conditions: dataset, split, protocol and the others of `EvalResult.conditions`.
        samples: the records of `EvalResult.samples`, by id: (ref_id, sent_id) as text, or the index in the dataset.
    """

    source: str
    conditions: dict[str, Any]
    samples: dict[tuple[str, ...], dict[str, Any]] = field(repr=False)

    @classmethod
    def of(cls, result: EvalResult) -> SampleScores:
        """Return the scores of an evaluation.

        Raises:
            ValueError: an id occurs twice, or the result was read from a log, without its samples.
        """
        if not result.samples:
            raise ValueError(
                "the result has no samples: it must come from evaluate(), not from a log or a training run"
            )
        return cls("this evaluation", result.conditions, _by_id(result.samples, "this evaluation"))


def check_suffix(path: Path, argument: str) -> None:
    """Raise an error unless a file can be written or read by its suffix.

    Raises:
        ValueError: the suffix is neither .jsonl nor .parquet.
        ImportError: parquet needs ``pip install 'fastkd[stream]'``.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{argument} must end in .jsonl or .parquet, got {str(path)!r}")
    if path.suffix == ".parquet":
        import_reader("pyarrow.parquet")


def write_samples(result: EvalResult, path: str | os.PathLike[str]) -> None:
    """Write the scores of every sample to a file: a JSON object per line, or a parquet table.

    Each row has the conditions of the evaluation (``dataset``, ``split_by``, ``split``, ``protocol``, ``resolution``,
    ``decision``, ``threshold``, ``mask_rule``, ``precision``) and the fields of `EvalResult.samples`. The file is
    replaced as a whole.

    Args:
        result: what `evaluate` returned.
        path: a name that ends in .jsonl or .parquet.

    Raises:
        ValueError: another suffix, or a result without samples.
        ImportError: parquet needs ``pip install 'fastkd[stream]'``.

    Example:
        >>> write_samples(evaluate(student, val_set), "student.jsonl")
    """
    path = Path(path).expanduser()
    check_suffix(path, "path")
    scores = SampleScores.of(result)
    rows = [{**scores.conditions, **sample} for sample in scores.samples.values()]
    with replace_files(path) as (partial,):
        if path.suffix == ".jsonl":
            lines = (json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain) + "\n" for row in rows)
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(lines)
        else:
            _write_parquet(rows, partial)


def read_samples(path: str | os.PathLike[str]) -> SampleScores:
    """Return the scores in a file that `write_samples` wrote.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: another suffix, a damaged file, a row that lacks a field, rows of several evaluations, or an id that
            occurs twice.
        ImportError: parquet needs ``pip install 'fastkd[stream]'``.

    Example:
        >>> print(compare(read_samples("distilled.jsonl"), read_samples("alone.jsonl")))
    """
    path = Path(path).expanduser()
    check_suffix(path, "path")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: write it with fastkd evaluate --out-samples, or write_samples")
    rows = list(_read_lines(path) if path.suffix == ".jsonl" else _read_parquet(path))
    if not rows:
        raise ValueError(f"{path} has no rows: write it again with fastkd evaluate --out-samples")
    first, first_where = rows[0]
    for row, where in rows:
        _check_row(row, where)
        other = next((name for name in _CONDITIONS if row[name] != first[name]), None)
        if other is not None:
            raise ValueError(
                f"{where} has {other} {row[other]!r}, but {first_where} {first[other]!r}: a file must hold one "
                "evaluation"
            )
    conditions = {name: first[name] for name in _CONDITIONS}
    samples = [{name: value for name, value in row.items() if name not in conditions} for row, _ in rows]
    return SampleScores(str(path), conditions, _by_id(samples, str(path)))


def describe_id(key: Sequence[str]) -> str:
    """Return a sample's id for a message."""
    return f"ref {key[0]}, sentence {key[1]}" if len(key) == 2 else f"sample {key[0]}"


def _by_id(samples: Sequence[Mapping[str, Any]], where: str) -> dict[tuple[str, ...], dict[str, Any]]:
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for number, sample in enumerate(samples):
        named = sample.get("ref_id") is not None and sample.get("sent_id") is not None
        key = (str(sample["ref_id"]), str(sample["sent_id"])) if named else (str(number),)
        if key in found:
            raise ValueError(f"{where} has {describe_id(key)} twice: give each sample its own ref_id and sent_id")
        found[key] = dict(sample)
    return found


def _check_row(row: Any, where: str) -> None:
    """Raise ``ValueError`` unless a row has the fields that a comparison needs."""
    fields = (*_CONDITIONS, "iou", *_COUNTS)
    if not isinstance(row, dict) or (missing := [name for name in fields if name not in row]):
        lacks = f"no {shortened(missing)}" if isinstance(row, dict) else "no object"
        raise ValueError(f"{where} has {lacks}: expected a row of fastkd evaluate --out-samples")
    try:
        rules = protocol(row["protocol"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    iou, counts = row["iou"], [row[name] for name in _COUNTS]
    if isinstance(iou, bool) or not isinstance(iou, int | float) or not 0 <= iou <= 1:
        raise ValueError(f"{where}: iou must be a number in [0, 1], got {iou!r}")
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"{where}: {', '.join(_COUNTS)} must be integers >= 0, got {counts}")
    for name in ("no_target", "predicted_no_target") if rules.no_target else ():
        if type(row.get(name)) is not bool:
            raise ValueError(f"{where}: {name} must be true or false under protocol 'gres', got {row.get(name)!r}")


def _read_lines(path: Path) -> Iterable[tuple[Any, str]]:
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield read_json(line, where), where


def _read_parquet(path: Path) -> Iterable[tuple[Any, str]]:
    try:
        rows = import_reader("pyarrow.parquet").read_table(path).to_pylist()
    except ValueError as error:  # ArrowInvalid
        raise ValueError(f"{path} can't be read as parquet ({error}): copy it again") from error
    return ((row, f"{path}, row {number}") for number, row in enumerate(rows))


def _write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    pyarrow, parquet = import_reader("pyarrow"), import_reader("pyarrow.parquet")
    columns = {name: [_plain(row[name]) for row in rows] for name in rows[0]}
    for name, values in columns.items():
        if any(isinstance(value, str) for value in values):  # ids may be integers and strings; a column has one type
            columns[name] = [value if value is None else str(value) for value in values]
    parquet.write_table(pyarrow.table(columns), path)


def _plain(value: Any) -> Any:
    """Return an id as a JSON value; numpy's and torch's numbers as Python's."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.item() if hasattr(value, "item") else str(value)

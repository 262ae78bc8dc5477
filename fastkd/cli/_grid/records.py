"""Results of runs: one JSON line per run and split, with the IoU and the image of every sample."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Record = dict[str, Any]

KEY = ("setting", "student", "row", "scale", "seed", "split", "equal_time")
"""Fields that identify a line."""


def key_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the values of a record's `KEY`."""
    return tuple(record[name] for name in KEY)


def read_records(path: Path) -> list[Record]:
    """Return the records of a file, empty if there is none; of several with one key, the last.

    A last line without its end, left by a killed process, is ignored.

    Raises:
        ValueError: another line is not a record, or lacks the images of its sentences.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    found: dict[tuple[Any, ...], Record] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            found[key_of(record)] = record
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} is not a result ({error}): remove the line") from error
        if "images" not in record:
            raise ValueError(
                f"{path}, line {number} lacks images, the image of every sentence, which intervals need: an earlier "
                "version of fastkd wrote it. Remove such lines and run the grid again"
            )
    return list(found.values())


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Append records in one write, after removing the incomplete last line that a killed process may have left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        complete = file.read().rfind(b"\n") + 1
        if complete != size:
            file.truncate(complete)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def encode_iou(iou: npt.ArrayLike) -> str:
    """Return (N,) IoU in [0, 1] as text: 8 bits each, compressed. The rounding error is at most 0.002."""
    codes = np.rint(255 * np.asarray(iou, dtype=np.float64)).astype(np.uint8)
    return base64.b85encode(zlib.compress(codes.tobytes(), 9)).decode("ascii")


def decode_iou(text: str) -> npt.NDArray[np.float64]:
    """Return the IoU that `encode_iou` wrote: (N,) float64."""
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype=np.uint8) / 255


def encode_images(images: npt.ArrayLike) -> str:
    """Return the number of the image of every sample, (N,) integers, as text: differences of neighbours, compressed."""
    steps = np.diff(np.asarray(images, dtype=np.int64), prepend=0).astype("<i4")
    return base64.b85encode(zlib.compress(steps.tobytes(), 9)).decode("ascii")


def decode_images(text: str) -> npt.NDArray[np.int64]:
    """Return the numbers that `encode_images` wrote: (N,) int64."""
    return np.cumsum(np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype="<i4"), dtype=np.int64)


def best_scales(records: Sequence[Mapping[str, Any]], source: str) -> dict[str, float]:
    """Return each row's scale with the highest mIoU on val, averaged over seeds; the smaller one if two are equal.

    Scales are compared on the seeds that all of them have.

    Raises:
        ValueError: the records, of the file ``source``, are of several settings or students, or share no seed.
    """
    scores: dict[str, dict[float, dict[int, float]]] = {}
    chosen = [record for record in records if record["split"] == "val"]
    for name in ("setting", "student", "equal_time"):
        if len(values := sorted({str(record[name]) for record in chosen})) > 1:
            raise ValueError(
                f"scale: {source} has results on val of several values of {name} ({', '.join(values)}), whose scores "
                "cannot be compared: give each its own results file"
            )
    for record in chosen:
        scores.setdefault(record["row"], {}).setdefault(record["scale"], {})[record["seed"]] = record["miou"]
    best: dict[str, float] = {}
    for row, scales in scores.items():
        seeds = set.intersection(*map(set, scales.values()))
        if not seeds:
            raise ValueError(f"scale: {source} has no seed with results on val of all scales of {row!r}: run its grid")
        means = {scale: sum(found[seed] for seed in seeds) for scale, found in scales.items()}
        best[row] = max(sorted(means), key=means.__getitem__)
    return best

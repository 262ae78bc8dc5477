"""Curves from ``log.jsonl``, the log of `fastkd.train.train`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd.report.records import CurveSeries

_FIELDS = {"train": ("step", "seconds"), "eval": ("step", "seconds", "metrics")}


def curves_from_log(
    path: str | os.PathLike[str], *, run: str | None = None, metrics: Sequence[str] = ("mIoU",)
) -> list[CurveSeries]:
    """Return the curves of a run: training loss, task loss, each unweighted term, and validation metrics.

    Args:
        path: a run's folder or its ``log.jsonl``; the run may be unfinished.
        run: the run's name in the charts; default: the title in the log.
        metrics: validation metrics to draw.

    Returns:
        One series per quantity, over steps and over wall-clock seconds of training (evaluation excluded).

    Raises:
        FileNotFoundError: the log does not exist.
        ValueError: a line that is not from such a log, an unknown metric, or no values yet.

    Example:
        >>> curves = curves_from_log("runs/alone") + curves_from_log("runs/distilled")
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"path: no log at {path}: pass the out_dir of a training run, or its log.jsonl")
    events = _events(path)
    title = next((str(event["title"]) for event in events if event["event"] == "start" and event.get("title")), None)
    name = run or title or path.parent.name
    training = [event for event in events if event["event"] == "train"]
    evaluations = [event for event in events if event["event"] == "eval"]
    terms = dict.fromkeys(term for event in training for term in event.get("terms", {}))
    known = dict.fromkeys(metric for event in evaluations for metric in event["metrics"])
    unknown = [metric for metric in metrics if evaluations and metric not in known]
    if unknown:
        raise ValueError(f"metrics: {unknown} are not in {path}, which has {list(known)}")
    found = [_series(name, quantity, training, [e.get(quantity) for e in training]) for quantity in ("loss", "task")]
    found += [_series(name, term, training, [e.get("terms", {}).get(term) for e in training]) for term in terms]
    for metric in metrics:
        values = [event["metrics"].get(metric) for event in evaluations]
        found.append(_series(name, metric, evaluations, values, "validation"))
    drawn = [series for series in found if series is not None]
    if not drawn:
        raise ValueError(f"path: {path} holds no 'train' or 'eval' line yet: there is nothing to draw")
    return drawn


def _events(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            missing = {"event", *_FIELDS.get(event["event"], ())} - set(event)
            if missing:
                raise ValueError(f"missing {sorted(missing)}")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # an unfinished run may end in a partial line
            raise ValueError(
                f"path: line {number} of {path} is not a line of a fastkd training log ({error})"
            ) from error
        events.append(event)
    return events


def _series(
    run: str, quantity: str, events: list[dict[str, Any]], values: list[float | None], phase: str = "train"
) -> CurveSeries | None:
    if not events or all(value is None for value in values):
        return None
    return CurveSeries(
        run,
        quantity,
        steps=[event["step"] for event in events],
        values=[math.nan if value is None else value for value in values],  # the log writes NaN as null
        seconds=[event["seconds"] for event in events],
        phase=phase,  # type: ignore[arg-type]
    )

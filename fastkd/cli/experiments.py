"""``fastkd experiments``: train and score every row of a grid, for several seeds."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastkd._console import show
from fastkd._messages import shortened

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

    from fastkd.cli._grid.grid import Grid, Run
    from fastkd.cli._grid.records import Record


def experiments(
    grid: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="GRID")],
    jobs: int = 1,
    rows: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    dry_run: bool = False,
) -> None:
    """Train and score every row of a grid, from the same initial weights and in the same data order for each seed.

    Appends one JSON line per run and split to the grid's results. Called again, it runs what is missing: a run whose
    lines are complete is skipped, one that was killed starts again.

    Args:
        grid: a YAML file; docs/experiments.md describes it.
        jobs: runs side by side, each in a separate process with one thread unless the grid sets threads.
        rows: run only these rows.
        seeds: seeds in place of the grid's.
        dry_run: list the runs that are missing, without running them.
    """
    from fastkd.cli._grid.grid import check_rows, load_grid
    from fastkd.cli._grid.runs import build_cache, steps_of

    if jobs < 1:
        raise ValueError(f"--jobs must be an integer >= 1, got {jobs}")
    loaded = load_grid(grid, seeds=seeds)
    check_rows(rows, loaded.rows, "--rows")
    every = loaded.runs(rows)
    missing = _missing(loaded, every)
    show(f"{loaded.setting}: {len(every)} runs, {len(every) - len(missing)} of them complete in {loaded.results}")
    if dry_run:
        for run in missing:
            show(run.name)
        return
    if not missing:
        return
    if loaded.settings_of(missing[0].row).config.threads == 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the worker processes, before they load torch
    build_cache(loaded)
    needed = list(dict.fromkeys(run.row for run in missing))
    costs = _costs(loaded, needed)
    steps = steps_of(loaded, needed, costs)
    show("steps: " + ", ".join(f"{row} {count}" for row, count in steps.items()))
    work = [(run, steps[run.row], costs.get(run.row)) for run in missing]
    _run_all(loaded, work, jobs)


def _missing(grid: Grid, runs: Sequence[Run]) -> list[Run]:
    """Return the runs without complete results.

    Raises:
        ValueError: the results hold lines of a row with other settings.
    """
    from fastkd.cli._grid.records import key_of, read_records

    held = {key_of(record): record for record in read_records(grid.results)}
    missing = []
    for run in runs:
        found = [held.get(key) for key in run.keys(grid.splits)]
        for record in found:
            if record is not None and record["digest"] != run.digest:
                raise ValueError(
                    f"{grid.results} holds results of row {run.row!r} with other settings: rename the row or the "
                    "setting, or remove its lines"
                )
            if record is not None and record.get("reference") != run.reference:
                raise ValueError(
                    f"{grid.results} holds results of row {run.row!r} in the time of another reference than "
                    f"{grid.reference!r} has now: rename the setting, or remove its lines"
                )
        if None in found:
            missing.append(run)
    return missing


def _costs(grid: Grid, rows: Sequence[str]) -> dict[str, float]:
    """Return the relative costs of rows of a grid of equal time, measured once and then read; else none."""
    if grid.equal == "steps":
        return {}
    from fastkd.cli._grid.records import read_records
    from fastkd.cli._grid.runs import costs_of, remember

    assert grid.reference is not None
    path = grid.work / "costs.json"
    first = grid.digest_of_reference()
    keys = {row: f"{grid.digest_of(row)}/{first}" for row in grid.rows}
    held = _read_costs(path)
    for record in read_records(grid.results):
        if record.get("reference") == first and record["relative_cost"] is not None:
            held[f"{record['digest']}/{first}"] = record["relative_cost"]
    costs = costs_of(grid, rows, {row: held[key] for row, key in keys.items() if key in held})
    remember(path, held | {keys[row]: cost for row, cost in costs.items()})
    return costs


def _read_costs(path: Path) -> dict[str, float]:
    import json

    return json.loads(path.read_text("utf-8")) if path.is_file() else {}  # type: ignore[no-any-return]


def _run_all(grid: Grid, work: Sequence[tuple[Run, int, float | None]], jobs: int) -> None:
    """Run all, append the results of each as it ends, and raise an error at the end if some failed."""
    from fastkd.cli._grid.records import append_records
    from fastkd.cli._grid.runs import execute

    failed: list[str] = []
    start = time.monotonic()
    calls = [(grid, *each) for each in work]
    for number, ((_, run, *_), outcome) in enumerate(outcomes(execute, calls, jobs), 1):
        try:
            records = outcome()
        except Exception as error:
            failed.append(run.name)
            show(f"[{number}/{len(work)}] {run.name} failed: {type(error).__name__}: {error}")
            continue
        append_records(grid.results, records)
        left = (time.monotonic() - start) / number * (len(work) - number)
        scores = "  ".join(f"{record['split']} {record['miou']:.2f}" for record in records)
        first = records[0]
        show(
            f"[{number}/{len(work)}] {run.name}: {scores} mIoU, {first['steps']} steps in {first['seconds']:.0f} s, "
            f"about {left / 60:.0f} min left"
        )
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(work)} runs failed: {shortened(failed)}; call the command again")


def outcomes(
    execute: Callable[..., list[Record]], calls: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[tuple[tuple[Any, ...], Callable[[], list[Record]]]]:
    """Yield the arguments of each call with a function that returns its records or raises its error, as they end.

    With several jobs, calls run in processes that end with this one.
    """
    from functools import partial

    if jobs == 1 or not calls:
        for each in calls:
            yield each, partial(execute, *each)
        return
    from concurrent.futures import as_completed

    pool = _pool(min(jobs, len(calls)))
    try:
        futures = {pool.submit(execute, *each): each for each in calls}
        for future in as_completed(futures):
            yield futures[future], future.result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(jobs: int) -> ProcessPoolExecutor:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this worker process when its parent ends, even if that was killed in the middle of a run."""
    from multiprocessing import parent_process

    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

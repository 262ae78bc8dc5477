"""The work of a grid: its teacher cache, the steps of each row, and one run."""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd._atomic import replace_files
from fastkd.cli._grid.grid import OF_CACHE, Grid, Run
from fastkd.cli._grid.records import Record, encode_images, encode_iou
from fastkd.cli._settings import DistillSettings, RunSettings, without_schedules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastkd import Term
    from fastkd.cli._runs import OpenedRun


def build_cache(grid: Grid) -> None:
    """Run the teacher once for everything that the rows' terms read, unless that was done."""
    if grid.cache is None:
        return
    from fastkd import Distiller
    from fastkd.cli._models import build_model
    from fastkd.cli._teacher import describe, open_teacher
    from fastkd.cli._terms import attention_taps
    from fastkd.train import TeacherCache, segmentation_loss

    terms = _terms(grid)
    if not terms:
        return
    rows = (grid.settings_of(row) for row in grid.every_row)
    distilled = [settings for settings in rows if isinstance(settings, DistillSettings)]
    first = distilled[0]
    taps = {name: target for settings in distilled for name, target in settings.student_taps.items()}
    data, config = first.data, first.config
    weights = {"backbone_weights": first.backbone_weights, "text_weights": first.text_weights}
    model = build_model(first.student, 0, data.tokenizer, **weights)
    assert first.teacher is not None
    teacher, options = open_teacher(model, data.tokenizer, first.teacher, first.teacher_tokenizer)
    TeacherCache.build(
        cache_folder(grid),
        Distiller(
            model,
            teacher,
            segmentation_loss,
            terms,
            student_taps=attention_taps(taps),
            teacher_taps=attention_taps(first.teacher_taps),
        ),
        data.open_every_sentence(model, teacher=options),
        batch_size=config.batch_size,
        dtype=grid.cache,
        device=config.device,
        precision=config.precision,
        channels_last=config.channels_last,
        threads=config.threads,
        notes=describe(first.teacher, teacher, options),
        allow_untrained_teacher=config.allow_untrained_teacher,
    )


def _terms(grid: Grid) -> list[Term]:
    """Return the different terms of all rows, for what they read of the teacher."""
    from fastkd.cli._terms import build_terms

    found: dict[str, Term] = {}
    for row in grid.every_row:
        settings = grid.settings_of(row)
        if isinstance(settings, DistillSettings):
            for term in build_terms(settings.terms, settings.config.steps):
                content = str([term.loss, term.student, term.teacher, term.kwargs])
                found.setdefault(content, replace(term, name=f"{row}/{term.name}".replace(".", "_"), schedule=None))
    return list(found.values())


def cache_folder(grid: Grid) -> Path:
    """Return the folder of a grid's teacher cache; grids that read the same from the same teacher share it."""
    read = sorted({str([term.student, term.teacher, term.kwargs.get("word_mask")]) for term in _terms(grid)})
    shared = {name: grid.settings.get(name) for name in (*OF_CACHE, "batch_size", "precision", "channels_last")}
    text = json.dumps([read, shared, grid.cache], default=str)
    return grid.work / "cache" / hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def cached(grid: Grid, settings: RunSettings) -> RunSettings:
    """Return the settings of a run with the grid's teacher cache in place of the teacher, if it has one."""
    if grid.cache is None or not isinstance(settings, DistillSettings):
        return settings
    return replace(settings, teacher_cache=cache_folder(grid))


def open_settings(settings: RunSettings) -> OpenedRun:
    """Return the distiller and the data of a run, with its terms balanced."""
    from fastkd.cli._runs import open_run
    from fastkd.train.balance import balance_on

    name = settings.student if isinstance(settings, DistillSettings) else settings.model  # type: ignore[attr-defined]
    opened = open_run(settings, name)
    if opened.shares:
        balance_on(opened.distiller, opened.balance_set, opened.shares, settings.config)
    return opened


def costs_of(grid: Grid, rows: Iterable[str], known: Mapping[str, float]) -> dict[str, float]:
    """Return the cost of a step by row relative to the reference's, averaged over the phases of its schedules.

    A schedule in steps gives phases of another share in a run of other length, so the average is that of the run which
    takes the reference's time.

    Args:
        grid: the grid.
        rows: the rows to run.
        known: costs that were measured before, by row; the others are measured now, in turns with the reference.
    """
    from fastkd.cli._grid.costs import Candidate, phases, relative_costs

    assert grid.reference is not None
    costs = {**{row: known[row] for row in rows if row in known}, grid.reference: 1.0}
    unknown = [row for row in rows if row not in costs]
    if not unknown:
        return costs
    candidates: list[Candidate] = []
    numbers: dict[tuple[str, tuple[str, ...]], int] = {}
    steps = grid.settings_of(grid.reference).config.steps

    def key_of_phase(row: str, active: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        return (row if active else "", active)  # all rows cost the same without terms

    for row in (grid.reference, *unknown):
        lengths = (steps,) if row == grid.reference else (steps, max(1, steps // 4), 4 * steps)
        for _, active in (phase for length in lengths for phase in phases(grid.settings_of(row, steps=length))):
            if (key := key_of_phase(row, active)) not in numbers:
                numbers[key] = len(candidates)
                settings = cached(grid, _always(grid, row, active))
                opened = open_settings(settings)
                candidates.append(Candidate(opened.distiller, opened.train_set, settings.config))
    measured = relative_costs(candidates)

    def total(row: str, length: int) -> float:
        """Return the cost of a run of this many steps."""
        found = phases(grid.settings_of(row, steps=length))
        return length * sum(share * measured[numbers[key_of_phase(row, active)]] for share, active in found)

    available = total(grid.reference, steps)
    for row in unknown:
        within = bisect.bisect_right(range(1, 4 * steps), available, key=functools.partial(total, row))
        length = max(1, within)  # of the longest run in this time
        costs[row] = steps * total(row, length) / (length * available)
    return costs


def _always(grid: Grid, row: str, active: tuple[str, ...]) -> RunSettings:
    """Return a row's settings with the active terms only, at constant weight."""
    settings = grid.settings_of(row)
    if not isinstance(settings, DistillSettings):
        return settings
    if not active:
        return replace(grid, rows={**grid.rows, row: {**grid.rows[row], "terms": {}}}).settings_of(row)
    return replace(settings, terms=without_schedules({name: settings.terms[name] for name in active}))


def steps_of(grid: Grid, rows: Iterable[str], costs: Mapping[str, float]) -> dict[str, int]:
    """Return the steps of rows: the settings', or those that take as long as the reference's."""
    if grid.equal == "steps":
        return {row: grid.settings_of(row).config.steps for row in rows}
    assert grid.reference is not None
    steps = grid.settings_of(grid.reference).config.steps
    return {row: max(1, round(steps / costs[row])) for row in rows}


def remember(path: Path, costs: Mapping[str, float]) -> None:
    """Write the costs by digests of row and reference, so that a resumed grid gives the same steps."""
    with replace_files(path) as (partial,):
        partial.write_text(json.dumps(dict(costs), indent=1) + "\n", encoding="utf-8")


def execute(grid: Grid, run: Run, steps: int, cost: float | None) -> list[Record]:
    """Train and score one run; return its results, one per split."""
    import torch

    from fastkd._info import cpu_name
    from fastkd._runtime import pick_device
    from fastkd.evaluate import evaluate
    from fastkd.evaluate.comparison import units_of
    from fastkd.train import train

    folder = grid.work / "runs" / run.folder
    settings = cached(grid, grid.settings_of(run.row, seed=run.seed, scale=run.scale, out=folder, steps=steps))
    config = settings.config
    with _threads(config.threads):
        opened = open_settings(settings)
        student: Any = opened.distiller.student
        result = train(
            opened.distiller,
            opened.train_set,
            config,
            out_dir=folder,
            overwrite=True,
            title=run.name,
            progress=False,
        )
        on_cpu = pick_device(config.device).type == "cpu"
        shared = {
            **vars(run),
            "labels": settings.labels,
            "steps": result.steps,
            "seconds": round(result.cpu_seconds if on_cpu else result.seconds, 2),
            "wall_seconds": round(result.seconds, 2),
            "relative_cost": cost,
            "weights": {name: float(f"{weight:.5g}") for name, weight in opened.distiller.weights.items()},
        }
        conditions = {
            "parameters": sum(p.numel() for p in student.parameters()),
            "processor": cpu_name() if on_cpu else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": commit(),
        }
        records = []
        for split in grid.splits:
            samples = settings.data.open(split, student, sentences="all")
            score = evaluate(student, samples, batch_size=config.eval_batch_size, channels_last=config.channels_last)
            scores = {"miou": score.miou, "oiou": score.oiou}
            scores |= {f"p{name[-1]}0": value for name, value in score.metrics.items() if name.startswith("P@")}
            scores = {name: round(value, 4) for name, value in scores.items()}
            sentences = {"sentences": score.sentences}
            samples_of = {"iou": encode_iou(score.sample_iou), "images": encode_images(units_of(score.samples)[1])}
            records.append({**shared, "split": split, **scores, **sentences, **conditions, **samples_of})
    return records


def commit() -> str | None:
    """Return the commit of the checkout that this package is in, with "+" if files differ; None outside of one."""
    import subprocess

    root = Path(__file__).resolve().parents[3]

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD") if (root / ".git").exists() else None
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Use this number of torch's CPU threads in the block, for evaluation too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

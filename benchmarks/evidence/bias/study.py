"""Make the sets, the teachers and the results of the students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.evidence.bias.measure import ALONE, TEACHER
from benchmarks.evidence.bias.scenes import BIASED, CLEAN, COUNTERPARTS, IMAGE_SIZE, SPLIT_OF_ROLE
from fastkd._console import show
from fastkd.cli._grid.grid import Grid, Run, load_grid
from fastkd.cli._grid.records import Record, append_records, encode_images, encode_iou, key_of, read_records

IMAGES = 3000
TEACHERS = {"biased": "teacher-biased", "control": "teacher-clean"}
TEACHER_STEPS = 300
_WITH_COUNTERPARTS = (SPLIT_OF_ROLE["colours"], SPLIT_OF_ROLE["left"])
_SETS = {
    "clean": (CLEAN, 0),
    "counterparts": (COUNTERPARTS, 0),
    "teacher-clean": (CLEAN, 1),
    "teacher-biased": (BIASED, 1),
}


def make_sets(folder: Path, images: int = IMAGES) -> None:
    """Write the sets that ``folder`` lacks: for students, their counterparts, and with other scenes for teachers."""
    from fastkd.data.shapes.write import write_set

    for name, (procedure, seed) in _SETS.items():
        if not (folder / name).exists():
            show(f"writing {folder / name}")
            write_set(procedure, folder / name, images, IMAGE_SIZE, seed, False, None)


def make_teachers(folder: Path, sets: Path, steps: int = TEACHER_STEPS) -> None:
    """Train the teachers that ``folder`` lacks: ShapesRef's, further on biased and on true masks, equally long."""
    from fastkd.cli._data import DataArgs
    from fastkd.cli._models import load_model
    from fastkd.cli._runs import open_run
    from fastkd.cli._settings import TrainSettings
    from fastkd.train import TrainConfig, train

    start = folder / "start"
    if not start.exists():
        model: Any = load_model("shapesref")
        model.config.image_size = IMAGE_SIZE
        model.save_pretrained(start)
    for name, data in TEACHERS.items():
        out = folder / name
        if (out / "last").exists():
            continue
        config = TrainConfig(
            steps=steps, lr=1e-3, warmup=min(40, steps), channels_last=True, threads=1, device="cpu", keep_checkpoints=0
        )
        settings = TrainSettings(data=DataArgs(data=sets / data), model=str(start), out=out, config=config)
        opened = open_run(settings, settings.model)
        opened.distiller.student.requires_grad_(True)
        show(f"training {out}")
        train(opened.distiller, opened.train_set, config, out_dir=out, overwrite=True, progress=False)


def score_teacher(grid: Grid) -> list[Record]:
    """Return the results of a grid's teacher, as records of the row "teacher"."""
    from fastkd._info import cpu_name
    from fastkd.cli._grid.runs import commit
    from fastkd.cli._models import load_model
    from fastkd.evaluate import evaluate
    from fastkd.evaluate.comparison import units_of

    first = grid.settings_of(next(iter(grid.rows)))
    model = load_model(grid.settings["teacher"])
    run = teacher_run(grid)
    records = []
    for split in grid.splits:
        score = evaluate(model, first.data.open(split, model, sentences="all"), channels_last=True)
        records.append(
            {
                **vars(run),
                "split": split,
                "miou": round(score.miou, 4),
                "sentences": score.sentences,
                "parameters": sum(p.numel() for p in model.parameters()),
                "processor": cpu_name(),
                "commit": commit(),
                "iou": encode_iou(score.sample_iou),
                "images": encode_images(units_of(score.samples)[1]),
            }
        )
    return with_counterparts(grid, records, model)


def with_counterparts(grid: Grid, records: Sequence[Record], model: Any) -> list[Record]:
    """Return the records with ``other``, the IoU of every sentence with its counterpart, where it has one."""
    from fastkd.evaluate import evaluate

    data = grid.settings_of(next(iter(grid.rows))).data
    data = replace(data, data=data.data.parent / "counterparts")
    found = []
    for record in records:
        if record["split"] in _WITH_COUNTERPARTS:
            samples = data.open(record["split"], model, sentences="all")
            other = evaluate(model, samples, channels_last=True).sample_iou
            record = {**record, "other": encode_iou(other)}
        found.append(record)
    return found


def teacher_run(grid: Grid) -> Run:
    """Return the run that stands for a grid's teacher."""
    first = grid.runs()[0]
    return Run(grid.setting, first.student, TEACHER, 1.0, 0, False, TEACHER)


def load_grids() -> list[Grid]:
    """Return the grids of the biased and of the control teacher."""
    folder = Path(__file__).resolve().parent
    return [load_grid(folder / name) for name in ("grid.yaml", "control.yaml")]


def missing(grids: Sequence[Grid]) -> list[tuple[Grid, Run]]:
    """Return the runs without complete results, seed by seed and row by row, so that rows are comparable early.

    Raises:
        ValueError: the results hold lines of a row with other settings.
    """
    rows = [TEACHER, ALONE, *dict.fromkeys(row for grid in grids for row in grid.rows)]
    found = [(grid, run) for grid in grids for run in (teacher_run(grid), *grid.runs()) if not _complete(grid, run)]
    return sorted(found, key=lambda one: (one[1].seed, rows.index(one[1].row), -one[1].scale))


def _complete(grid: Grid, run: Run) -> bool:
    held = {key_of(record): record for record in read_records(grid.results)}
    records = [held.get(key) for key in run.keys(grid.splits)]
    if any(record is not None and record["digest"] != run.digest for record in records):
        raise ValueError(f"{grid.results} holds results of {run.row!r} with other settings: remove its lines")
    return None not in records


def run_missing(grids: Sequence[Grid], rows: Sequence[str] = (), limit: int | None = None, jobs: int = 1) -> None:
    """Run what the results lack of some rows, or of all, at most ``limit`` runs, each appended as it ends."""
    from fastkd.cli._grid.runs import build_cache
    from fastkd.cli.experiments import outcomes

    chosen = {TEACHER, ALONE, *rows} if rows else {TEACHER, *grids[0].rows}
    todo = [(grid, run) for grid, run in missing(grids) if run.row in chosen]
    show(f"{len(todo)} runs are missing in {grids[0].results}")
    todo = todo[:limit]
    for grid in grids:
        own = {run.row for one, run in todo if one is grid}
        if TEACHER in own:
            append_records(grid.results, score_teacher(grid))
        if own - {TEACHER, ALONE}:
            build_cache(grid)
    students = [(grid, run) for grid, run in todo if run.row != TEACHER]
    for (grid, _), outcome in outcomes(_train_and_score, students, jobs):
        append_records(grid.results, outcome())


def _train_and_score(grid: Grid, run: Run) -> list[Record]:
    from fastkd.cli._grid.runs import execute
    from fastkd.cli._models import load_model

    records = execute(grid, run, grid.settings_of(run.row).config.steps, None)
    show(f"{grid.setting}, {run.name}: " + "  ".join(f"{r['split']} {r['miou']:.2f}" for r in records))
    return with_counterparts(grid, records, load_model(str(grid.work / "runs" / run.folder / "last")))

"""``fastkd report``: an HTML page that compares runs and their teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastkd._console import show
from fastkd.data._files import absolute

if TYPE_CHECKING:
    from fastkd.cli._data import DataArgs
    from fastkd.cli._report import Scored
    from fastkd.cli._settings import DistillSettings, RunSettings

TEACHER = "teacher"


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")],
    out: Path | None = None,
    split: str = "val",
    protocol: str = "lavt",
    teacher: bool = True,
    examples: int = 3,
    batch_size: int = 32,
    device: str = "auto",
    no_target_pixels: int = 50,
) -> None:
    """Compare runs of ``fastkd train``, ``distill`` and ``demo``, and their teacher; write a page without scripts.

    The page holds scores with 95 % intervals of a bootstrap over images, parameters and latency, histograms of IoU,
    P@X, the curves of every term, the best, median and worst samples, and what the losses compare: the attention to
    each word and the relations of channels. Gains are those over the first run without a teacher. Each run's best
    checkpoint is scored.

    Args:
        runs: folders of runs on the same dataset.
        out: HTML file; if omitted, report.html in the last run's folder.
        split: split to score.
        protocol: evaluation protocol, as in ``fastkd evaluate``; each run's best checkpoint is the best under "lavt".
        teacher: also score the teacher of the first distilled run; --no-teacher omits it.
        examples: number of best, of median and of worst samples, by the IoU of the last run.
        batch_size: samples per forward.
        device: "auto", "cpu", "cuda", ...
        no_target_pixels: under "gres", as in ``fastkd evaluate``.
    """
    from fastkd.cli._arguments import check_file
    from fastkd.cli._report import measure_latency, report_sections
    from fastkd.cli._settings import DistillSettings
    from fastkd.report import ResultRow, curves_from_log, write_report

    if not runs:
        raise ValueError("no run: pass the folder of a run of fastkd train or distill, or of one of a demo's runs")
    if examples < 1:
        raise ValueError(f"--examples must be at least 1, got {examples}")
    folders = _names(runs)
    settings = {name: _settings(folder) for name, folder in folders.items()}
    _check_same_data({name: one.data for name, one in settings.items()})
    page = out if out is not None else runs[-1] / "report.html"
    check_file("--out", page)

    alone = [name for name, one in settings.items() if not isinstance(one, DistillSettings)]
    distilled = [one for one in settings.values() if isinstance(one, DistillSettings)]
    scored: list[Scored] = []
    options = {"protocol": protocol, "batch_size": batch_size, "device": device, "no_target_pixels": no_target_pixels}
    if teacher and distilled and (named := _teacher_of(distilled[0])) is not None:
        scored.append(_score(TEACHER, named, distilled[0], distilled[0].teacher_tokenizer, split, options))
    for name, one in settings.items():
        scored.append(_score(name, str(folders[name] / "best"), one, None, split, options))
        if alone and name != alone[0]:
            scored[-1].baseline = alone[0]

    curves = {name: curves_from_log(folder, run=name) for name, folder in folders.items()}
    rows = []
    for each in scored:
        steps = max((series.steps[-1] for series in curves.get(each.name, ()) if series.phase == "train"), default=None)
        rows.append(
            ResultRow(
                each.name,
                sum(parameter.numel() for parameter in each.model.parameters()),
                each.results[0].metrics,
                steps=None if steps is None else int(steps),
                train_seconds=_seconds(curves.get(each.name, [])),
                baseline=each.baseline,
                latency=measure_latency(each.model, each.dataset),
            )
        )
    note = f"Protocol {scored[0].results[0].stated}. Best checkpoint of every run on val."
    write_report(
        page,
        title=f"fastkd: {', '.join(folders)}",
        rows=rows,
        curves=[series for run in curves.values() for series in run],
        notes=[note],
        **report_sections(scored, list(folders)[-1], examples),
    )
    show(f"report: {page}")


def _names(runs: tuple[Path, ...]) -> dict[str, Path]:
    """Return the runs by the names of their folders, with those of parent folders where they are needed."""
    folders = [absolute(run) for run in runs]
    if len(set(folders)) != len(folders):
        raise ValueError("a run occurs twice: name each folder once")
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names) and TEACHER not in names:
            break
    return dict(zip(names, folders, strict=True))


def _settings(folder: Path) -> RunSettings:
    """Return the settings in the config.yaml of a run."""
    from fastkd.cli._settings import DistillSettings, TrainSettings
    from fastkd.cli._yaml import read_mapping, settings_from

    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run of fastkd train, distill or demo: it has no config.yaml")
    if not (folder / "best").is_dir():
        raise FileNotFoundError(f"{folder} has no best/: the run has not been evaluated yet")
    values = read_mapping(path, str(path))
    kind: Any = DistillSettings if "student" in values else TrainSettings
    return settings_from(kind, values, str(path))  # type: ignore[no-any-return]


def _check_same_data(data: dict[str, DataArgs]) -> None:
    from fastkd.data.opening import author_of

    (first, reference), *others = data.items()
    for name, other in others:
        for setting in ("data", "dataset", "split_by", "mask_rule", "sentence_field"):
            ours, theirs = (getattr(one, setting) for one in (reference, other))
            if setting == "split_by":  # null is the first author of the set, so it may equal a name
                ours, theirs = author_of(reference.dataset, ours), author_of(other.dataset, theirs)
            elif isinstance(ours, Path):
                ours, theirs = absolute(ours), absolute(theirs)
            if ours != theirs:
                raise ValueError(f"{setting} is {ours} in {first} but {theirs} in {name}: compare runs on one dataset")


def _teacher_of(settings: DistillSettings) -> str | None:
    """Return the name of a run's teacher, that of its cache if the run names none; say so if it is unknown."""
    if settings.teacher is not None or settings.teacher_cache is None:
        return settings.teacher
    from fastkd.cli._shipped import teacher_path
    from fastkd.train import TeacherCache

    try:
        held = TeacherCache(settings.teacher_cache).notes.get("teacher") or {}
    except (OSError, ValueError) as error:
        held = {"fault": str(error)}
    named = held.get("name")
    if named is None or (held.get("files") is not None and not teacher_path(named).exists()):
        reason = held.get("fault") or (f"{named} does not exist here" if named else "its cache does not name it")
        show(f"no teacher in the report: {reason}")
        return None
    return str(named)


def _score(
    name: str, model: str, settings: RunSettings, words: str | None, split: str, options: dict[str, Any]
) -> Scored:
    from dataclasses import replace

    from fastkd.cli._models import load_model
    from fastkd.cli._report import Scored
    from fastkd.evaluate import evaluate
    from fastkd.models import TextPromptedTeacher

    loaded = load_model(model)
    if words is None and not isinstance(loaded, TextPromptedTeacher):  # which has its own tokenizer
        words = settings.data.tokenizer
    dataset = replace(settings.data, tokenizer=words).open(split, loaded, sentences="all")
    result = evaluate(loaded, dataset, **options)
    show(f"{name}: {result}")
    return Scored(name, loaded, dataset, [result])


def _seconds(curves: list[Any]) -> float | None:
    found = [series.seconds[-1] for series in curves if series.phase == "train" and series.seconds]
    return max(found, default=None)

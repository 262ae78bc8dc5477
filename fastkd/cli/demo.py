"""``fastkd demo``: compare a small student distilled from the shipped teacher with the same student trained alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd._atomic import replace_files
from fastkd._console import show
from fastkd.cli._arguments import Config
from fastkd.cli._settings import Terms, TermSettings, show_terms
from fastkd.train.config import TrainConfig

if TYPE_CHECKING:
    from fastkd.cli._report import Scored
    from fastkd.cli._settings import RunSettings
    from fastkd.data import ReferDataset
    from fastkd.evaluate import EvalResult
    from fastkd.models import RISModel
    from fastkd.report import ResultRow
    from fastkd.train import TrainResult

ALONE, DISTILLED, LONGER = "alone", "distilled", "alone, equal time"
TERMS = {"first_order": TermSettings(share=2.0, stop=0.5), "channel_distribution": TermSettings(share=16.0)}
"""The method of docs/evidence.md."""
TRAINING = TrainConfig(steps=1000, batch_size=16, lr=1e-3, warmup=50, channels_last=True, log_every=10)


@dataclass
class Run:
    """One trained student, its training and its scores on the test split."""

    training: TrainResult
    test: EvalResult
    model: RISModel


def demo(
    out: Path = Path("runs/demo"),
    images: int = 2500,
    seeds: tuple[int, ...] = (0,),
    terms: Terms = TERMS,
    config: Config = TRAINING,
    test_split: str = "testA",
    overwrite: bool = True,
) -> None:
    """Distil a small student from the shipped teacher and compare it with training alone.

    Makes a procedural referring-expression set, then trains the student alone, distilled, and alone for as long as
    distillation took, from the same initial weights and in the same data order. Prints the scores side by side and
    writes report.html.

    Args:
        out: folder for data, runs (with their config.yaml), results.json and report.html.
        images: number of scenes in the set.
        seeds: one comparison per seed, which determines initial weights and data order.
        terms: terms as name=share, as in ``fastkd distill``.
        config: settings of every run; --seeds replaces its seed.
        test_split: split that the table scores; curves use val.
        overwrite: replace an earlier demo in --out.
    """
    from fastkd.cli._data import open_split
    from fastkd.cli._models import shapes_teacher
    from fastkd.cli._terms import shares_of
    from fastkd.evaluate import evaluate
    from fastkd.models import RISModel
    from fastkd.report import console_table
    from fastkd.train.resume import check_run_folder
    from fastkd.train.trackers import check_trackers

    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds must be one or more different integers, got {' '.join(map(str, seeds)) or 'none'}")
    shares_of(terms)  # raises if a term has neither share nor weight
    check_trackers(config.tracker, out)
    for folder in [_run_folder(out, seed, name) for seed in seeds for name in (ALONE, DISTILLED, LONGER)]:
        check_run_folder(folder, overwrite=overwrite, resume=False)
    teacher = RISModel.from_pretrained(shapes_teacher()).eval().requires_grad_(False)
    root = _make_data(out, images, teacher.config.image_size, overwrite)
    test = open_split(root, test_split, teacher, sentences="all")
    teacher_score = evaluate(teacher, test, channels_last=config.channels_last)
    show(f"teacher on {test_split}: {teacher_score}")

    runs: dict[str, list[Run]] = {ALONE: [], DISTILLED: [], LONGER: []}
    for seed in seeds:
        for name, run in _compare(root, test, teacher, terms, config, seed, out, overwrite).items():
            runs[name].append(run)

    scored = _scored(teacher, teacher_score, runs, test)
    rows = _result_rows(scored, runs)
    page = _write_results(out, rows, runs, seeds, scored, terms, test_split)
    console_table(rows, title=f"Procedural referring segmentation, {test_split}: {len(test)} sentences (%)")
    show(f"report: {page}")


def _run_folder(out: Path, seed: int, name: str) -> Path:
    return out / f"seed{seed}" / name.replace(", ", "-").replace(" ", "-")


def _make_data(out: Path, images: int, size: int, overwrite: bool) -> Path:
    from fastkd.data import shapes

    root = out / "data"
    settings = root / "shapes.json"
    requested = {"images": images, "image_size": size, "seed": 0}
    if settings.is_file() and requested.items() <= json.loads(settings.read_text(encoding="utf-8")).items():
        show(f"data: {root}, reused")
        return root
    counts = shapes.make_shapes(root, images=images, image_size=size, seed=0, overwrite=overwrite)
    show(f"data: {counts['images']} images, {counts['refs']} refs, {counts['sentences']} sentences in {root}")
    return root


def _compare(
    root: Path,
    test: ReferDataset,
    teacher: RISModel,
    terms: Mapping[str, TermSettings],
    config: TrainConfig,
    seed: int,
    out: Path,
    overwrite: bool,
) -> dict[str, Run]:
    """Train the student alone, distilled, and alone for equal time, from the same initial weights and data order.

    Equal time is expressed in steps, from their measured cost (`relative_costs`), so that the learning-rate schedule
    completes.
    """
    from dataclasses import replace

    from fastkd import Distiller
    from fastkd.cli._data import DataArgs, open_split
    from fastkd.cli._grid.costs import Candidate, phases, relative_costs
    from fastkd.cli._models import build_model
    from fastkd.cli._settings import DistillSettings, TrainSettings, without_schedules
    from fastkd.cli._terms import build_terms, shares_of
    from fastkd.cli.train import recorded
    from fastkd.evaluate import evaluate
    from fastkd.train import segmentation_loss, train
    from fastkd.train.balance import balance_on

    eval_every = config.eval_every or max(1, config.steps // 5)
    config = replace(config, seed=seed, eval_every=eval_every)
    train_set = open_split(root, "train", teacher, sentences="random", seed=seed)
    val_set = open_split(root, "val", teacher, sentences="all")
    train_set.fill_cache()

    def build(terms: Mapping[str, TermSettings]) -> tuple[RISModel, Any]:
        student = build_model("shapes-student", seed)
        if not terms:
            return student, student
        distiller = Distiller(student, teacher, segmentation_loss, build_terms(terms, config.steps))
        balance_on(distiller, train_set, shares_of(terms), config)
        return student, distiller

    def settings_of(name: str, config: TrainConfig, distil: bool) -> RunSettings:
        options: dict[str, Any] = {"data": DataArgs(root), "out": _run_folder(out, seed, name), "config": config}
        return DistillSettings(teacher="shapes", terms=dict(terms), **options) if distil else TrainSettings(**options)

    def run(name: str, config: TrainConfig, distil: bool) -> Run:
        student, trained = build(terms if distil else {})
        title = f"{name}, seed {seed}"
        settings = settings_of(name, config, distil)
        result = train(
            trained,
            train_set,
            config,
            val_dataset=val_set,
            out_dir=settings.out,
            title=title,
            overwrite=overwrite,
            **recorded(settings, shares_of(terms) if distil else {}),
        )
        score = evaluate(student, test, channels_last=config.channels_last)
        show(f"{title}: {score}")
        return Run(result, score, student)

    parts = phases(settings_of(DISTILLED, config, True))
    constant = without_schedules(terms)
    computed = [{}, *({name: constant[name] for name in active} for _, active in parts)]
    _, *costs = relative_costs([Candidate(build(active)[1], train_set, config) for active in computed])
    cost = sum(share * each for (share, _), each in zip(parts, costs, strict=True))
    show(f"seed {seed}: a distillation step takes the time of {cost:.2f} steps of the student alone on average")
    alone = run(ALONE, config, False)
    distilled = run(DISTILLED, config, True)
    steps, interval = (max(1, round(number * cost)) for number in (config.steps, eval_every))
    limit = config.max_seconds and config.max_seconds * cost
    longer = run(LONGER, replace(config, steps=steps, eval_every=interval, max_seconds=limit), False)
    return {ALONE: alone, DISTILLED: distilled, LONGER: longer}


def _result_rows(scored: Sequence[Scored], runs: Mapping[str, Sequence[Run]]) -> list[ResultRow]:
    from fastkd.cli._report import measure_latency
    from fastkd.report import ResultRow

    teacher = scored[0]
    latency = {one.name: measure_latency(one.model, one.dataset) for one in scored}
    rows = [
        ResultRow(
            "teacher",
            _parameters(teacher.model),
            teacher.results[0].metrics,
            note="shipped with fastkd",
            latency=latency["teacher"],
        )
    ]
    for name, seed_runs in runs.items():
        metrics = {key: [run.test.metrics[key] for run in seed_runs] for key in seed_runs[0].test.metrics}
        rows.append(
            ResultRow(
                name,
                _parameters(seed_runs[0].model),
                {key: values if len(values) > 1 else values[0] for key, values in metrics.items()},
                steps=round(sum(run.training.steps for run in seed_runs) / len(seed_runs)),
                train_seconds=sum(run.training.seconds for run in seed_runs) / len(seed_runs),
                baseline=None if name == ALONE else ALONE,
                latency=latency[name],
            )
        )
    return rows


def _parameters(model: RISModel) -> int:
    return sum(p.numel() for p in model.parameters())


def _scored(
    teacher: RISModel, teacher_score: EvalResult, runs: Mapping[str, Sequence[Run]], test: ReferDataset
) -> list[Scored]:
    from fastkd.cli._report import Scored

    scored = [Scored("teacher", teacher, test, [teacher_score])]
    for name, seed_runs in runs.items():
        results = [run.test for run in seed_runs]
        scored.append(Scored(name, seed_runs[0].model.eval(), test, results, None if name == ALONE else ALONE))
    return scored


def _write_results(
    out: Path,
    rows: Sequence[ResultRow],
    runs: Mapping[str, Sequence[Run]],
    seeds: Sequence[int],
    scored: Sequence[Scored],
    terms: Mapping[str, TermSettings],
    test_split: str,
) -> Path:
    from fastkd.cli._report import report_sections
    from fastkd.report import curves_from_log, write_report

    teacher_score = scored[0].results[0]
    curves = [
        series
        for name, seed_runs in runs.items()
        if seed_runs[0].training.out_dir
        for series in curves_from_log(seed_runs[0].training.out_dir, run=name)
    ]
    results = {
        "teacher": teacher_score.to_dict(),
        "terms": show_terms(terms),
        "runs": [
            {
                "name": name,
                "seed": seed,
                "steps": run.training.steps,
                "seconds": run.training.seconds,
                "test": run.test.to_dict(),
                "val": [{"step": step, "metrics": result.metrics} for step, result in run.training.evaluations],
            }
            for name, seed_runs in runs.items()
            for seed, run in zip(seeds, seed_runs, strict=True)
        ],
        "rows": [asdict(row) for row in rows],
    }
    with replace_files(out / "results.json") as (partial,):
        partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    notes = [
        "A student trained alone, the same student distilled with "
        f"{' and '.join(show_terms(terms))} (shares of the task's gradient norm), and the student alone for as long as "
        "distillation took. For each seed, all three start from the same weights and see the data in the same order.",
        f"Table and pictures: split {test_split}, {teacher_score.sentences} sentences, last checkpoint of every run, "
        f"protocol {teacher_score.protocol} at {teacher_score.size.replace('x', '×')}, seeds "
        f"{', '.join(map(str, seeds))}. Curves: split val, seed {seeds[0]}.",
    ]
    return write_report(
        out / "report.html",
        title="fastkd demo: referring segmentation of procedural scenes",
        rows=rows,
        curves=curves,
        notes=notes,
        **report_sections(scored, DISTILLED),
    )

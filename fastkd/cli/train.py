"""``fastkd train`` and ``fastkd distill``."""

from __future__ import annotations

from dataclasses import field, dataclass
from pathlib import Path

from fastkd.train.config import TrainConfig


@dataclass
class DataArgs:
    """Where the data are.

    Args:
        root: folder that holds ``refcoco/`` and ``images/``.
        name: dataset folder: refcoco, refcoco+ or refcocog.
        split_by: who split it: unc, google or umd.
    """

    root: Path
    name: str = "refcoco"
    split_by: str = "unc"


def train(
    data: DataArgs,
    out: Path,
    model: str = "shapes-student",
    config: TrainConfig = field(default_factory=TrainConfig),
    overwrite: bool = False,
) -> None:
    """Train a model on its task alone.

    Args:
        data: the data set.
        out: folder for log and checkpoints.
        model: a preset's name, a config.json, or a folder written by save_pretrained.
        config: the settings.
        overwrite: replace an earlier run in --out.
    """
    _run(data, out, model, config, overwrite)


def distill(
    data: DataArgs,
    out: Path,
    teacher: str = "shapes",
    student: str = "shapes-student",
    terms: dict[str, float] = field(default_factory=lambda: {"first_order": 0.5}),
    config: TrainConfig = field(default_factory=TrainConfig),
    overwrite: bool = False,
) -> None:
    """Train a student with a teacher.

    Args:
        data: the data set.
        out: folder for log and checkpoints.
        teacher: a folder written by save_pretrained, or "shapes" for the shipped teacher of the procedural set.
        student: a preset's name, a config.json, or a folder written by save_pretrained.
        terms: term and share, such as ``first_order 0.5 logit 0.2``. A share is the norm of the term's gradient over
            that of the task's, measured on the first batches; the terms are those of fastkd.train.recipes.TERMS.
        config: the settings.
        overwrite: replace an earlier run in --out.
    """
    _run(data, out, student, config, overwrite, teacher, terms)


def _run(
    data: DataArgs,
    out: Path,
    model_name: str,
    config: TrainConfig,
    overwrite: bool,
    teacher_name: str | None = None,
    terms: dict[str, float] | None = None,
) -> None:
    from fastkd import Distiller
    from fastkd.cli._common import build_model, dataset, load_teacher
    from fastkd.train import segmentation_loss
    from fastkd.train import train as run
    from fastkd.train.recipes import balance_on, recipe

    where = {"name": data.name, "split_by": data.split_by}
    model = build_model(model_name, config.seed)
    train_set = dataset(data.root, "train", model, sentences="random", seed=config.seed, **where)
    val_set = dataset(data.root, "val", model, sentences="all", **where)
    subject = model
    if teacher_name is not None:
        subject = Distiller(model, load_teacher(teacher_name), segmentation_loss, recipe(list(terms or {})))
        weights = balance_on(subject, train_set, terms or {}, config)
        print("weights: " + ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items()))
    result = run(subject, train_set, config, val_dataset=val_set, out_dir=out, overwrite=overwrite)
    print(f"best on val: {result.best}\nstudent: {out / 'best'}")

"""``fastkd train`` and ``fastkd distill``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd._console import show
from fastkd.cli._arguments import Config
from fastkd.cli._data import Data
from fastkd.train.config import TrainConfig

_CONFIG = TrainConfig()
_TERMS = ("first_order=0.5",)


def train(
    data: Data,
    out: Path,
    model: str = "shapes-student",
    config: Config = _CONFIG,
    overwrite: bool = False,
) -> None:
    """Train a model alone, without a teacher.

    Args:
        data: the dataset.
        out: folder for log and checkpoints.
        model: a preset's name, a config.json, or a folder written by save_pretrained.
        config: the settings.
        overwrite: replace an earlier run in --out.
    """
    _run(data, out, model, config, overwrite)


def distill(
    data: Data,
    out: Path,
    teacher: str = "shapes",
    student: str = "shapes-student",
    terms: tuple[str, ...] = _TERMS,
    teacher_tokenizer: str | None = None,
    config: Config = _CONFIG,
    overwrite: bool = False,
) -> None:
    """Distil a teacher into a student.

    Args:
        data: the dataset.
        out: folder for log and checkpoints.
        teacher: a folder written by save_pretrained, a LAVT (.safetensors from ``fastkd convert``, or its .pth), a
            folder or hub name of transformers' CLIPSeg or SAM 3, or "shapes" for the shipped teacher of the procedural
            set.
        student: a preset's name, a config.json, or a folder written by save_pretrained.
        terms: terms as name=share, such as ``first_order=0.5 logit=0.2``. A share is the norm of the term's gradient
            relative to the task's, measured on the first batches. fastkd.distill.recipes.TERMS lists the names. A
            teacher with its own tokenizer supports ``mask``, and ``pixel_pixel`` if it compares pixels with words.
        teacher_tokenizer: path of the teacher's tokenizer if it differs from the student's; those of CLIPSeg and SAM 3
            are looked up next to their weights.
        config: the settings.
        overwrite: replace an earlier run in --out.
    """
    _run(data, out, student, config, overwrite, teacher, terms, teacher_tokenizer)


def _run(
    data: Data,
    out: Path,
    model_name: str,
    config: TrainConfig,
    overwrite: bool,
    teacher_name: str | None = None,
    terms: Sequence[str] = (),
    teacher_tokenizer: str | None = None,
) -> None:
    from fastkd import Distiller
    from fastkd.cli._arguments import parse_terms
    from fastkd.cli._data import teacher_tokenizer_options
    from fastkd.cli._models import build_model, load_model
    from fastkd.distill.recipes import recipe
    from fastkd.train import segmentation_loss
    from fastkd.train import train as run
    from fastkd.train.balance import balance_on

    model = build_model(model_name, config.seed, data.tokenizer)
    teacher = None if teacher_name is None else load_model(teacher_name)
    teacher_options = {} if teacher is None else teacher_tokenizer_options(model, teacher, teacher_tokenizer)
    model.config.tokenizer = data.tokenizer or model.config.tokenizer
    if model.config.tokenizer is None and teacher is not None and not teacher_options:
        model.config.tokenizer, model.tokenizer = teacher.config.tokenizer, getattr(teacher, "tokenizer", None)
    train_set = data.open("train", model, sentences="random", seed=config.seed, teacher=teacher_options)
    val_set = data.open("val", model, sentences="all")
    trained: Any = model
    if teacher is not None:
        shares = parse_terms(terms)
        trained = Distiller(model, teacher, segmentation_loss, recipe(list(shares)))
        weights = balance_on(trained, train_set, shares, config)
        show("weights: " + ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items()))
    result = run(trained, train_set, config, val_dataset=val_set, out_dir=out, overwrite=overwrite)
    show(f"best on val: {result.best}\nstudent: {out / 'best'}")

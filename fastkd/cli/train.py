"""``fastkd train`` and ``fastkd distill``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastkd._console import show
from fastkd.train.config import TrainConfig

if TYPE_CHECKING:
    from fastkd.data import ReferDataset

_CONFIG = TrainConfig()
_TERMS = ("first_order=0.5",)


@dataclass
class DataArgs:
    """Where the data are.

    Args:
        data: folder that holds ``refcoco/`` and ``images/``.
        dataset: which of the sets in it: refcoco, refcoco+ or refcocog.
        split_by: who split it: unc, google or umd.
        tokenizer: path of the vocab.txt (or tokenizer folder) that the word ids come from, or "shapes"; where left out,
            the one in the model's folder or that its configuration names, or else the teacher's.
        skip_unusable: skip refs without a sentence, a mask or an image file that can be decoded, and report how many;
            else an error. Every image is decoded once to find out.
    """

    data: Path
    dataset: str = "refcoco"
    split_by: str = "unc"
    tokenizer: str | None = None
    skip_unusable: bool = False

    def open(
        self, split: str, model: Any, *, sentences: str, seed: int = 0, teacher: dict[str, Any] | None = None
    ) -> ReferDataset:
        """One split, at the size and with the tokenizer that the model was made for."""
        from fastkd.cli._common import open_split

        return open_split(
            self.data,
            split,
            model,
            sentences=sentences,
            seed=seed,
            tokenizer=self.tokenizer,
            teacher=teacher,
            name=self.dataset,
            split_by=self.split_by,
            skip_unusable=self.skip_unusable,
        )


Data = Annotated[DataArgs, tyro.conf.arg(name="")]
Config = Annotated[TrainConfig, tyro.conf.arg(name="")]


def train(
    data: Data,
    out: Path,
    model: str = "shapes-student",
    config: Config = _CONFIG,
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
    data: Data,
    out: Path,
    teacher: str = "shapes",
    student: str = "shapes-student",
    terms: tuple[str, ...] = _TERMS,
    teacher_tokenizer: str | None = None,
    config: Config = _CONFIG,
    overwrite: bool = False,
) -> None:
    """Train a student with a teacher.

    Args:
        data: the data set.
        out: folder for log and checkpoints.
        teacher: a folder written by save_pretrained, a LAVT (.safetensors from ``fastkd convert``, or its .pth), a
            folder or hub name of transformers' CLIPSeg or SAM 3, or "shapes" for the shipped teacher of the procedural
            set.
        student: a preset's name, a config.json, or a folder written by save_pretrained.
        terms: name=share of each, such as ``first_order=0.5 logit=0.2``. A share is the norm of the term's gradient
            over that of the task's, measured on the first batches; the terms are those of fastkd.distill.recipes.TERMS.
            With a teacher that has its own tokenizer: ``mask``, and ``pixel_pixel`` if it compares pixels with words.
        teacher_tokenizer: path of the teacher's own tokenizer, where it is not the student's; CLIPSeg's and SAM 3's is
            looked for beside their weights.
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
    from fastkd.cli._common import build_model, load_model, parse_terms, teacher_words
    from fastkd.distill.recipes import recipe
    from fastkd.train import segmentation_loss
    from fastkd.train import train as run
    from fastkd.train.balance import balance_on

    model = build_model(model_name, config.seed, data.tokenizer)
    teacher = None if teacher_name is None else load_model(teacher_name)
    apart = {} if teacher is None else teacher_words(model, teacher, teacher_tokenizer)
    model.config.tokenizer = data.tokenizer or model.config.tokenizer
    if model.config.tokenizer is None and teacher is not None and not apart:
        model.config.tokenizer, model.tokenizer = teacher.config.tokenizer, getattr(teacher, "tokenizer", None)
    train_set = data.open("train", model, sentences="random", seed=config.seed, teacher=apart)
    val_set = data.open("val", model, sentences="all")
    subject: Any = model
    if teacher is not None:
        shares = parse_terms(terms)
        subject = Distiller(model, teacher, segmentation_loss, recipe(list(shares)))
        weights = balance_on(subject, train_set, shares, config)
        show("weights: " + ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items()))
    result = run(subject, train_set, config, val_dataset=val_set, out_dir=out, overwrite=overwrite)
    show(f"best on val: {result.best}\nstudent: {out / 'best'}")

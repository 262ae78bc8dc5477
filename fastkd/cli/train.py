"""``fastkd train`` and ``fastkd distill``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkd._console import show
from fastkd.cli._arguments import Config
from fastkd.cli._data import Data
from fastkd.train.config import TrainConfig

if TYPE_CHECKING:
    from fastkd import Distiller

_CONFIG = TrainConfig()
_TERMS = ("first_order=0.5",)


def train(
    data: Data,
    out: Path,
    model: str = "shapes-student",
    config: Config = _CONFIG,
    overwrite: bool = False,
    resume: bool = False,
    resume_allow: tuple[str, ...] = (),
    replay: Path | None = None,
) -> None:
    """Train a model alone, without a teacher.

    Args:
        data: the dataset.
        out: folder for log and checkpoints.
        model: a preset's name, a config.json, or a folder written by save_pretrained.
        config: the settings.
        overwrite: replace an earlier run in --out.
        resume: continue the run in --out from its latest checkpoint, or start it if there is none yet.
        resume_allow: settings that may differ from those of the run to resume, such as ``lr steps``.
        replay: a file ``replay-step-….pt`` of a run that stopped, with its other arguments: compute the losses and
            gradients of its samples again and print them, without training.
    """
    _run(data, out, model, config, _Folder(overwrite, resume, resume_allow), replay)


def distill(
    data: Data,
    out: Path,
    teacher: str | None = None,
    student: str = "shapes-student",
    terms: tuple[str, ...] = _TERMS,
    teacher_tokenizer: str | None = None,
    teacher_cache: Path | None = None,
    config: Config = _CONFIG,
    overwrite: bool = False,
    resume: bool = False,
    resume_allow: tuple[str, ...] = (),
    replay: Path | None = None,
) -> None:
    """Distil a teacher into a student.

    Args:
        data: the dataset.
        out: folder for log and checkpoints.
        teacher: a folder written by save_pretrained, a LAVT (.safetensors from ``fastkd convert``, or its .pth), a
            folder or hub name of transformers' CLIPSeg or SAM 3, or "shapes" for the shipped teacher of the procedural
            set; default: "shapes", or the one in --teacher-cache.
        student: a preset's name, a config.json, or a folder written by save_pretrained.
        terms: terms as name=share, such as ``first_order=0.5 logit=0.2``. A share is the norm of the term's gradient
            relative to the task's, measured on the first batches. fastkd.distill.recipes.TERMS lists the names. A
            teacher with its own tokenizer supports ``mask``, and ``pixel_pixel`` if it compares pixels with words.
        teacher_tokenizer: path of the teacher's tokenizer if it differs from the student's; those of CLIPSeg and SAM 3
            are looked up next to their weights.
        teacher_cache: a folder written by ``fastkd cache``, read in place of running the teacher; --teacher, if given,
            must be the one that was cached.
        config: the settings.
        overwrite: replace an earlier run in --out.
        resume: continue the run in --out from its latest checkpoint, or start it if there is none yet.
        resume_allow: settings that may differ from those of the run to resume, such as ``lr steps``.
        replay: a file ``replay-step-….pt`` of a run that stopped, with its other arguments: compute the losses and
            gradients of its samples again and print them, without training.
    """
    folder = _Folder(overwrite, resume, resume_allow)
    if teacher_cache is None:
        teacher = teacher or "shapes"
    _run(data, out, student, config, folder, replay, teacher, terms, teacher_tokenizer, teacher_cache)


class _Folder(NamedTuple):
    """Treatment of an earlier run in the output folder."""

    overwrite: bool
    resume: bool
    resume_allow: tuple[str, ...]


def _run(
    data: Data,
    out: Path,
    model_name: str,
    config: TrainConfig,
    folder: _Folder,
    replay: Path | None,
    teacher_name: str | None = None,
    terms: Sequence[str] = (),
    teacher_tokenizer: str | None = None,
    teacher_cache: Path | None = None,
) -> None:
    from fastkd import Distiller
    from fastkd.cli._arguments import parse_terms
    from fastkd.cli._models import build_model
    from fastkd.cli._teacher import open_teacher
    from fastkd.distill.recipes import recipe
    from fastkd.train import segmentation_loss
    from fastkd.train import train as run
    from fastkd.train.balance import balance_on
    from fastkd.train.resume import saved_settings

    model = build_model(model_name, config.seed, data.tokenizer)
    teacher, teacher_options = open_teacher(model, data.tokenizer, teacher_name, teacher_tokenizer, teacher_cache)
    train_set = data.open("train", model, sentences="random", seed=config.seed, teacher=teacher_options)
    val_set = data.open("val", model, sentences="all")
    shares = {} if teacher is None else parse_terms(terms)
    trained = Distiller(model, teacher, segmentation_loss, recipe(list(shares)))
    if replay is not None:
        return _replay(replay, trained, config)
    if teacher is not None:
        saved = saved_settings(out) if folder.resume else {}
        if all(saved.get(f"shares.{name}") == share for name, share in shares.items()):
            trained.set_weights({name: saved[f"weights.{name}"] for name in shares})
        else:
            balance_on(trained, train_set, shares, config)
        show("weights: " + ", ".join(f"{name} {weight:.4g}" for name, weight in trained.weights.items()))
    chosen: dict[str, Any] = {"data": str(data.data.absolute()), "dataset": data.dataset, "split_by": data.split_by}
    chosen |= {"tokenizer": data.tokenizer, "student": model_name, "teacher_tokenizer": teacher_tokenizer}
    chosen |= {f"shares.{name}": share for name, share in shares.items()}
    result = run(trained, train_set, config, val_dataset=val_set, out_dir=out, settings=chosen, **folder._asdict())
    if result.out_dir is not None:  # in one of several processes
        show(f"best on val: {result.best}\nstudent: {out / 'best'}")


def _replay(path: Path, distiller: Distiller, config: TrainConfig) -> None:
    from fastkd.train.launch import requested
    from fastkd.train.replay import not_finite, replay_batch

    report = replay_batch(path, distiller, requested(config)[0])
    sources = not_finite(report)
    show(f"{report}\nnot finite: {', '.join(sources) if sources else 'nothing'}")

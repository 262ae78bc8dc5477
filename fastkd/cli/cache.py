"""``fastkd cache``: run a teacher once over a dataset, for ``fastkd distill --teacher-cache``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from fastkd._console import show
from fastkd.cli._config_file import ConfigFile, config_of, with_defaults
from fastkd.cli._data import Data
from fastkd.cli._settings import DistillSettings, Ranks, TapPaths, Terms, TermSettings, without_schedules
from fastkd.train.config import Precision, TrainConfig

_TERMS = {"first_order": TermSettings()}
_NO_TAPS: dict[str, Any] = {}
_NO_RANKS: dict[str, int] = {}


def cache(
    data: Data,
    out: Path,
    config_file: ConfigFile = None,
    teacher: str = "shapes",
    student: str = "shapes-student",
    backbone_weights: str | None = None,
    text_weights: str | None = None,
    terms: Terms = _TERMS,
    student_taps: TapPaths = _NO_TAPS,
    teacher_taps: TapPaths = _NO_TAPS,
    teacher_tokenizer: str | None = None,
    dtype: Literal["teacher", "bf16", "fp16", "int8"] = "teacher",
    pca: Ranks = _NO_RANKS,
    batch_size: int = 16,
    device: str = "auto",
    precision: Precision = "auto",
    channels_last: bool = False,
    workers: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
    allow_untrained_teacher: bool = False,
) -> None:
    """Run a teacher once over every sentence of a training set, and store what the terms compare.

    Prints size and time before it begins. Killed or stopped, the same command continues. With the configuration of a
    run, its data, models, terms, batch size, precision, memory format and threads apply, so that runs from the cache
    equal those with the teacher online.

    Args:
        data: the dataset.
        out: folder of the cache.
        config_file: directly after the command: a configuration or recipe of ``fastkd distill``; flags override it.
        teacher: as in ``fastkd distill``.
        student: as in ``fastkd distill``; its image size, normalisation and tokenizer apply.
        backbone_weights: as in ``fastkd distill``; images are normalised as for these weights.
        text_weights: as in ``fastkd distill``.
        terms: names of terms, such as ``first_order logit``; shares (``first_order=0.5``) are ignored.
        student_taps: as in ``fastkd distill``; read to measure the error of --dtype and --pca.
        teacher_taps: as in ``fastkd distill``.
        teacher_tokenizer: as in ``fastkd distill``.
        dtype: "teacher" stores the teacher's own dtype and gives the results of a teacher online; "bf16" and "fp16"
            take half of fp32's size, "int8" with scales about 30 %; their error is measured and printed.
        pca: path=rank, such as ``stages.2=32``: keep that many principal directions of a map's channels, for the terms
            ``channel`` and ``pixel_relation``; the error is measured and printed.
        batch_size: samples per forward of the teacher. With the runs' batch size, precision, memory format and threads
            their results are bit-identical to those of a teacher online; other values may change the last digits.
        device: "auto", "cpu", "cuda", ...
        precision: precision of the teacher.
        channels_last: memory format of images and convolution weights.
        workers: data-loading processes.
        threads: torch's CPU threads; None keeps the default.
        overwrite: replace another cache in --out.
        allow_untrained_teacher: accept a teacher whose normalisation layers hold their initial values.
    """
    from accelerate import PartialState

    from fastkd import Distiller
    from fastkd.cli._arguments import check_folder
    from fastkd.cli._models import build_model
    from fastkd.cli._teacher import describe, open_teacher
    from fastkd.cli._terms import attention_taps, build_terms
    from fastkd.train import TeacherCache, segmentation_loss

    check_folder("--out", out)
    weights = {"backbone_weights": backbone_weights, "text_weights": text_weights}
    model = build_model(student, 0, data.tokenizer, **weights)
    loaded, options = open_teacher(model, data.tokenizer, teacher, teacher_tokenizer)
    samples = data.open_every_sentence(model, teacher=options)
    recorded = build_terms(without_schedules(terms), TrainConfig().steps)
    built = TeacherCache.build(
        out,
        Distiller(
            model,
            loaded,
            segmentation_loss,
            recorded,
            student_taps=attention_taps(student_taps),
            teacher_taps=attention_taps(teacher_taps),
        ),
        samples,
        batch_size=batch_size,
        dtype=dtype,
        pca=pca,
        device=device,
        precision=precision,
        channels_last=channels_last,
        workers=workers,
        threads=threads,
        overwrite=overwrite,
        notes=describe(teacher, loaded, options),
        allow_untrained_teacher=allow_untrained_teacher,
    )
    errors = {name: error["gradient"] for name, error in built.measured["errors"].items()}
    worst = max(errors, key=errors.__getitem__, default="")
    error = f", error of the gradients up to {errors[worst]:.1e} ({worst})" if errors else ""
    if PartialState().is_main_process:
        show(f"teacher cache: {out}, {len(built)} samples{error}")


def with_settings(args: Sequence[str]) -> Callable[..., None]:
    """Return the command with the settings of the configuration in ``args``, if it names one, as its defaults."""
    source = config_of("cache", args)
    if source is None:
        return with_defaults(cache, None)
    from fastkd.cli._yaml import load_settings

    settings = load_settings(DistillSettings, source)
    if settings.shards is not None:
        raise ValueError(
            f"{source}: shards are read in sequence, so their teacher cannot be cached: remove the setting"
        )
    of_models = ("student", "backbone_weights", "text_weights", "teacher_tokenizer")
    of_terms = ("terms", "student_taps", "teacher_taps")
    of_config = ("batch_size", "device", "precision", "channels_last", "workers", "threads", "allow_untrained_teacher")
    defaults = {name: getattr(settings, name) for name in ("data", *of_models, *of_terms)}
    defaults |= {name: getattr(settings.config, name) for name in of_config}
    return with_defaults(cache, source, teacher=settings.teacher or "shapes", **defaults)

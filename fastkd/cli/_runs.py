"""Build the student, teacher, terms and data that the settings of a run name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fastkd.cli._settings import DistillSettings, RunSettings

if TYPE_CHECKING:
    from fastkd import Distiller
    from fastkd.data import ReferDataset


class OpenedRun(NamedTuple):
    """Models and datasets of a run.

    Attributes:
        distiller: the student, with teacher and terms or alone.
        train_set: the training set.
        val_set: the split val.
        shares: the terms that are to be balanced, name to gradient share.
        balance_set: the samples to balance on: those of the training set that are labelled.
    """

    distiller: Distiller
    train_set: Any
    val_set: ReferDataset
    shares: dict[str, float]
    balance_set: Any


def open_run(settings: RunSettings, model_name: str, *, warn: bool = True) -> OpenedRun:
    """Return the distiller and the data of a run; its seed determines initial weights and data order.

    Args:
        settings: the settings of the run.
        model_name: the student on the command line.
        warn: warn of towers that begin with random weights.
    """
    import torch

    from fastkd import Distiller
    from fastkd.cli._models import build_model, warn_of_random_weights
    from fastkd.cli._teacher import open_teacher
    from fastkd.cli._terms import attention_taps, build_terms, check_attention, shares_of
    from fastkd.train import segmentation_loss

    data, config = settings.data, settings.config
    weights = {"backbone_weights": settings.backbone_weights, "text_weights": settings.text_weights}
    options: dict[str, Any] = {}
    terms, shares = [], {}
    if isinstance(settings, DistillSettings):
        torch.manual_seed(config.seed)  # of aligners
        shares, terms = shares_of(settings.terms), build_terms(settings.terms, config.steps)
        options = {
            "student_taps": attention_taps(settings.student_taps),
            "teacher_taps": attention_taps(settings.teacher_taps),
            "task_schedule": settings.task.resolve(config.steps, "task"),
        }
        check_attention(terms, student_taps=options["student_taps"], teacher_taps=options["teacher_taps"])
    model = build_model(model_name, config.seed, data.tokenizer, **weights)
    if warn:
        warn_of_random_weights(model_name, model, **weights)
    teacher: Any = None
    teacher_options: dict[str, Any] = {}
    if isinstance(settings, DistillSettings):
        names = (settings.teacher, settings.teacher_tokenizer, settings.teacher_cache)
        teacher, teacher_options = open_teacher(model, data.tokenizer, *names)
    train_set: Any
    if settings.shards is None:
        train_set = data.open_train(model, seed=config.seed, teacher=teacher_options, announce=warn)
    else:
        if data.mix:
            raise ValueError(
                f"--mix {' '.join(data.mix)} and --shards exclude each other: shards hold the whole training set, so "
                "write them from the mixture, or omit --shards"
            )
        train_set = data.open_shards(
            settings.shards, model, buffer=settings.shuffle_buffer, seed=config.seed, teacher=teacher_options
        )
    balance_set = train_set
    if settings.labels != 1:
        from fastkd.data import PartlyLabelled

        balance_set = PartlyLabelled(train_set, settings.labels, only=True)
        distils = isinstance(settings, DistillSettings)
        train_set = PartlyLabelled(train_set, settings.labels) if distils else balance_set
    val_set = data.open("val", model, sentences="all")
    distiller = Distiller(model, teacher, segmentation_loss, terms, **options)
    return OpenedRun(distiller, train_set, val_set, shares, balance_set)

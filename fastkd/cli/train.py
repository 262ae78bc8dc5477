"""``fastkd train`` and ``fastkd distill``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastkd._console import show
from fastkd.cli._config_file import ConfigFile, config_of, with_defaults
from fastkd.cli._settings import DistillSettings, RunSettings, TrainSettings, with_absolute_paths
from fastkd.train.config import TrainConfig

if TYPE_CHECKING:
    from fastkd import Distiller
    from fastkd.train import PreflightReport

_Flat = tyro.conf.arg(name="")


@dataclass(kw_only=True)
class Folder:
    """Treatment of an earlier run in the output folder.

    Args:
        overwrite: replace an earlier run in --out.
        resume: continue the run in --out from its latest checkpoint, or start it if there is none yet.
        resume_allow: settings that may differ from those of the run to resume, such as ``lr steps``.
        replay: a file ``replay-step-….pt`` of a run that stopped, with its other arguments: compute the losses and
            gradients of its samples again and print them, without training.
        preflight_only: check the first batch, print the table of its terms and costs, and stop; --no-check trains
            without it.
    """

    overwrite: bool = False
    resume: bool = False
    resume_allow: tuple[str, ...] = ()
    replay: Path | None = None
    preflight_only: bool = False

    def __post_init__(self) -> None:
        if self.overwrite and self.resume:
            raise ValueError("--resume continues the run in --out and --overwrite replaces it: pass one of them")


_FOLDER = Folder()


def train(
    settings: Annotated[TrainSettings, _Flat],
    config_file: ConfigFile = None,
    folder: Annotated[Folder, _Flat] = _FOLDER,
) -> None:
    """Train a model alone, without a teacher.

    Args:
        settings: the settings of the run.
        config_file: directly after the command: a YAML file with settings under the flags' names (``batch_size: 32``);
            flags override it. A run's folder holds its own as config.yaml.
        folder: treatment of an earlier run.
    """
    _run(settings, settings.model, folder)


def distill(
    settings: Annotated[DistillSettings, _Flat],
    config_file: ConfigFile = None,
    folder: Annotated[Folder, _Flat] = _FOLDER,
) -> None:
    """Distil a teacher into a student.

    Args:
        settings: the settings of the run.
        config_file: directly after the command: a YAML file with settings under the flags' names (``batch_size: 32``),
            or the name of a recipe (``fastkd recipes``); flags override it. A run's folder holds its own as
            config.yaml.
        folder: treatment of an earlier run.
    """
    if settings.teacher is None and settings.teacher_cache is None:
        settings.teacher = "shapes"
    _run(settings, settings.student, folder)


def with_settings(command: Callable[..., None], args: Sequence[str]) -> Callable[..., None]:
    """Return a command whose flags default to the settings of the configuration in ``args``, if it names one.

    Args:
        command: `train` or `distill`.
        args: the command line: the command, then perhaps its configuration.

    Raises:
        FileNotFoundError: there is no such configuration.
        ValueError: the configuration is invalid.
    """
    kind = TrainSettings if command is train else DistillSettings
    settings: RunSettings = kind()
    source = config_of(command.__name__, args)
    if source is not None:
        from fastkd.cli._yaml import load_settings

        settings = load_settings(kind, source)
    return with_defaults(command, source, settings=settings)


def _run(settings: RunSettings, model_name: str, folder: Folder) -> None:
    from fastkd.cli._runs import open_run
    from fastkd.train import preflight
    from fastkd.train import train as run

    config, out = settings.config, settings.out
    main = folder.replay is None and _join(config, out, folder)
    trained, train_set, val_set, shares, balance_set = open_run(settings, model_name, warn=main)
    if folder.replay is not None:
        return _replay(folder.replay, trained, config)
    if trained.teacher is not None:
        _balance(trained, balance_set, shares, config, out if folder.resume else None)
        if main:
            show("weights: " + ", ".join(f"{name} {weight:.4g}" for name, weight in trained.weights.items()))
    if folder.preflight_only:
        report = preflight(trained, train_set, config, val_dataset=val_set)
        return _show_preflight(report) if main else None
    result = run(
        trained,
        train_set,
        config,
        val_dataset=val_set,
        out_dir=out,
        overwrite=folder.overwrite,
        resume=folder.resume,
        resume_allow=folder.resume_allow,
        **recorded(settings, shares),
    )
    if main:
        show(f"best on val: {result.best}\nstudent: {out / 'best'}")


def _join(config: TrainConfig, out: Path, folder: Folder) -> bool:
    """Join the other processes; return whether this one prints. Refuse trackers and folders before any work."""
    from fastkd.cli._arguments import check_folder
    from fastkd.train.launch import join
    from fastkd.train.resume import check_run_folder
    from fastkd.train.trackers import check_trackers

    main = join(config)[0].is_main_process
    check_trackers(config.tracker, out)
    if main and not folder.preflight_only:
        check_folder("--out", out)
        check_run_folder(out, overwrite=folder.overwrite, resume=folder.resume)
    return main


def _balance(
    distiller: Distiller, dataset: Any, shares: Mapping[str, float], config: TrainConfig, resumed: Path | None
) -> None:
    """Set the weights of terms with a share: those of the run to resume if its shares are equal, else measured."""
    from fastkd.train.balance import balance_on
    from fastkd.train.resume import saved_settings

    saved = {} if resumed is None else saved_settings(resumed)
    if saved and all(saved.get(f"shares.{name}") == share for name, share in shares.items()):
        distiller.set_weights({name: saved[f"weights.{name}"] for name in shares})
    else:
        # Without a share it only tries the terms, before anything is written.
        balance_on(distiller, dataset, shares, config, batches=4 if shares else 1)


def recorded(settings: RunSettings, shares: Mapping[str, float]) -> dict[str, Any]:
    """Return what `fastkd.train.train` keeps of a run's settings: those it compares on resuming, and config.yaml."""
    from fastkd.cli._yaml import dump_settings

    resolved = with_absolute_paths(settings)
    command = "distill" if isinstance(settings, DistillSettings) else "train"
    header = f"# fastkd {command} with this file starts the same run; with --resume it continues this one.\n"
    return {"settings": _compared(resolved, shares), "files": {"config.yaml": header + dump_settings(resolved)}}


def _compared(settings: RunSettings, shares: Mapping[str, float]) -> dict[str, Any]:
    """Return what a resumed run compares in addition to `TrainConfig`, the terms and the teacher's weights."""
    from fastkd.cli._yaml import plain_settings

    elsewhere = {"out", "teacher", "teacher_cache", "terms", "task", *vars(settings.config)}
    compared = {key: value for key, value in plain_settings(settings).items() if key not in elsewhere and value != {}}
    if "model" in compared:
        compared["student"] = compared.pop("model")
    return compared | {f"shares.{name}": share for name, share in shares.items()}


def _show_preflight(report: PreflightReport) -> None:
    if sys.stdout is None or not sys.stdout.isatty():
        return show(str(report))
    from rich.console import Console

    Console().print(report)


def _replay(path: Path, distiller: Distiller, config: TrainConfig) -> None:
    from fastkd.train.launch import requested
    from fastkd.train.replay import not_finite, replay_batch

    report = replay_batch(path, distiller, requested(config)[0])
    sources = not_finite(report)
    show(f"{report}\nnot finite: {', '.join(sources) if sources else 'nothing'}")

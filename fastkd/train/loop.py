"""`train`: check the arguments, prepare or continue the output folder, and run until the end or a signal."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastkd._atomic import replace_files
from fastkd._wrappers import unwrap
from fastkd.distill.checks import check_has_weights
from fastkd.distill.distiller import Distiller
from fastkd.distill.schedules import check_schedules
from fastkd.errors import FastKDWarning
from fastkd.train.checkpoint import FOLDER, CheckpointWriter, read_checkpoint
from fastkd.train.config import TrainConfig
from fastkd.train.first_batch import PreflightReport
from fastkd.train.log import Progress, RunLog
from fastkd.train.result import TrainResult
from fastkd.train.resume import check_run_folder, check_settings, find_start, lines_until, read_lines, run_settings
from fastkd.train.run import TrainingRun
from fastkd.train.seeding import kept_generators
from fastkd.train.stop import Termination
from fastkd.train.sync_norm import synchronised_norms
from fastkd.train.task import segmentation_loss
from fastkd.train.trackers import Trackers, check_trackers


def train(
    model: nn.Module,
    train_dataset: Dataset[Any],
    config: TrainConfig | None = None,
    *,
    val_dataset: Dataset[Any] | None = None,
    out_dir: str | Path | None = None,
    task_loss: Callable[[Any, Mapping[str, Any]], Tensor] = segmentation_loss,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
    title: str = "train",
    progress: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    resume_allow: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> TrainResult:
    """Train a student, alone or under a `Distiller`: AdamW, polynomial decay, one process or many.

    Under ``accelerate launch`` or ``torchrun``, training is data-parallel; ``batch_size`` remains the total per step.
    ``config`` determines all settings: "auto" follows accelerate's environment (its options and config file), and an
    environment that contradicts the configuration is an error. The same seed, batch size and initial weights reproduce
    a run on the same device. Distillation terms are averaged over micro-batches, like the task loss.

    Before the first step, the first batch is checked and a table of the terms and of what a step costs is printed, as
    by `preflight`.

    With ``out_dir``, ``log.jsonl`` holds one JSON object per line (event "start" with the settings and the environment,
    then "train", "eval", "checkpoint" and finally "end"), ``last/`` the student (written at every evaluation, at the
    end, and on Ctrl-C, SIGTERM or SIGUSR1) and ``best/`` the one with the best validation mIoU, both with the settings
    of the run in ``training.json``. ``checkpoints/`` holds what a run needs to continue: written every
    ``checkpoint_every`` steps, at the end, on those signals and after an error, with the state after the latest
    complete step. Each is written completely or not at all. A run that was
    stopped or killed and resumed ends with the same weights, bit for bit, as one that was not, on the same device.

    Args:
        model: a `Distiller`, or a model to train on ``task_loss`` alone; either may be compiled. Parameter names
            in checkpoints have no wrapper prefixes.
        train_dataset: samples for ``collate``. ``set_epoch(e)`` is called before each epoch, on it or, if it has
            none, on the datasets inside it (ConcatDataset, Subset and other wrappers).
        config: the settings.
        val_dataset: evaluated with protocol "lavt" every ``eval_every`` steps and at the end.
        out_dir: folder for log and checkpoints; None writes nothing.
        task_loss: task loss of a plain model; a Distiller has its own.
        collate: turns a list of samples into a batch; default: `fastkd.data.collate`.
        title: name of the run in the progress bar and the log.
        progress: show progress.
        overwrite: replace an earlier run in ``out_dir``.
        resume: continue the run in ``out_dir`` from its latest checkpoint, or start it if there is none yet. All
            processes read the checkpoint, so they need a common file system.
        resume_allow: settings that may differ from those of the run to resume, such as ``["lr", "steps"]``; a group
            such as ``"weights"`` allows all of ``weights.*``. Settings that cannot change the result, such as
            ``workers``, may always differ.
        settings: further settings of the run, JSON values by name (paths, for example), compared in the same way.
        files: texts to keep with the run, such as its configuration: name to content of files in ``out_dir``, written
            before the first step.

    Returns:
        Steps, seconds and evaluations. The model is trained in place; it stays on the training device, in eval mode.

    Raises:
        ValueError: a mistake that the checks find (see `preflight`), an environment that contradicts the configuration,
            a batch size that does not fit the data or the processes, masks with values other than 0 and 1, word ids
            outside a model's vocabulary, an unknown tracker, steps at which every weight is 0, or a run to resume that
            has other settings.
        ImportError: a tracker whose package is not installed.
        TypeError: ``config`` is not a `TrainConfig`.
        FileExistsError: ``out_dir`` holds an earlier run or, with ``resume``, something else than a run to continue.
        Terminated: SIGTERM or SIGUSR1 arrived (a `SystemExit` with status 143 or 138); not if another handler is
            installed.
        FloatingPointError: ten steps in a row were skipped since a loss or gradient was not finite, or NaN in
            validation; the message names its source and the samples.

    Example:
        >>> result = train(distiller, train_set, TrainConfig(steps=600), val_dataset=val_set, out_dir="runs/distilled")
        >>> print(result.best)
    """
    run = _new_run(model, train_dataset, config, task_loss, collate, title)
    main = run.processes.is_main_process
    folder = Path(out_dir) if out_dir is not None else None
    check_trackers(run.config.tracker, folder)
    if resume:
        if folder is None or overwrite:
            raise ValueError("resume needs out_dir, the folder of the run, and contradicts overwrite=True")
        _resume(run, folder, resume_allow, _settings(run, val_dataset, settings))
    else:
        run.settings = _settings(run, val_dataset, settings)
    if folder is not None and main:
        _prepare_folder(folder, overwrite, resume)
        run.result.out_dir, run.overwrite = folder, overwrite
    run.folder = folder
    latest = run.resumed.step if run.resumed is not None else None
    with ExitStack() as opened:
        run.stop = stop = opened.enter_context(Termination())  # first, so that it also covers the ends of the others
        trackers = None
        if main and run.config.tracker:
            known = {name: identity for line in run.lines for name, identity in line.get("trackers", {}).items()}
            name = folder.name if folder is not None and title == "train" else title  # the default says little
            trackers = Trackers(run.config.tracker, folder, name, known, latest or 0)
            opened.callback(trackers.close)
            trackers.configure(run.settings)
        run.log = RunLog(folder / "log.jsonl" if folder and main else None, run.resumed is not None, trackers)
        opened.callback(run.log.close)
        if folder is not None and main:
            for name, text in (files or {}).items():  # after the log: a folder without one is not a run to resume
                with replace_files(folder / name) as (partial,):
                    partial.write_text(text, encoding="utf-8")
        run.checkpoints = CheckpointWriter(folder and folder / FOLDER, run.config.keep_checkpoints, latest)
        run.bar = Progress(run.config.steps, title, progress and main)
        opened.callback(run.bar.close)
        if resume:
            run.bar.print(
                f"resumes after step {latest}" if latest is not None else f"no checkpoint in {folder}: starts afresh"
            )
        opened.enter_context(_state_of_run(run.config))
        sync = run.config.sync_batchnorm and run.parallel
        opened.enter_context(synchronised_norms(run.distiller.student, run.device, sync))
        try:
            run.train(val_dataset)
        except BaseException as error:
            cause = stop.settle(error)
            run.end_early(cause)
            if cause is error:
                raise
            raise cause from error
        finally:
            run.distiller.timer = None
    return run.result


def preflight(
    model: nn.Module,
    train_dataset: Dataset[Any],
    config: TrainConfig | None = None,
    *,
    val_dataset: Dataset[Any] | None = None,
    task_loss: Callable[[Any, Mapping[str, Any]], Tensor] = segmentation_loss,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
) -> PreflightReport:
    """Do all that `train` does before its first step, and return the table that it prints.

    On the first batch, each loss L_i gets its gradient norm ‖∇L_i‖ with respect to the student's parameters and its
    share w_i ‖∇L_i‖ / ‖∇L_task‖ with weight w_i. Nothing is trained or written; afterwards the model is on the training
    device, in train mode.

    Args:
        model: as in `train`, like all other arguments.
        train_dataset: its first batch is checked.
        config: the settings; ``check`` is ignored.
        val_dataset: checked against protocol "lavt" and the student's tokenizer and normalisation.
        task_loss: task loss of a plain model.
        collate: turns a list of samples into a batch.

    Returns:
        Value, gradient norm, weight and share of each term; the parts of the student that its gradient reaches; bytes
        of memory and seconds of a step by use.

    Raises:
        ValueError: a teacher in train mode, with parameters that require a gradient or without (all of) its weights,
            with outputs that are not finite or change between two passes; a term that is 0, not finite or sends no
            gradient to the student; a loss that adds up samples although steps have several micro-batches, or that
            needs other processes in a run of one; and as in `train`.
        RuntimeError: a tap that never fires.

    Example:
        >>> print(preflight(distiller, train_set, TrainConfig(batch_size=16)))
    """
    run = _new_run(model, train_dataset, config, task_loss, collate, "preflight")
    norms = synchronised_norms(run.distiller.student, run.device, run.config.sync_batchnorm and run.parallel)
    with _state_of_run(run.config), norms:
        return run.preflight(val_dataset)


def _new_run(
    model: nn.Module, train_dataset: Dataset[Any], config: TrainConfig | None, task_loss: Any, collate: Any, title: str
) -> TrainingRun:
    if config is not None and not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig or None, got {type(config).__name__}")
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):  # `train` wraps it again
        model = model.module
    inner = unwrap(model)
    distiller = inner if isinstance(inner, Distiller) else Distiller(model, None, task_loss)
    if distiller is inner and task_loss is not segmentation_loss:
        raise ValueError("task_loss is for a model without a Distiller; this Distiller has its own")
    if distiller.teacher is not None:
        check_has_weights(distiller.teacher)  # also needed for its digest
    run = TrainingRun(distiller, train_dataset, config or TrainConfig(), collate, title)
    run.module = model if distiller is inner else distiller  # a compiled distiller is called through its wrapper
    unused = check_schedules(distiller.schedules, distiller.weights_at, run.config.steps)
    if unused and run.processes.is_main_process:
        message = f"{', '.join(unused)} never counts: its schedule starts after the last of {run.config.steps} steps"
        warnings.warn(message, FastKDWarning, stacklevel=3)
    return run


@contextmanager
def _state_of_run(config: TrainConfig) -> Iterator[None]:
    """Set torch's threads and gradient mode, whatever the caller's are, and restore them and the generators after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        with kept_generators(), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _settings(run: TrainingRun, val_dataset: Any, further: Mapping[str, Any] | None) -> dict[str, Any]:
    return run_settings(
        run.config,
        run.distiller,
        device=run.device,
        precision=run.precision,
        processes=run.processes.num_processes,
        samples=len(run.dataset),  # type: ignore[arg-type]
        val_samples=None if val_dataset is None else len(val_dataset),
        further={**run.order.settings(), **(further or {})},
    )


def _resume(run: TrainingRun, folder: Path, allowed: Sequence[str], settings: dict[str, Any]) -> None:
    """Load the latest checkpoint of a folder, if there is one, and shorten the log to its step."""
    run.settings = settings
    found: list[Any] = [None, None]  # path, error: chosen once, so that all processes load the same checkpoint
    if run.processes.is_main_process:
        try:
            found[0] = find_start(folder)
        except (ValueError, OSError) as reason:
            found[1] = reason
    if run.parallel:
        torch.distributed.broadcast_object_list(found)
    path, error = found
    if error is not None:
        raise error
    if path is None:
        return
    checkpoint = read_checkpoint(path)
    run.changed = check_settings(checkpoint.state["settings"], settings, allowed)
    lines = lines_until(read_lines(folder / "log.jsonl"), checkpoint.state)
    run.resume(checkpoint, lines)


def _prepare_folder(folder: Path, overwrite: bool, resume: bool) -> None:
    """Make the folder; remove the checkpoints of a run that is replaced."""
    check_run_folder(folder, overwrite=overwrite, resume=resume)
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for name in (FOLDER, "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)

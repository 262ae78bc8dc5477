"""`train`: check the arguments, prepare the output folder, and run until the end, Ctrl-C or SIGTERM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastkd._wrappers import unwrap
from fastkd.distill.distiller import Distiller
from fastkd.train.config import TrainConfig
from fastkd.train.log import Progress, RunLog
from fastkd.train.result import TrainResult
from fastkd.train.run import TrainingRun
from fastkd.train.stop import Termination
from fastkd.train.task import segmentation_loss


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
) -> TrainResult:
    """Train a student, alone or under a `Distiller`: AdamW, polynomial decay, one process or many.

    Under ``accelerate launch`` or ``torchrun``, training is data-parallel; ``batch_size`` remains the total per step.
    ``config`` determines all settings: "auto" follows accelerate's environment (its options and config file), and an
    environment that contradicts the configuration is an error. The same seed, batch size and initial weights reproduce
    a run on the same device. Distillation terms are averaged over micro-batches, like the task loss.

    With ``out_dir``, ``log.jsonl`` holds one JSON object per line (event "start" with the settings and the environment,
    then "train", "eval" and finally "end"), ``last/`` the student's latest checkpoint (written at every evaluation, at
    the end, on Ctrl-C and on SIGTERM) and ``best/`` the one with the best validation mIoU. Checkpoints are written
    completely or not at all.

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

    Returns:
        Steps, seconds and evaluations. The model is trained in place; it stays on the training device, in eval mode.

    Raises:
        ValueError: a mistake that `Distiller.check` finds, an environment that contradicts the configuration, a batch
            size that does not fit the data or the processes, masks with values other than 0 and 1, or word ids outside
            a model's vocabulary.
        TypeError: ``config`` is not a `TrainConfig`.
        FileExistsError: ``out_dir`` holds an earlier run.
        Terminated: SIGTERM arrived (a `SystemExit` with status 143); not if another handler is installed.
        FloatingPointError: a loss or gradient that is not finite, or NaN in validation; the message names its source.

    Example:
        >>> result = train(distiller, train_set, TrainConfig(steps=600), val_dataset=val_set, out_dir="runs/distilled")
        >>> print(result.best)
    """
    if config is not None and not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig or None, got {type(config).__name__}")
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):  # `train` wraps it again
        model = model.module
    inner = unwrap(model)
    distiller = inner if isinstance(inner, Distiller) else Distiller(model, None, task_loss)
    if distiller is inner and task_loss is not segmentation_loss:
        raise ValueError("task_loss is for a model without a Distiller; this Distiller has its own")
    run = TrainingRun(distiller, train_dataset, config or TrainConfig(), collate, title)
    run.module = model if distiller is inner else distiller  # a compiled distiller is called through its wrapper
    main = run.processes.is_main_process
    folder = _make_folder(Path(out_dir), overwrite) if out_dir is not None and main else None
    run.result.out_dir, run.overwrite = folder, overwrite
    run.log = RunLog(folder / "log.jsonl" if folder else None)
    run.bar = Progress(run.config.steps, title, progress and main)
    threads = torch.get_num_threads()
    torch.set_num_threads(run.config.threads or threads)
    with Termination() as stop:
        try:
            with torch.inference_mode(False), torch.enable_grad():  # regardless of the caller's mode
                run.train(val_dataset)
        except BaseException as error:
            cause = stop.settle(error)
            run.end_early(cause)
            if cause is error:
                raise
            raise cause from error
        finally:
            run.bar.close()
            run.log.close()
            torch.set_num_threads(threads)
    return run.result


def _make_folder(folder: Path, overwrite: bool) -> Path:
    if (folder / "log.jsonl").exists() and not overwrite:
        raise FileExistsError(
            f"out_dir {str(folder)!r} holds an earlier run; choose another folder or pass overwrite=True"
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out_dir {str(folder)!r} is a file; pass a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder

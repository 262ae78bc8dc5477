"""The training loop: short, deterministic by seed, and honest about time."""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from fastkd._runtime import autocast, to_device
from fastkd._wrappers import unwrap
from fastkd.data._loading import batches
from fastkd.data._parts import declared_values, leaves, set_epoch
from fastkd.distill.distiller import Distiller
from fastkd.errors import Terminated
from fastkd.evaluate.evaluation import check_dataset, evaluate
from fastkd.evaluate.protocols import PROTOCOLS
from fastkd.models.inputs import check_normalisation, check_vocabulary
from fastkd.ops.numerics import computes_fp64
from fastkd.train.checkpoint import save_student
from fastkd.train.clock import Clock
from fastkd.train.config import TrainConfig
from fastkd.train.host import check_batch, check_tokenizers, keep_tokenizer
from fastkd.train.launch import join
from fastkd.train.log import Progress, RunLog, environment
from fastkd.train.optim import BatchOrder, adamw, lr_factor
from fastkd.train.result import TrainResult
from fastkd.train.split import check_all_reduced, data_parallel, warn_of_micro_batches
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

    Started by ``accelerate launch`` or ``torchrun`` it trains data-parallel; ``batch_size`` stays the size of the whole
    step. Settings come from ``config`` alone: "auto" follows accelerate's environment (its options and config file),
    and what contradicts the configuration there is an error. The same seed, batch size and initial weights give the
    same run on one device. Distillation terms are divided like the task loss when micro-batches are accumulated.

    With ``out_dir``, ``log.jsonl`` holds one JSON object per line (event "start" with the settings and the environment,
    then "train", "eval" and at last "end"), ``last/`` the student's latest checkpoint (at every evaluation, at the end,
    on Ctrl-C and on SIGTERM) and ``best/`` the one with the best validation mIoU. A checkpoint appears whole or not at
    all.

    Args:
        model: a `Distiller`, or a bare model to train on ``task_loss`` alone; either may be compiled. Checkpoints have
            the names of the student itself, whatever wraps it.
        train_dataset: samples for ``collate``; its ``set_epoch(e)`` is called before each epoch if it has one, else
            those of the data sets that it holds (ConcatDataset, Subset and other wrappers are looked through).
        config: the settings.
        val_dataset: evaluated with protocol "lavt" every ``eval_every`` steps and at the end.
        out_dir: folder for log and checkpoints; None keeps nothing.
        task_loss: for a bare model; a Distiller has its own.
        collate: list of samples to batch; `fastkd.data.collate` where left out.
        title: the run's name in the progress bar and the log.
        progress: show progress.
        overwrite: let ``out_dir`` hold an earlier run, which is replaced.

    Returns:
        Steps, seconds, evaluations. The model is left trained, on the device it was trained on, in eval mode.

    Raises:
        ValueError: what `Distiller.check` refuses, an environment that contradicts the configuration, a batch that does
            not fit the data or the processes, masks with values other than 0 and 1, or word ids beyond a model's word
            table.
        FileExistsError: ``out_dir`` holds an earlier run.
        Terminated: SIGTERM, as `SystemExit` with status 143; only where nobody else handles that signal.
        FloatingPointError: a loss or gradient that is not finite, or a validation with NaN; the message names where.

    Example:
        >>> result = train(distiller, train_set, TrainConfig(steps=600), val_dataset=val_set, out_dir="runs/distilled")
        >>> print(result.best)
    """
    if config is not None and not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig or None, got {type(config).__name__}")
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):  # `train` wraps it itself
        model = model.module
    inner = unwrap(model)
    distiller = inner if isinstance(inner, Distiller) else Distiller(model, None, task_loss)
    if distiller is inner and task_loss is not segmentation_loss:
        raise ValueError("task_loss is for a bare model; this Distiller has its own")
    run = _Run(distiller, train_dataset, config or TrainConfig(), collate, title)
    run.module = model if distiller is inner else distiller  # a compiled one is called as such
    main = run.processes.is_main_process
    folder = _prepare(Path(out_dir), overwrite) if out_dir is not None and main else None
    run.result.out_dir, run.overwrite = folder, overwrite
    run.log = RunLog(folder / "log.jsonl" if folder else None)
    run.bar = Progress(run.config.steps, title, progress and main)
    threads = torch.get_num_threads()
    torch.set_num_threads(run.config.threads or threads)
    with Termination() as stop:
        try:
            with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
                run.go(val_dataset)
        except BaseException as error:
            cause = stop.settle(error)
            run.fail(cause)
            if cause is error:
                raise
            raise cause from error
        finally:
            run.bar.close()
            run.log.close()
            torch.set_num_threads(threads)
    return run.result


class _Run:
    """One run of `train`: its parts, and the steps between them."""

    log: RunLog
    bar: Progress
    module: nn.Module
    overwrite = False

    def __init__(
        self,
        distiller: Distiller,
        dataset: Dataset[Any],
        config: TrainConfig,
        collate: Callable[[list[Any]], dict[str, Any]] | None,
        title: str,
    ) -> None:
        self.processes, self.device, self.precision = join(config)
        self.parallel = self.processes.num_processes > 1
        self.distiller, self.dataset, self.config, self.title = distiller, dataset, config, title
        index, count = self.processes.process_index, self.processes.num_processes
        self.order = BatchOrder(len(dataset), config, index, count)  # type: ignore[arg-type]
        self.collate = collate or _default_collate()
        self.names = ["loss", "task", *distiller.terms, "gradient"]
        self.pending: list[Tensor] = []  # per-step values not yet looked at
        self.window: list[list[float]] = []  # per-step values since the last line of the log
        self.result = TrainResult()
        self.clock = Clock(self.device)
        self.step = 0
        self.batch: dict[str, Any] = {}

    def go(self, val_dataset: Dataset[Any] | None) -> None:
        """Train from the first step to the last."""
        config, distiller = self.config, self.distiller
        check_tokenizers(distiller, self.dataset)
        keep_tokenizer(distiller.student, self.dataset)
        torch.manual_seed(config.seed * 1009 + self.processes.process_index)  # dropout
        distiller.to(self.device)
        if config.channels_last:
            distiller.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        distiller.train()
        batches = self._batches()
        first = next(batches)
        self._begin(first, val_dataset)
        batches = itertools.chain([first], batches)

        optimizer = adamw(distiller, config)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        module = self.module
        if self.parallel:
            with autocast(self.precision, self.device):
                module = data_parallel(module, distiller, first, config, self.device)
        self.clock.start()
        while self.step < config.steps:
            fraction = self._fraction()
            if fraction >= 1:
                self.result.stopped = "max_seconds"
                break
            for group in optimizer.param_groups:
                group["lr"] = config.lr * lr_factor(self.step, fraction, config)
            values = self._forward_backward(module, batches)
            check_all_reduced(module, self.step + 1)
            norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
            self.pending.append(torch.cat([values, norm.detach().reshape(1).to(values)]))
            if self.device.type == "cpu":
                self.flush(self.step + 1)  # looking costs nothing here, and comes before the weights are touched
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.step % config.log_every == 0 or self.step == config.steps:
                self._report(group["lr"], fraction)
            if config.eval_every and self.step % config.eval_every == 0 and self.step < config.steps:
                self._evaluate(val_dataset)
        self.flush()
        self.clock.stop()
        self.clock.start()
        self._evaluate(val_dataset)
        self.clock.stop()
        distiller.eval()
        self._end()

    def fail(self, error: BaseException) -> None:
        """Write the end of a run that did not come to its end; one that was stopped keeps its student."""
        self.clock.stop()
        seconds, folder = self.clock.seconds, self.result.out_dir
        self.log.write("end", reason=type(error).__name__, message=str(error), step=self.step, seconds=seconds)
        if isinstance(error, KeyboardInterrupt | Terminated) and folder and self.step:
            self.flush()
            save_student(self.distiller.student, folder / "last")
            self.bar.say(f"interrupted at step {self.step}; the student is in {folder / 'last'}")
        if isinstance(error, torch.OutOfMemoryError):
            error.add_note("Raise accumulate (smaller micro-batches), or lower batch_size or the images' size.")

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Micro-batches on the device, epoch after epoch."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.order,  # type: ignore[arg-type]
            collate_fn=self.collate,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.config.seed),  # the global one stays the model's
        )
        for epoch in itertools.count():
            self.order.epoch = epoch
            set_epoch(self.dataset, epoch)
            for batch in batches(loader):
                check_batch(self.distiller, batch)
                yield to_device(batch, self.device, self.config.channels_last)

    def _begin(self, first: dict[str, Any], val_dataset: Dataset[Any] | None) -> None:
        """Check the first batch and the validation set, and say in the log what is about to run."""
        if val_dataset is not None:  # now, and not after an hour of training
            check_dataset(val_dataset, PROTOCOLS["lavt"])
            for part in leaves(val_dataset, "image_mean"):
                check_normalisation(self.distiller.student, part, "student")
            for tokenizer in declared_values(val_dataset, "tokenizer"):
                check_vocabulary(self.distiller.student, tokenizer)
        distiller, report = self.distiller, None
        if self.processes.is_main_process:
            warn_of_micro_batches(distiller, self.config, self.processes.num_processes)
        if self.config.check:
            with autocast(self.precision, self.device):
                report = distiller.check(first)
        counts = {"student": distiller.student, "aligners": distiller.term_modules, "teacher": distiller.teacher}
        self.log.write(
            "start",
            title=self.title,
            config=asdict(self.config),
            environment={
                **environment(self.device),
                "precision": self.precision,
                "processes": self.processes.num_processes,
            },
            parameters={k: sum(p.numel() for p in m.parameters()) for k, m in counts.items() if m is not None},
            samples={"train": len(self.dataset), "val": len(val_dataset) if val_dataset is not None else None},  # type: ignore[arg-type]
            weights=distiller.weights,
            gradients=report and {"values": report.values, "norms": report.norms, "shares": report.shares},
        )

    def _forward_backward(self, module: nn.Module, batches: Iterator[dict[str, Any]]) -> Tensor:
        """Accumulate the gradient of one step; returns loss, task and terms, averaged over its micro-batches."""
        parts = self.config.accumulate
        total: Tensor | None = None
        for micro in range(parts):
            self.batch = next(batches)
            last = micro + 1 == parts
            with module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext():
                with autocast(self.precision, self.device):
                    output = module(self.batch)
                (output.loss / parts if parts > 1 else output.loss).backward()
            values = (
                torch.stack([v.detach().float() for v in (output.loss, output.task, *output.terms.values())]) / parts
            )
            total = values if total is None else total + values
        assert total is not None
        return total

    def flush(self, step: int | None = None) -> None:
        """Look at the values of the steps since the last look; raises if one is not finite."""
        if not self.pending:
            return
        rows = torch.stack(self.pending).tolist()
        self.pending.clear()
        last = step if step is not None else self.step
        for number, row in enumerate(rows, last - len(rows) + 1):
            if not all(map(math.isfinite, row)):
                raise FloatingPointError(self._blame(number, dict(zip(self.names, row, strict=True))))
        self.window.extend(rows)

    def _blame(self, step: int, values: dict[str, float]) -> str:
        bad = [name for name in values if name not in ("loss", "gradient") and not math.isfinite(values[name])]
        if bad:
            what = " and ".join("the task loss" if name == "task" else f"term {name!r}" for name in bad)
            return f"{what} is {values[bad[0]]} at step {step}; the run stops, earlier checkpoints are kept"
        norms = self.distiller.gradient_report(self.batch).norms
        culprits = [name for name, norm in norms.items() if not math.isfinite(norm)]
        return (
            f"the gradient is {values['gradient']} at step {step} while every loss is finite"
            + (f"; it comes from {' and '.join(map(repr, culprits))}" if culprits else "")
            + "; the run stops, earlier checkpoints are kept"
        )

    def _fraction(self) -> float:
        """How much of the run is behind us: of its steps or of its time, whichever is more."""
        fraction = self.step / self.config.steps
        if self.config.max_seconds is None:
            return fraction
        fraction = max(fraction, self.clock.seconds / self.config.max_seconds)
        if self.parallel:  # all must stop at one step
            fraction = float(broadcast(torch.tensor(fraction, device=self.device)))
        return fraction

    def _report(self, lr: float, fraction: float) -> None:
        """One line of the log: means over the steps since the last one."""
        self.flush()
        seconds = self.clock.seconds
        rows = torch.tensor(self.window, dtype=torch.float64, device="cpu").mean(0)
        self.window.clear()
        if self.parallel:
            dtype = torch.float64 if computes_fp64(self.device) else torch.float32
            rows = reduce(rows.to(self.device, dtype), "mean")
        means = dict(zip(self.names, rows.tolist(), strict=True))
        line = {
            "step": self.step,
            "loss": means["loss"],
            "task": means["task"],
            "terms": {name: means[name] for name in self.distiller.terms},
            "gradient_norm": means["gradient"],
            "lr": lr,
            "seconds": seconds,
            "samples_per_second": self.step * self.config.batch_size / seconds,
        }
        self.result.history.append(line)
        self.log.write("train", **line)
        shown = {name: value for name, value in means.items() if name != "gradient"}
        self.bar.update(self.step, shown, seconds, max(fraction, self.step / self.config.steps))

    def _evaluate(self, val_dataset: Dataset[Any] | None) -> None:
        """Evaluate the student and keep it, outside the training clock."""
        self.flush()
        self.clock.stop()
        student, folder = self.distiller.student, self.result.out_dir
        is_best = False
        if val_dataset is not None:
            start = time.perf_counter()
            evaluation = evaluate(
                student,
                val_dataset,
                batch_size=self.config.eval_batch_size,
                device=self.device,
                precision=self.precision,
                workers=self.config.workers,
                collate=self.collate,
                channels_last=self.config.channels_last,
            )
            self.result.eval_seconds += time.perf_counter() - start
            self.result.evaluations.append((self.step, evaluation))
            is_best = evaluation is self.result.best
            self.log.write("eval", step=self.step, seconds=self.clock.seconds, best=is_best, **evaluation.to_dict())
            self.bar.say(f"step {self.step}: {evaluation}")
        if folder:
            save_student(student, folder / "last")
            if is_best:
                save_student(student, folder / "best")
            elif self.overwrite and val_dataset is None:  # an earlier run's must not pass for this one's
                shutil.rmtree(folder / "best", ignore_errors=True)
        self.distiller.train()
        self.clock.start()

    def _end(self) -> None:
        result = self.result
        result.steps, result.seconds = self.step, self.clock.seconds
        result.samples_per_second = self.step * self.config.batch_size / max(result.seconds, 1e-9)
        self.log.write(
            "end",
            reason=result.stopped,
            step=result.steps,
            seconds=result.seconds,
            eval_seconds=result.eval_seconds,
            samples_per_second=result.samples_per_second,
            best=result.best.to_dict() if result.best else None,
        )
        self.bar.say(f"{result.steps} steps in {result.seconds:.0f} s, {result.samples_per_second:.0f} samples/s")


def _default_collate() -> Callable[[list[Any]], dict[str, Any]]:
    from fastkd.data import collate

    return collate


def _prepare(folder: Path, overwrite: bool) -> Path:
    if (folder / "log.jsonl").exists() and not overwrite:
        raise FileExistsError(
            f"out_dir {str(folder)!r} holds an earlier run; choose another folder or pass overwrite=True"
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out_dir {str(folder)!r} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder

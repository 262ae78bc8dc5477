"""One training run: the steps between the first batch and the last evaluation."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from fastkd._runtime import autocast
from fastkd.distill.distiller import Distiller
from fastkd.errors import Terminated
from fastkd.evaluate.evaluation import evaluate
from fastkd.ops.numerics import computes_fp64
from fastkd.train.average import Average
from fastkd.train.checkpoint import Checkpoint, CheckpointWriter, save_student
from fastkd.train.clock import Clock
from fastkd.train.config import TrainConfig
from fastkd.train.feed import endless_batches
from fastkd.train.host import check_tokenizers, check_validation, keep_tokenizer
from fastkd.train.launch import join
from fastkd.train.log import Progress, RunLog, environment
from fastkd.train.optim import BatchOrder, adamw, lr_factor
from fastkd.train.result import TrainResult
from fastkd.train.resume import evaluation_from_json, evaluation_to_json
from fastkd.train.seeding import seed_step
from fastkd.train.split import check_all_reduced, data_parallel, warn_of_micro_batches
from fastkd.train.state import ModelState, copy_tensors, load_optimizer, optimizer_state
from fastkd.train.step_values import StepValues
from fastkd.train.stop import Termination


class TrainingRun:
    """State of one call of `fastkd.train.train`; the caller sets the attributes without a default."""

    log: RunLog
    bar: Progress
    module: nn.Module
    stop: Termination
    checkpoints: CheckpointWriter
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
        self.values = StepValues(["loss", "task", *distiller.terms, "gradient"])
        self.result = TrainResult()
        self.clock = Clock(self.device)
        self.step = 0
        self.batch: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.resumed: Checkpoint | None = None
        self._lines: list[dict[str, Any]] = []  # of the log until the resumed step
        self.changed: dict[str, tuple[Any, Any]] = {}  # settings that differ from the resumed run's
        self.model: ModelState | None = None  # once training has begun
        self._reported, self._lr, self._fraction_done = 0, 0.0, 0.0
        self._updating = False  # weights and optimiser are between two steps

    def resume(self, checkpoint: Checkpoint, lines: list[dict[str, Any]]) -> None:
        """Continue after the step of a checkpoint; ``lines`` are those of the log until then."""
        state = checkpoint.state
        self.resumed, self.step = checkpoint, checkpoint.step
        self.clock = Clock(self.device, state["seconds"])
        self.values.window = state["window"]
        self._reported, self._lr, self._fraction_done = state["reported"], state["lr"], state["fraction"]
        self._lines = lines
        self.result.history = [
            {key: value for key, value in line.items() if key != "event"}
            for line in lines
            if line.get("event") == "train"
        ]
        self.result.evaluations = [evaluation_from_json(values) for values in state["evaluations"]]
        self.result.eval_seconds, self.result.resumed_at = state["eval_seconds"], self.step

    def train(self, val_dataset: Dataset[Any] | None) -> None:
        """Train until the last step or ``max_seconds``, then evaluate."""
        config, distiller = self.config, self.distiller
        check_tokenizers(distiller, self.dataset)
        keep_tokenizer(distiller.student, self.dataset)
        seed_step(config.seed, self.step, self.processes.process_index)
        distiller.to(self.device)
        if config.channels_last:
            distiller.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        distiller.train()
        model = ModelState(distiller)
        if self.resumed is not None:
            model.load(self.resumed.tensors)
        self.optimizer = optimizer = adamw(distiller, config)
        self.average = Average(distiller.student, config.ema, self.stop) if config.ema is not None else None
        if self.resumed is not None:
            load_optimizer(optimizer, self.resumed.optimizer)
            if self.average is not None and "average" in self.resumed.tensors:
                copy_tensors(self.resumed.tensors["average"], self.average.tensors, "average")
        batches = endless_batches(self.dataset, self.order, self.step, config, self.collate, distiller, self.device)
        first = next(batches)
        self._begin(first, val_dataset)
        batches = itertools.chain([first], batches)
        self.model, self.resumed = model, None
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        module = self.module
        if self.parallel:
            with autocast(self.precision, self.device):
                module = data_parallel(module, distiller, first, config, self.device)
        self.clock.start()
        while True:
            self.stop.check()
            self._after_step(val_dataset)
            if self.step >= config.steps:
                break
            fraction = self._fraction()
            if fraction >= 1:
                self.result.stopped = "max_seconds"
                break
            lr = config.lr * lr_factor(self.step, fraction, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            seed_step(config.seed, self.step, self.processes.process_index)
            values = self._forward_backward(module, batches)
            check_all_reduced(module, self.step + 1)
            norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
            row = torch.cat([values, norm.detach().reshape(1).to(values)])
            if self.device.type == "cpu" and not row.isfinite().all():  # no synchronisation: stop before the update
                self.values.add(row)
                self._check_values(self.step + 1)
            with self.stop.shielded():
                self._updating = True
                optimizer.step()
                if self.average is not None:
                    self.average.update(self.step + 1)
                model.keep_buffers()
                self.values.add(row)
                self.step, self._lr, self._fraction_done = self.step + 1, lr, fraction
                self._updating = False
            optimizer.zero_grad(set_to_none=True)
        self._check_values()
        self.clock.stop()
        self.clock.start()
        if self.step not in dict(self.result.evaluations) or val_dataset is None:
            self._evaluate(val_dataset)
        self.clock.stop()
        distiller.eval()
        self._save()
        if self.average is not None:
            self.average.copy_to_student()
        self._end()

    def end_early(self, error: BaseException) -> None:
        """Log why a run ended early, and save the state after the latest step."""
        with contextlib.suppress(RuntimeError):  # the device may have failed
            self.clock.stop()
        if isinstance(error, torch.OutOfMemoryError):
            error.add_note("Increase accumulate (smaller micro-batches), or reduce batch_size or the image size.")
        try:
            self._save_early(error)
        except Exception as failure:  # the first error is the one to raise
            error.add_note(f"The state after step {self.step} could not be saved: {failure}")
        self.log.write(
            "end", reason=type(error).__name__, message=str(error), step=self.step, seconds=self.clock.seconds
        )

    def _save_early(self, error: BaseException) -> None:
        folder = self.result.out_dir
        if not folder or not self.step or self.model is None or isinstance(error, FloatingPointError):
            return
        if self._updating:
            self.bar.print(f"the update of step {self.step + 1} was not completed, so its state is not saved")
        else:
            self._save()
            if isinstance(error, KeyboardInterrupt | Terminated):
                with self._averaged():
                    save_student(self.distiller.student, folder / "last")
                self.bar.print(f"interrupted at step {self.step}; the student is in {folder / 'last'}")
        if self.checkpoints.latest is not None:
            self.bar.print(f"resume=True (--resume) continues after step {self.checkpoints.latest}")

    def _after_step(self, val_dataset: Dataset[Any] | None) -> None:
        """Report, evaluate and save, as far as it is due after this number of steps and not done."""
        config, step = self.config, self.step
        if step > self._reported and (step % config.log_every == 0 or step == config.steps):
            with self.stop.shielded():
                self._report(self._lr, self._fraction_done)
        if not step or step == config.steps:
            return
        is_best = False
        if config.eval_every and step % config.eval_every == 0 and step not in dict(self.result.evaluations):
            is_best = self._evaluate(val_dataset)
        if config.checkpoint_every and (is_best or step % config.checkpoint_every == 0):
            self.clock.stop()
            with self.stop.shielded():
                self._save()
            self.clock.start()

    def _save(self) -> None:
        """Write a checkpoint of the state after the latest step."""
        writer = self.checkpoints
        if not self.processes.is_main_process or writer.folder is None or self.step in (0, writer.latest):
            return
        self._check_values()
        assert self.model is not None
        average = {} if self.average is None else {"average": self.average.tensors}
        state = {
            "seconds": self.clock.seconds,
            "eval_seconds": self.result.eval_seconds,
            "lr": self._lr,
            "fraction": self._fraction_done,
            "reported": self._reported,
            "window": self.values.window,
            "evaluations": [evaluation_to_json(step, result) for step, result in self.result.evaluations],
            "settings": self.settings,
        }
        checkpoint = Checkpoint(
            self.step, {**self.model.consistent(), **average}, optimizer_state(self.optimizer), state
        )
        best = max(self.result.evaluations, key=lambda each: each[1].miou, default=(None, None))[0]
        start = time.perf_counter()
        failure = writer.write(checkpoint, best)
        written = {"save_seconds": time.perf_counter() - start} if failure is None else {"error": failure}
        self.log.write("checkpoint", step=self.step, **written)

    def _averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the student has its averaged parameters, if there are any."""
        return nullcontext() if self.average is None else self.average.applied()

    def _begin(self, first: dict[str, Any], val_dataset: Dataset[Any] | None) -> None:
        """Check the first batch and the validation set, then log the settings."""
        if val_dataset is not None:
            check_validation(self.distiller, val_dataset)
        distiller, report = self.distiller, None
        if self.processes.is_main_process:
            warn_of_micro_batches(distiller, self.config, self.processes.num_processes)
        if self.config.check:
            with autocast(self.precision, self.device):
                report = distiller.check(first)
        if self.resumed is not None:
            self.log.restart(self._lines)
            self.log.write(
                "resume",
                step=self.step,
                seconds=self.clock.seconds,
                changed={key: list(values) for key, values in self.changed.items()},
                config=asdict(self.config),
                environment=self._environment(),
            )
            return
        counts = {"student": distiller.student, "aligners": distiller.term_modules, "teacher": distiller.teacher}
        self.log.write(
            "start",
            title=self.title,
            config=asdict(self.config),
            environment=self._environment(),
            parameters={k: sum(p.numel() for p in m.parameters()) for k, m in counts.items() if m is not None},
            samples={"train": len(self.dataset), "val": len(val_dataset) if val_dataset is not None else None},  # type: ignore[arg-type]
            weights=distiller.weights,
            gradients=report and {"values": report.values, "norms": report.norms, "shares": report.shares},
        )

    def _environment(self) -> dict[str, Any]:
        processes = self.processes.num_processes
        return {**environment(self.device), "precision": self.precision, "processes": processes}

    def _forward_backward(self, module: nn.Module, batches: Iterator[dict[str, Any]]) -> Tensor:
        """Accumulate the gradient of one step; return the mean loss, task and terms, (2 + terms,)."""
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

    def _check_values(self, step: int | None = None) -> None:
        """Raise ``FloatingPointError`` if a value since the previous call is not finite."""
        non_finite = self.values.read(self.step if step is None else step)
        if non_finite is not None:
            raise FloatingPointError(self._explain_non_finite(*non_finite))

    def _explain_non_finite(self, step: int, values: dict[str, float]) -> str:
        """Return an error message that names the losses, or the sources of the gradient, that are not finite."""
        losses = [name for name in values if name not in ("loss", "gradient") and not math.isfinite(values[name])]
        if losses:
            text = " and ".join("the task loss" if name == "task" else f"term {name!r}" for name in losses)
            return f"{text} is {values[losses[0]]} at step {step}; the run stops, earlier checkpoints are kept"
        norms = self.distiller.gradient_report(self.batch).norms
        sources = [name for name, norm in norms.items() if not math.isfinite(norm)]
        return (
            f"the gradient is {values['gradient']} at step {step} while every loss is finite"
            + (f"; it comes from {' and '.join(map(repr, sources))}" if sources else "")
            + "; the run stops, earlier checkpoints are kept"
        )

    def _fraction(self) -> float:
        """Return the completed fraction of the steps or of ``max_seconds``, whichever is larger."""
        fraction = self.step / self.config.steps
        if self.config.max_seconds is None:
            return fraction
        fraction = max(fraction, self.clock.seconds / self.config.max_seconds)
        if self.parallel:  # all processes must stop at the same step
            fraction = float(broadcast(torch.tensor(fraction, device=self.device)))
        return fraction

    def _report(self, lr: float, fraction: float) -> None:
        """Write one line of the log: means over the steps since the previous line."""
        self._check_values()
        seconds = self.clock.seconds
        mean = self.values.mean()
        if self.parallel:
            dtype = torch.float64 if computes_fp64(self.device) else torch.float32
            mean = reduce(mean.to(self.device, dtype), "mean")
        means = dict(zip(self.values.names, mean.tolist(), strict=True))
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
        self._reported = self.step
        shown = {name: value for name, value in means.items() if name != "gradient"}
        self.bar.update(self.step, shown, seconds, max(fraction, self.step / self.config.steps))

    def _evaluate(self, val_dataset: Dataset[Any] | None) -> bool:
        """Evaluate and save the student with the clock stopped; return whether it is the best so far."""
        self._check_values()
        self.clock.stop()
        student, folder = self.distiller.student, self.result.out_dir
        is_best = False
        with self._averaged():
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
            with self.stop.shielded():
                if val_dataset is not None:
                    self.result.eval_seconds += time.perf_counter() - start
                    self.result.evaluations.append((self.step, evaluation))
                    is_best = evaluation is self.result.best
                    scores = evaluation.to_dict()
                    self.log.write("eval", step=self.step, seconds=self.clock.seconds, best=is_best, **scores)
                    self.bar.print(f"step {self.step}: {evaluation}")
                if folder:
                    save_student(student, folder / "last")
                    if is_best:
                        save_student(student, folder / "best")
                    elif self.overwrite and val_dataset is None:  # written by the run being replaced
                        shutil.rmtree(folder / "best", ignore_errors=True)
        self.distiller.train()
        self.clock.start()
        return is_best

    def _end(self) -> None:
        """Complete the result and write the last line of the log."""
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
        self.bar.print(f"{result.steps} steps in {result.seconds:.0f} s, {result.samples_per_second:.0f} samples/s")


def _default_collate() -> Callable[[list[Any]], dict[str, Any]]:
    from fastkd.data import collate

    return collate

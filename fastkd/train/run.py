"""One training run: the steps between the first batch and the last evaluation."""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from fastkd._runtime import autocast, to_device
from fastkd.data._loading import batches
from fastkd.data._nested import declared_values, leaves, set_epoch
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
from fastkd.train.step_values import StepValues


class TrainingRun:
    """State of one call of `fastkd.train.train`; the caller sets ``log``, ``bar`` and ``module``."""

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
        self.values = StepValues(["loss", "task", *distiller.terms, "gradient"])
        self.result = TrainResult()
        self.clock = Clock(self.device)
        self.step = 0
        self.batch: dict[str, Any] = {}

    def train(self, val_dataset: Dataset[Any] | None) -> None:
        """Train until the last step or ``max_seconds``, then evaluate."""
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
            self.values.add(torch.cat([values, norm.detach().reshape(1).to(values)]))
            if self.device.type == "cpu":  # no synchronisation: stop before NaN reaches the weights
                self._check_values(self.step + 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.step % config.log_every == 0 or self.step == config.steps:
                self._report(group["lr"], fraction)
            if config.eval_every and self.step % config.eval_every == 0 and self.step < config.steps:
                self._evaluate(val_dataset)
        self._check_values()
        self.clock.stop()
        self.clock.start()
        self._evaluate(val_dataset)
        self.clock.stop()
        distiller.eval()
        self._end()

    def end_early(self, error: BaseException) -> None:
        """Log why a run ended early; after Ctrl-C or SIGTERM, save the student."""
        self.clock.stop()
        seconds, folder = self.clock.seconds, self.result.out_dir
        self.log.write("end", reason=type(error).__name__, message=str(error), step=self.step, seconds=seconds)
        if isinstance(error, KeyboardInterrupt | Terminated) and folder and self.step:
            self._check_values()
            save_student(self.distiller.student, folder / "last")
            self.bar.print(f"interrupted at step {self.step}; the student is in {folder / 'last'}")
        if isinstance(error, torch.OutOfMemoryError):
            error.add_note("Increase accumulate (smaller micro-batches), or reduce batch_size or the image size.")

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Yield micro-batches on the device, epoch after epoch."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.order,  # type: ignore[arg-type]
            collate_fn=self.collate,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.config.seed),  # the global generator belongs to the model
        )
        for epoch in itertools.count():
            self.order.epoch = epoch
            set_epoch(self.dataset, epoch)
            for batch in batches(loader):
                check_batch(self.distiller, batch)
                yield to_device(batch, self.device, self.config.channels_last)

    def _begin(self, first: dict[str, Any], val_dataset: Dataset[Any] | None) -> None:
        """Check the first batch and the validation set, then log the settings."""
        if val_dataset is not None:  # fail now rather than after an hour of training
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
        shown = {name: value for name, value in means.items() if name != "gradient"}
        self.bar.update(self.step, shown, seconds, max(fraction, self.step / self.config.steps))

    def _evaluate(self, val_dataset: Dataset[Any] | None) -> None:
        """Evaluate and save the student with the clock stopped."""
        self._check_values()
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
            self.bar.print(f"step {self.step}: {evaluation}")
        if folder:
            save_student(student, folder / "last")
            if is_best:
                save_student(student, folder / "best")
            elif self.overwrite and val_dataset is None:  # written by the run being replaced
                shutil.rmtree(folder / "best", ignore_errors=True)
        self.distiller.train()
        self.clock.start()

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

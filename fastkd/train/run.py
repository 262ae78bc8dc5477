"""One training run: the steps between the first batch and the last evaluation."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from fastkd._runtime import autocast
from fastkd.data._nested import named_sets
from fastkd.distill.distiller import Distiller
from fastkd.errors import FastKDWarning
from fastkd.evaluate.evaluation import evaluate
from fastkd.train.checkpoint import WRITE_ERRORS, save_student
from fastkd.train.compiled import CompiledStudent
from fastkd.train.config import TrainConfig
from fastkd.train.fake_int8 import FakeInt8
from fastkd.train.first_batch import PreflightReport, check_first_batch
from fastkd.train.host import check_tokenizers, check_validation, keep_tokenizer
from fastkd.train.launch import join
from fastkd.train.log import environment
from fastkd.train.optim import lr_factor
from fastkd.train.replay import find_broken, write_replay
from fastkd.train.reported_run import ReportedRun
from fastkd.train.seeding import seed_step
from fastkd.train.shard import shard_teacher
from fastkd.train.skips import LIMIT, any_not_finite, describe
from fastkd.train.split import check_all_reduced, data_parallel, warn_of_micro_batches, warn_of_unused
from fastkd.train.state import ModelState
from fastkd.train.stream_feed import feed_for
from fastkd.train.teacher_cache.reader import check_cache


class TrainingRun(ReportedRun):
    """One call of `fastkd.train.train`; the caller sets ``module``, ``folder`` and what `ReportedRun` needs."""

    module: nn.Module
    folder: Path | None = None  # of log, checkpoints and replay files
    overwrite = False
    student_call: Callable[[], AbstractContextManager[None]] = nullcontext  # around a forward of a training step

    def __init__(
        self,
        distiller: Distiller,
        dataset: Dataset[Any],
        config: TrainConfig,
        collate: Callable[[list[Any]], dict[str, Any]] | None,
        title: str,
    ) -> None:
        processes, device, self.precision = join(config)
        super().__init__(distiller, config, processes, device)
        self.parallel = self.processes.num_processes > 1
        self.dataset, self.title = dataset, title
        self.rank, count = self.processes.process_index, self.processes.num_processes
        self.collate = collate or _default_collate()
        self.feed = feed_for(dataset, config, self.collate, distiller, device, self.rank, count)
        self.order = self.feed.order

    def train(self, val_dataset: Dataset[Any] | None) -> None:
        """Train until the last step or ``max_seconds``, then evaluate."""
        config, distiller = self.config, self.distiller
        self._place()
        keep_tokenizer(distiller.student, self.dataset)
        model = self.prepare(self.precision)
        batches = self.feed.start(self.step)
        with self.timer.part("data"):
            first = next(batches)
        self._begin(first, val_dataset)
        batches = itertools.chain([first], batches)
        self.model, self.resumed = model, None
        module = self.module
        if config.compile_student:
            self.student_call = CompiledStudent(distiller, module).active
        if config.fake_int8:
            self.student_call = FakeInt8(distiller.student).active
        distiller.set_step(self.step)
        if self.parallel:
            with autocast(self.precision, self.device):
                module = data_parallel(module, distiller, first, config, self.device)
        first_step = True
        self.timer.read()  # discard the time before the first step
        distiller.timer = self.timer.part
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
            values = self._forward_backward(module, batches)
            check_all_reduced(module, self.step + 1)
            if first_step and not self.parallel:  # `data_parallel` has warned
                with autocast(self.precision, self.device):
                    warn_of_unused(module, distiller, first)
            first_step = False
            with self.timer.part("update"):
                row = torch.cat([values, self.updater.clip().detach().reshape(1).to(values)])
                with self.stop.shielded():
                    skipped = self._update(model, row, fraction)
                self.updater.zero_grad()
            if skipped or self.step % LIMIT == 0:
                self._check_values()
        self._check_values()
        if self.step > self.reported:  # max_seconds may end the run between two lines
            with self.stop.shielded():
                self.report()
        self.clock.stop()
        self.clock.start()
        if self.step not in dict(self.result.evaluations) or val_dataset is None:
            self._evaluate(val_dataset)
        self.clock.stop()
        distiller.eval()
        self.collect_bad_samples()
        self.save()
        if self.average is not None:
            self.average.copy_to_student()
        self.end()

    def preflight(self, val_dataset: Dataset[Any] | None) -> PreflightReport:
        """Check the validation set and the first batch, without training."""
        self._place()
        if val_dataset is not None:
            check_validation(self.distiller, val_dataset)
        with self.timer.part("data"):
            first = next(self.feed.start(0))
        return self._check(first)

    def _place(self) -> None:
        """Check what the dataset declares, and move the models to the device, in train mode."""
        distiller, config = self.distiller, self.config
        check_tokenizers(distiller, self.dataset)
        check_cache(distiller, self.feed.samples, self.collate, self.precision)
        seed_step(config.seed, self.step, 0, self.rank)
        shard_teacher(distiller.teacher, config, self.device)
        distiller.to(self.device)
        if config.channels_last:
            distiller.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        distiller.train()

    def _check(self, first: dict[str, Any]) -> PreflightReport:
        return check_first_batch(
            self.distiller,
            first,
            self.config,
            self.device,
            self.precision,
            self.processes.num_processes,
            self.timer.read()["data"],
        )

    def end_early(self, error: BaseException) -> None:
        """Log why a run ended early, and save the state after the latest step."""
        with contextlib.suppress(RuntimeError):  # the device may have failed
            self.clock.stop()
        if isinstance(error, torch.OutOfMemoryError):
            error.add_note("Increase accumulate (smaller micro-batches), or reduce batch_size or the image size.")
        try:
            for step, _ in self.values.read(self.step):
                self.skips.add(step)
            self.save_early(error)
        except Exception as failure:  # the first error is the one to raise
            error.add_note(f"The state after step {self.step} could not be saved: {failure}")
        self.log.write(
            "end", reason=type(error).__name__, message=str(error), step=self.step, seconds=self.clock.seconds
        )

    def _after_step(self, val_dataset: Dataset[Any] | None) -> None:
        """Report, evaluate and save, as far as it is due after this number of steps and not done."""
        config, step = self.config, self.step
        if step > self.reported and (step % config.log_every == 0 or step == config.steps):
            self._check_values()
            with self.stop.shielded():
                self.report()
        self.log.forward()
        if not step or step == config.steps:
            return
        is_best = False
        if config.eval_every and step % config.eval_every == 0 and step not in dict(self.result.evaluations):
            is_best = self._evaluate(val_dataset)
        if config.checkpoint_every and (is_best or step % config.checkpoint_every == 0):
            self._check_values()
            self.clock.stop()
            with self.stop.shielded():
                self.save()
            self.clock.start()

    def _begin(self, first: dict[str, Any], val_dataset: Dataset[Any] | None) -> None:
        """Check the first batch and the validation set, then log the settings."""
        if val_dataset is not None:
            check_validation(self.distiller, val_dataset)
        distiller, report = self.distiller, None
        if self.processes.is_main_process:
            warn_of_micro_batches(distiller, self.config, self.processes.num_processes)
        if self.resumed is not None:  # checked when it started; the next batch may be one to skip
            self.log.restart(self.lines)
            self.log.write(
                "resume",
                step=self.step,
                seconds=self.clock.seconds,
                changed={key: list(values) for key, values in self.changed.items()},
                config=asdict(self.config),
                environment=self._environment(),
                trackers=self.log.identities,
            )
            return
        if self.config.check:
            report = self._check(first)
            self.bar.show(report)
        counts = {"student": distiller.student, "aligners": distiller.term_modules, "teacher": distiller.teacher}
        self.log.write(
            "start",
            title=self.title,
            config=asdict(self.config),
            environment=self._environment(),
            parameters={k: sum(p.numel() for p in m.parameters()) for k, m in counts.items() if m is not None},
            sets=named_sets(self.dataset),
            samples={"train": len(self.dataset), "val": len(val_dataset) if val_dataset is not None else None},  # type: ignore[arg-type]
            weights=distiller.weights,
            gradients=report and {**asdict(report.gradients), "shares": report.gradients.shares},
            memory=report and report.memory,
            step_seconds=report and report.seconds,
            trackers=self.log.identities,
        )

    def _environment(self) -> dict[str, Any]:
        processes = self.processes.num_processes
        return {**environment(self.device), "precision": self.precision, "processes": processes}

    def _forward_backward(self, module: nn.Module, batches: Iterator[dict[str, Any]]) -> Tensor:
        """Accumulate the gradient of one step; return the mean loss, task and terms, (2 + terms,)."""
        self.distiller.set_step(self.step)
        parts = self.config.accumulate
        total: Tensor | None = None
        for micro in range(parts):
            with self.timer.part("data"):
                batch = next(batches)
            if not micro and self.config.gradients_every and (self.step + 1) % self.config.gradients_every == 0:
                self.log_gradients(batch)
            seed_step(self.config.seed, self.step, micro, self.rank)
            last = micro + 1 == parts
            with module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext():
                with autocast(self.precision, self.device), self.student_call():
                    output = module(batch)
                with self.timer.part("backward"):
                    self.updater.scaler.scale(output.loss / parts if parts > 1 else output.loss).backward()
            values = (
                torch.stack([v.detach().float() for v in (output.loss, output.task, *output.terms.values())]) / parts
            )
            total = values if total is None else total + values
        assert total is not None
        return total

    def _update(self, model: ModelState, row: Tensor, fraction: float) -> bool:
        """Complete the step: update the weights, or skip that; return whether it is known to be skipped."""
        updater = self.updater
        not_finite = any_not_finite(row, self.parallel)  # (2,): any value, any loss
        skip = not_finite[0]
        known = updater.waits and bool(skip)
        ignored = known and updater.is_overflow(not_finite[1])
        lr = self.config.lr * lr_factor(self.step, fraction, self.config)
        self.updating = True
        updater.step(lr, skip)
        if known or not updater.waits:
            model.restore_buffers(None if known else skip)
        if self.average is not None and not known:
            self.average.update(self.step + 1)
        model.keep_buffers()
        weights = self.distiller.weights_at(self.step)
        self.values.add(row, skip, ignored, [weights[name] for name in self.distiller.terms])
        self.step, self.lr, self.fraction = self.step + 1, lr, fraction
        self.updating = False
        return known and not ignored

    def _check_values(self) -> None:
        """Count the skipped steps since the previous call; raise ``FloatingPointError`` at `LIMIT` in a row."""
        for step, values in self.values.read(self.step):
            losses, text = describe(values)
            at_limit = self.skips.add(step)
            self.log.write("skip", step=step, cause=text, values=values, samples=self.order.indices(step - 1))
            if self.skips.count == 1 and self.processes.is_main_process:
                message = f"step {step} is skipped: {text}; after {LIMIT} in a row the run stops"
                warnings.warn(message, FastKDWarning, stacklevel=2)
            if at_limit:
                self._stop_at(step, losses, text)

    def _stop_at(self, step: int, losses: list[str], text: str) -> None:
        """Raise ``FloatingPointError`` with the samples and the sources, after writing a file that replays them."""
        assert self.model is not None
        together = self.config.shard_teacher or self.config.sync_batchnorm
        broken = find_broken(self.distiller, self.feed, step - 1, self.config.seed, self.precision, losses, together)
        if broken.sources and not losses:
            text += f"; it comes from {' and '.join(map(repr, broken.sources))}"
        if not broken.sources:
            text += "; computed again, everything is finite"
        replay = ""
        if self.folder is not None:
            path = self.folder / f"replay-step-{step:06d}{f'-rank{self.rank}' if self.parallel else ''}.pt"
            try:
                write_replay(path, broken, self.model, self.distiller.weights, self.precision)
                replay = f"; --replay {path} computes it again"
            except OSError as error:
                replay = f"; {path} could not be written ({error})"
        raise FloatingPointError(
            f"{LIMIT} steps in a row were skipped, the latest at step {step}: {text}; {broken.samples()}{replay}"
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

    def _evaluate(self, val_dataset: Dataset[Any] | None) -> bool:
        """Evaluate and save the student with the clock stopped; return whether it is the best so far."""
        self._check_values()
        self.clock.stop()
        student, folder = self.distiller.student, self.result.out_dir
        is_best = False
        with self.averaged():
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
                evaluation.samples = ()  # a run keeps all its evaluations
            with self.stop.shielded():
                if val_dataset is not None:
                    self.result.eval_seconds += time.perf_counter() - start
                    self.result.evaluations.append((self.step, evaluation))
                    is_best = evaluation is self.result.best
                    scores = evaluation.to_dict()
                    self.log.write("eval", step=self.step, seconds=self.clock.seconds, best=is_best, **scores)
                    self.bar.print(f"step {self.step}: {evaluation}")
                if folder:
                    self._save_student(folder, is_best)
                    if self.overwrite and val_dataset is None:  # written by the run being replaced
                        shutil.rmtree(folder / "best", ignore_errors=True)
        self.distiller.train()
        self.clock.start()
        return is_best

    def _save_student(self, folder: Path, is_best: bool) -> None:
        """Save the student; before the last step, failure is a warning."""
        try:
            for name in ("last", "best") if is_best else ("last",):
                save_student(self.distiller.student, folder / name, self.record())
        except WRITE_ERRORS as error:
            if self.result.stopped == "max_seconds" or self.step >= self.config.steps:
                raise
            message = (
                f"the student of step {self.step} could not be saved to {folder / name} ({error}); training continues"
            )
            warnings.warn(message, FastKDWarning, stacklevel=2)


def _default_collate() -> Callable[[list[Any]], dict[str, Any]]:
    from fastkd.data import collate

    return collate

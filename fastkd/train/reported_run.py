"""The part of a run that writes the log: means and costs of steps, gradient norms, bad samples, and the end."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate.utils import reduce

from fastkd._runtime import autocast
from fastkd.errors import FastKDWarning
from fastkd.ops.numerics import computes_fp64
from fastkd.train.feed import Feed
from fastkd.train.saved_run import SavedRun
from fastkd.train.seeding import seed_step
from fastkd.train.timing import peak_memory


class ReportedRun(SavedRun):
    """A run that logs its steps; the caller sets the attributes without a value here."""

    feed: Feed
    parallel: bool
    precision: str

    def report(self) -> None:
        """Write one line of the log: means over the steps since the previous line."""
        self.collect_bad_samples()
        seconds = self.clock.seconds
        mean = self.values.mean()
        if self.parallel:
            dtype = torch.float64 if computes_fp64(self.device) else torch.float32
            mean = reduce(mean.to(self.device, dtype), "mean")
        count = len(self.values.names)
        means = dict(zip(self.values.names, mean[:count].tolist(), strict=True))
        line = {
            "step": self.step,
            "loss": means["loss"],
            "task": means["task"],
            "terms": {name: means[name] for name in self.distiller.terms},
            "weighted": dict(zip(self.distiller.terms, mean[count:].tolist(), strict=True)),
            "gradient_norm": means["gradient"],
            "lr": self.lr,
            "loss_scale": self.updater.loss_scale,
            "skipped": self.skips.since_report(),
            "seconds": seconds,
            "cpu_seconds": self.clock.cpu_seconds,
            "samples_per_second": self.step * self.config.batch_size / seconds,
            **self._costs(seconds),
        }
        self.result.history.append(line)
        self.log.write("train", **line)
        self.reported = self.step
        shown = {name: value for name, value in means.items() if name != "gradient"}
        self.bar.update(self.step, shown, seconds, max(self.fraction, self.step / self.config.steps))

    def _costs(self, seconds: float) -> dict[str, Any]:
        """Return what the steps since the previous line of this process cost, given the run's seconds so far."""
        parts, steps = self.timer.read(), max(1, self.step - self.timed[0])
        elapsed, self.timed = max(1e-9, seconds - self.timed[1]), (self.step, seconds)
        peak = peak_memory(self.device)
        return {
            "milliseconds": {name: 1000 * value / steps for name, value in parts.items()},
            "data_share": parts["data"] / elapsed,
            "peak_memory_mib": peak and peak / 2**20,
        }

    def log_gradients(self, batch: dict[str, Any]) -> None:
        """Log the gradient norm of each loss on a micro-batch of rank 0, computed in addition to the step.

        All processes compute theirs: a loss may communicate in its backward.
        """
        timer, self.distiller.timer = self.distiller.timer, None
        seed_step(self.config.seed, self.step, 0, self.processes.process_index)  # the dropout of the step itself
        try:
            with autocast(self.precision, self.device):
                report = self.distiller.gradient_report(batch, self.step, self.updater.loss_scale or 1.0)
        finally:
            self.distiller.timer = timer
        self.log.write("gradients", step=self.step + 1, norms=report.norms, shares=report.shares)

    def collect_bad_samples(self) -> None:
        """List the samples that any process replaced since the previous call."""
        if not self.config.skip_bad_samples:
            return
        found = [self.feed.bad]
        if self.parallel:
            found = [{} for _ in range(self.processes.num_processes)]
            torch.distributed.all_gather_object(found, self.feed.bad)
        known = self.result.bad_samples
        new = {index: error for part in found for index, error in part.items() if index not in known}
        if not new:
            return
        if not known and self.processes.is_main_process:
            first = next(iter(new.values()))
            message = (
                f"samples of the training set cannot be read and are replaced, such as {first}; the log lists them"
            )
            warnings.warn(message, FastKDWarning, stacklevel=2)
        known.update(new)
        self.log.write("bad_samples", step=self.step, samples={str(index): error for index, error in new.items()})

    def end(self) -> None:
        """Complete the result and write the last line of the log."""
        result = self.result
        result.steps, result.seconds, result.skipped = self.step, self.clock.seconds, self.skips.count
        result.cpu_seconds = self.clock.cpu_seconds
        result.samples_per_second = self.step * self.config.batch_size / max(result.seconds, 1e-9)
        self.log.write(
            "end",
            reason=result.stopped,
            step=result.steps,
            seconds=result.seconds,
            cpu_seconds=result.cpu_seconds,
            eval_seconds=result.eval_seconds,
            samples_per_second=result.samples_per_second,
            skipped=result.skipped,
            bad_samples=len(result.bad_samples),
            best=result.best.to_dict() if result.best else None,
        )
        text = f"{result.steps} steps in {result.seconds:.0f} s, {result.samples_per_second:.0f} samples/s"
        text += f", {result.skipped} steps skipped" if result.skipped else ""
        text += f", {len(result.bad_samples)} samples replaced" if result.bad_samples else ""
        self.bar.print(text)

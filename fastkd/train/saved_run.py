"""The part of a run that checkpoints save and restore."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from fastkd.distill.distiller import Distiller
from fastkd.errors import Terminated
from fastkd.train.average import Average
from fastkd.train.checkpoint import Checkpoint, CheckpointWriter, save_student
from fastkd.train.clock import Clock
from fastkd.train.config import TrainConfig
from fastkd.train.log import Progress, RunLog, environment
from fastkd.train.result import TrainResult
from fastkd.train.resume import evaluation_from_json, evaluation_to_json
from fastkd.train.skips import Skips
from fastkd.train.state import ModelState, copy_tensors, load_optimizer, optimizer_state
from fastkd.train.step_values import StepValues
from fastkd.train.stop import Termination
from fastkd.train.timing import StepTimer
from fastkd.train.update import Updater


class SavedRun:
    """State of a run after a number of steps; the caller sets the attributes without a value here."""

    title: str
    log: RunLog
    bar: Progress
    stop: Termination
    checkpoints: CheckpointWriter

    def __init__(
        self, distiller: Distiller, config: TrainConfig, processes: PartialState, device: torch.device
    ) -> None:
        self.distiller, self.config, self.processes, self.device = distiller, config, processes, device
        self.values = StepValues(["loss", "task", *distiller.terms, "gradient"], list(distiller.terms))
        self.timer = StepTimer(device)
        self.timed = (0, 0.0)  # step and seconds when the timer was last read
        self.result = TrainResult()
        self.clock = Clock(device)
        self.skips = Skips()
        self.step = 0
        self.reported = 0  # step of the latest line of the log
        self.lr = self.fraction = 0.0  # of the latest step
        self.updating = False  # weights and optimiser are between two steps
        self.settings: dict[str, Any] = {}
        self.changed: dict[str, tuple[Any, Any]] = {}  # settings that differ from those of the run that is resumed
        self.resumed: Checkpoint | None = None
        self.lines: list[dict[str, Any]] = []  # of the log until the resumed step
        self.model: ModelState | None = None  # once training has begun
        self.average: Average | None = None
        self.updater: Updater

    def resume(self, checkpoint: Checkpoint, lines: list[dict[str, Any]]) -> None:
        """Continue after the step of a checkpoint; ``lines`` are those of the log until then."""
        state = checkpoint.state
        self.resumed, self.step, self.lines = checkpoint, checkpoint.step, lines
        self.clock = Clock(self.device, state["seconds"], state.get("cpu_seconds", 0.0))
        self.timed = (self.step, state["seconds"])
        if state.get("window_names", list(self.values.names)) == list(self.values.names):  # the terms may differ
            self.values.window = state["window"]
        self.skips.load(state["skips"])
        self.reported, self.lr, self.fraction = state["reported"], state["lr"], state["fraction"]
        self.result.history = [
            {key: value for key, value in line.items() if key != "event"}
            for line in lines
            if line.get("event") == "train"
        ]
        self.result.evaluations = [evaluation_from_json(values) for values in state["evaluations"]]
        self.result.eval_seconds, self.result.resumed_at = state["eval_seconds"], self.step
        self.result.bad_samples = {int(index): error for index, error in state["bad_samples"].items()}

    def prepare(self, precision: str) -> ModelState:
        """Make optimiser and average of a distiller on its device, and restore all from the resumed checkpoint."""
        model = ModelState(self.distiller)
        if self.resumed is not None:
            model.load(self.resumed.tensors)
        self.updater = Updater(self.distiller, self.config, self.device, precision)
        if self.config.ema is not None:
            self.average = Average(self.distiller.student, self.config.ema, self.stop)
        if self.resumed is not None:
            load_optimizer(self.updater.optimizer, self.resumed.optimizer)
            if self.updater.scaler.is_enabled() and self.resumed.state["scaler"]:
                self.updater.scaler.load_state_dict(self.resumed.state["scaler"])
            if self.average is not None and "average" in self.resumed.tensors:
                copy_tensors(self.resumed.tensors["average"], self.average.tensors, "average")
        return model

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the student has its averaged parameters, if there are any."""
        return nullcontext() if self.average is None else self.average.applied()

    def record(self) -> dict[str, Any]:
        """Return what a model's folder states about its run: settings without local folders, and the step's scores."""
        local = {key for key, value in self.settings.items() if isinstance(value, str) and os.path.isabs(value)}
        scores = dict(self.result.evaluations).get(self.step)
        return {
            "title": self.title,
            "step": self.step,
            "settings": {key: Path(v).name if key in local else v for key, v in self.settings.items()},
            "evaluation": None if scores is None else scores.to_dict(),
            "environment": environment(self.device),
        }

    def save(self) -> None:
        """Write a checkpoint of the state after the latest step; the caller has read all values."""
        writer = self.checkpoints
        if not self.processes.is_main_process or writer.folder is None or self.step in (0, writer.latest):
            return
        assert self.model is not None
        average = {} if self.average is None else {"average": self.average.tensors}
        state = {
            "seconds": self.clock.seconds,
            "cpu_seconds": self.clock.cpu_seconds,
            "eval_seconds": self.result.eval_seconds,
            "lr": self.lr,
            "fraction": self.fraction,
            "reported": self.reported,
            "window": self.values.window,
            "window_names": list(self.values.names),
            "skips": self.skips.to_json(),
            "scaler": self.updater.scaler.state_dict(),
            "bad_samples": self.result.bad_samples,
            "evaluations": [evaluation_to_json(step, result) for step, result in self.result.evaluations],
            "settings": self.settings,
        }
        optimizer = optimizer_state(self.updater.optimizer)
        checkpoint = Checkpoint(self.step, {**self.model.consistent(), **average}, optimizer, state)
        best = max(self.result.evaluations, key=lambda each: each[1].miou, default=(None, None))[0]
        start = time.perf_counter()
        failure = writer.write(checkpoint, best)
        written = {"save_seconds": time.perf_counter() - start} if failure is None else {"error": failure}
        self.log.write("checkpoint", step=self.step, **written)

    def save_early(self, error: BaseException) -> None:
        """Save what is consistent when an error ends the run; after a signal also the student."""
        folder = self.result.out_dir
        if not folder or not self.step or self.model is None:
            return
        if self.updating:
            self.bar.print(f"the update of step {self.step + 1} was not completed, so its state is not saved")
        else:
            self.save()
            if isinstance(error, KeyboardInterrupt | Terminated):
                with self.averaged():
                    save_student(self.distiller.student, folder / "last", self.record())
                self.bar.print(f"interrupted at step {self.step}; the student is in {folder / 'last'}")
        if self.checkpoints.latest is not None:
            self.bar.print(f"resume=True (--resume) continues after step {self.checkpoints.latest}")

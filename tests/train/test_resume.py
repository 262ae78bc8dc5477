"""Runs that are interrupted and resumed end like uninterrupted ones."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="needs the [ris] extra")

from safetensors.torch import load_file
from train_tools import Acts, Scenes, collate, distiller, failing, read_log, run, toy, two_processes

from fastkd import Distiller, Term, losses
from fastkd.distill import Schedule
from fastkd.errors import Terminated
from fastkd.train import TrainConfig, segmentation_loss, train
from fastkd.train.checkpoint import find_checkpoints, latest_checkpoint, read_checkpoint
from fastkd.train.feed import Feed
from fastkd.train.optim import BatchOrder
from fastkd.train.resume import check_settings
from fastkd.train.samples import TrainingSamples
from fastkd.train.state import ModelState

ROOT = Path(__file__).resolve().parents[2]
TIMES = (
    "seconds",
    "cpu_seconds",
    "samples_per_second",
    "eval_seconds",
    "milliseconds",
    "data_share",
    "peak_memory_mib",
)


class Noisy(Scenes):
    """Images with noise from the generators of torch, numpy and Python."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = super().__getitem__(i)
        shift = random.gauss(0, 0.1) + np.random.normal(0, 0.1)  # noqa: NPY002
        return {**sample, "image": sample["image"] + 0.1 * torch.randn(3, 8, 8) + shift}


def terminate(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


class Centred(nn.Module):
    """Loss of features around a running mean, which every forward replaces in place of changing it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(1))

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        loss = (student - teacher + self.centre).square().mean()
        self.centre = 0.9 * self.centre + 0.1 * student.detach().mean()
        return loss


def stateful(task_loss: Any = segmentation_loss) -> Distiller:
    """Return a distiller with dropout, running statistics, re-assigned ones, an aligner and a schedule."""
    teacher = toy(100, width=8).eval().requires_grad_(False)
    student = toy(dropout=0.3)
    student.norm = nn.BatchNorm2d(4)
    torch.manual_seed(1)
    aligned, schedule = losses.ChannelKD(student_channels=2, teacher_channels=2), Schedule("cosine", stop=10, final=0.1)
    term = Term(aligned, lambda logits: logits, weight=0.5, name="kd", schedule=schedule)
    centred = Term(Centred(), lambda logits: logits, weight=0.1, name="centred")
    return Distiller(student, teacher, task_loss, [term, centred])


SETTINGS: dict[str, Any] = {"steps": 11, "log_every": 4, "eval_every": 4, "ema": 0.9, "check": False}


def finished(folder: Path, model: Distiller, **settings: Any) -> Any:
    return run(model, Noisy(), folder, val_dataset=Scenes(8), **{**SETTINGS, **settings})


def content(folder: Path) -> tuple[Any, ...]:
    """Return the tensors of the latest checkpoint, and the log without times."""
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None
    checkpoint = read_checkpoint(path)
    tensors = {f"{part} {n}": t for part, named in checkpoint.tensors.items() for n, t in named.items()}
    tensors |= {f"{i} {n}": t for i, state in checkpoint.optimizer["state"].items() for n, t in state.items()}
    log = [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in read_log(folder)
        if line["event"] in ("train", "eval")
    ]
    return checkpoint.step, {name: t.numpy().tobytes() for name, t in tensors.items()}, log


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    finished(folder, stateful())
    return folder


class TestContinuation:
    @pytest.mark.parametrize(
        ("error", "workers"),
        [(KeyboardInterrupt(), 2), (ValueError("a bug"), 0), (torch.OutOfMemoryError("CUDA out of memory"), 0)],
        ids=["interrupt", "exception", "out of memory"],
    )
    def test_bit_identical_after_an_error_inside_a_step(
        self, error: BaseException, workers: int, whole: Path, tmp_path: Path
    ) -> None:
        """Dropout and running statistics have advanced when the error is raised, in step 7 of 4 per epoch."""
        with pytest.raises(type(error)):
            finished(tmp_path, stateful(Acts(7, failing(error))), workers=workers)
        assert list(find_checkpoints(tmp_path / "checkpoints")) == [6]
        model = stateful()
        result = finished(tmp_path, model, workers=workers, resume=True)
        assert (result.resumed_at, result.steps) == (6, 11)
        assert content(tmp_path) == content(whole)
        assert [line["step"] for line in result.history] == [4, 8, 11]
        assert [step for step, _ in result.evaluations] == [4, 8, 11]
        events = [line["event"] for line in read_log(tmp_path)]
        assert events.count("start") == events.count("resume") == 1
        assert events[-1] == "end"
        [resumed] = [line for line in read_log(tmp_path) if line["event"] == "resume"]
        assert (resumed["step"], resumed["changed"]) == (6, {})

    def test_an_interrupted_evaluation_is_repeated(self, whole: Path, tmp_path: Path) -> None:
        class Interrupts(Scenes):
            def __getitem__(self, i: int) -> dict[str, Any]:
                if len(self.served) == 12:  # in the second evaluation, at step 8
                    raise KeyboardInterrupt
                return super().__getitem__(i)

        with pytest.raises(KeyboardInterrupt):
            run(stateful(), Noisy(), tmp_path, val_dataset=Interrupts(8), **SETTINGS)
        finished(tmp_path, stateful(), resume=True)
        assert content(tmp_path) == content(whole)

    def test_several_checkpoints_and_a_finished_run(self, whole: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="a bug"):
            finished(tmp_path, stateful(Acts(10, failing(ValueError("a bug")))), checkpoint_every=3, keep_checkpoints=4)
        for number in (9, 6):  # as after SIGKILL in step 5; the log is ahead
            (tmp_path / "checkpoints" / f"step-{number:06d}").rename(tmp_path / f"later-{number}")
        with (tmp_path / "log.jsonl").open("a") as log:
            log.write('{"event": "train", "st')
        with pytest.raises(FileExistsError, match=r"out_dir .* holds an earlier run.*resume=True"):
            finished(tmp_path, stateful())
        (tmp_path / "later-6").rename(tmp_path / "checkpoints" / "step-000006")
        finished(tmp_path, stateful(), checkpoint_every=3, resume=True)
        assert content(tmp_path) == content(whole)
        before = (tmp_path / "last" / "model.safetensors").read_bytes()
        again = finished(tmp_path, stateful(), resume=True)
        assert (again.resumed_at, again.steps, len(again.evaluations)) == (11, 11, 3)
        assert (tmp_path / "last" / "model.safetensors").read_bytes() == before

    def test_re_assigned_buffers_are_kept(self) -> None:
        model = distiller(loss=Centred())
        batch = collate([Scenes()[n] for n in range(8)])
        centre = model.term_modules["kd"].centre
        model.check(batch)
        assert model.term_modules["kd"].centre is centre
        assert not centre.any()
        state = ModelState(model)
        model(batch)
        state.keep_buffers()
        kept = model.term_modules["kd"].centre.clone()
        assert state.consistent()["aligners"]["term_modules.kd.centre"].equal(kept)
        for where in (None, torch.tensor(True), torch.tensor(False)):
            model(batch)
            changed = model.term_modules["kd"].centre.clone()
            assert not changed.equal(kept)
            state.restore_buffers(where)  # as of a step that is skipped
            assert model.term_modules["kd"].centre.equal(changed if where is not None and not where else kept)
        model.term_modules["kd"].centre = torch.zeros(2)  # also of another shape
        state.restore_buffers()
        assert model.term_modules["kd"].centre.equal(kept)
        model.term_modules["kd"].centre = torch.ones(2)
        state.keep_buffers()
        assert state.consistent()["aligners"]["term_modules.kd.centre"].equal(torch.ones(2))

    def test_terms_may_change_within_a_line_of_the_log(self, tmp_path: Path) -> None:
        settings = {"steps": 8, "checkpoint_every": 6, "log_every": 4, "check": False}
        run(distiller(), out=tmp_path, **settings)
        shutil.rmtree(tmp_path / "checkpoints" / "step-000008")
        model = distiller()
        other = Term(losses.logit_kd, lambda logits: logits, weight=0.1, name="other")
        model = Distiller(model.student, model.teacher, segmentation_loss, [*model.terms.values(), other])
        result = run(model, out=tmp_path, resume=True, resume_allow=["terms", "weights"], **settings)
        assert (result.resumed_at, set(result.history[-1]["terms"])) == (6, {"kd", "other"})

    def test_time_limit_continues(self, tmp_path: Path) -> None:
        limit = {"steps": 10_000, "max_seconds": 0.6, "check": False}
        with pytest.raises(KeyboardInterrupt):
            run(toy(), out=tmp_path, task_loss=Acts(20, failing(KeyboardInterrupt())), **limit)
        [path] = find_checkpoints(tmp_path / "checkpoints").values()
        state = json.loads((path / "state.json").read_text())
        state["seconds"] = 0.5
        (path / "state.json").write_text(json.dumps(state))
        result = run(toy(), out=tmp_path, resume=True, **limit)
        assert 0.6 <= result.seconds < 5
        assert result.stopped == "max_seconds"

    def test_average_is_evaluated_saved_and_kept(self, tmp_path: Path) -> None:
        model, plain = distiller(), distiller()
        first = plain.student.stem.weight.detach().clone()
        averaged = run(model, out=tmp_path, steps=1, ema=0.5)
        assert averaged.history == [
            line | {name: s[name] for name in TIMES if name in s}
            for line, s in zip(run(plain, steps=1).history, averaged.history, strict=True)
        ]
        last = plain.student.stem.weight
        torch.testing.assert_close(model.student.stem.weight, first + (1 - 2 / 11) * (last - first))
        tensors = read_checkpoint(tmp_path / "checkpoints" / "step-000001").tensors
        assert torch.equal(tensors["average"]["stem.weight"], model.student.stem.weight)
        assert torch.equal(tensors["student"]["stem.weight"], last)
        saved = load_file(tmp_path / "last" / "model.safetensors")["stem.weight"]
        assert torch.equal(saved, model.student.stem.weight)

    def test_wrapped_student_and_channels_last(self, tmp_path: Path) -> None:
        """Checkpoints have the model's own names and do not depend on the memory format."""
        options: dict[str, Any] = {"power": 0.0, "check": False}
        whole = toy()
        run(whole, steps=4, **options)
        run(torch.compile(toy(), backend="eager"), out=tmp_path, steps=2, channels_last=True, **options)
        assert "stem.weight" in read_checkpoint(tmp_path / "checkpoints" / "step-000002").tensors["student"]
        model = toy()
        run(model, out=tmp_path, steps=4, resume=True, resume_allow=["steps", "channels_last"], **options)
        for ours, expected in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


class TestSignals:
    @pytest.fixture(autouse=True)
    def default_handler(self) -> Iterator[None]:
        """Handle SIGINT as usual, also where a shell started the tests in the background, which ignores it."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    def test_update_and_save_are_completed(self, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A signal inside the optimiser's update and a second one inside the save leave a whole state."""
        step, sync = torch.optim.AdamW.step, os.fsync
        calls: list[int] = []

        def signalled_step(self: Any, *args: Any) -> None:
            calls.append(0)
            if len(calls) == 3:
                terminate(number)
            step(self, *args)

        def signalled_sync(descriptor: int) -> None:
            terminate(number)
            sync(descriptor)

        monkeypatch.setattr(torch.optim.AdamW, "step", signalled_step)
        monkeypatch.setattr(os, "fsync", signalled_sync)
        expected = KeyboardInterrupt if number == signal.SIGINT else Terminated
        with pytest.raises(expected) as stop:
            run(toy(), out=tmp_path)
        assert number == signal.SIGINT or stop.value.code == 128 + number
        assert read_log(tmp_path)[-1]["message"] == ("" if number == signal.SIGINT else signal.Signals(number).name)
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        [path] = find_checkpoints(tmp_path / "checkpoints").values()
        other = toy()
        run(other, steps=3, power=0.0)
        run(toy(), out=tmp_path / "three", steps=3)
        saved = read_checkpoint(path)
        assert saved.step == 3
        assert {float(state["step"]) for state in saved.optimizer["state"].values()} == {3.0}

    def test_signal_during_a_periodic_save_keeps_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sync, calls = os.fsync, []

        def signalled(descriptor: int) -> None:
            calls.append(0)
            if len(calls) == 2:
                terminate()
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", signalled)
        with pytest.raises(Terminated):
            run(toy(), out=tmp_path, checkpoint_every=2)
        assert [line["step"] for line in read_log(tmp_path) if line["event"] == "checkpoint"] == [2]
        assert list(find_checkpoints(tmp_path / "checkpoints")) == [2]

    def test_swallowed_signal_ends_the_run_at_the_next_step(self, tmp_path: Path) -> None:
        def swallowed() -> None:
            try:
                terminate()
            except SystemExit:
                return

        with pytest.raises(Terminated):
            run(toy(), out=tmp_path, task_loss=Acts(3, swallowed), check=False)
        assert read_log(tmp_path)[-1]["step"] == 3

    def test_failed_update_is_not_saved(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        step, calls = torch.optim.AdamW.step, []

        def fails(self: Any, *args: Any) -> None:
            step(self, *args)
            calls.append(0)
            if len(calls) == 5:
                raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(torch.optim.AdamW, "step", fails)
        with pytest.raises(torch.OutOfMemoryError):
            run(toy(), out=tmp_path, checkpoint_every=3)
        assert list(find_checkpoints(tmp_path / "checkpoints")) == [3]


class TestSettings:
    def test_differences_are_refused_unless_allowed(self, tmp_path: Path) -> None:
        run(distiller(), out=tmp_path, steps=4)
        before = (tmp_path / "log.jsonl").read_text()
        changed = distiller()
        changed.set_weights({"kd": 0.25})
        with pytest.raises(ValueError, match=r"other settings \(steps: 4 → 8, lr: 0.01 → 0.02, weights.kd: 0.5 → 0.25"):
            run(changed, out=tmp_path, steps=8, lr=0.02, resume=True)
        with pytest.raises(ValueError, match=r"no setting is named 'step'. Did you mean 'steps'"):
            run(changed, out=tmp_path, steps=8, resume=True, resume_allow=["step"])
        other = distiller(width=6)
        with pytest.raises(
            ValueError, match=r"checkpoint's student does not fit the model: student.head.weight \(2, 4"
        ):
            run(other, out=tmp_path, steps=4, resume=True)
        other = distiller()
        next(other.teacher.parameters()).data.add_(1)
        with pytest.raises(ValueError, match=r"teacher: 'Toy \w{8}' → 'Toy \w{8}'"):
            run(other, out=tmp_path, steps=4, resume=True)
        other = distiller()
        other.student.stem.bias.requires_grad_(False)
        with pytest.raises(ValueError, match=r"optimiser trained other parameters than this run: student.stem.bias"):
            run(other, out=tmp_path, steps=4, resume=True)
        kept, ends = before.splitlines(), [line for line in read_log(tmp_path) if line["event"] == "end"]
        assert (tmp_path / "log.jsonl").read_text().splitlines()[: len(kept)] == kept
        assert [line["reason"] for line in ends] == ["steps", "ValueError", "ValueError"]
        allowed = ["steps", "lr", "weights"]
        result = run(changed, out=tmp_path, steps=8, lr=0.02, resume=True, resume_allow=allowed, workers=1)
        assert (result.resumed_at, result.steps) == (4, 8)
        [line] = [line for line in read_log(tmp_path) if line["event"] == "resume"]
        assert line["changed"] == {"steps": [4, 8], "lr": [0.01, 0.02], "weights.kd": [0.5, 0.25]}
        assert result.history[-1]["lr"] == pytest.approx(0.02 * (1 / 8) ** 0.9)

    def test_number_of_processes_and_further_settings_count(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"processes: 1 → 2.*--resume-allow processes"):
            check_settings({"processes": 1}, {"processes": 2}, [])
        options: dict[str, Any] = {"collate": collate, "progress": False, "out_dir": tmp_path}
        config = TrainConfig(steps=1, batch_size=8, device="cpu")
        train(toy(), Scenes(), config, settings={"data": Path("a")}, **options)
        with pytest.raises(ValueError, match=r"\(data: 'a' → 'b'\)"):
            train(toy(), Scenes(), config, settings={"data": Path("b")}, resume=True, **options)

    def test_folders(self, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "notes.txt").touch()
        with pytest.raises(FileExistsError, match=r"other' is not a run: it has neither log\.jsonl nor checkpoints/"):
            run(toy(), out=tmp_path / "other", resume=True)
        with pytest.raises(ValueError, match="resume needs out_dir"):
            run(toy(), resume=True)
        with pytest.raises(ValueError, match="contradicts overwrite=True"):
            run(toy(), out=tmp_path, resume=True, overwrite=True)
        result = run(toy(), out=tmp_path / "new", resume=True)
        assert (result.resumed_at, result.steps) == (None, 6)

    def test_says_where_it_starts(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options: dict[str, Any] = {"collate": collate, "out_dir": tmp_path, "resume": True}
        for message in ("no checkpoint in .*: starts afresh", "resumes after step 1"):
            train(toy(), Scenes(), TrainConfig(steps=1, batch_size=8, device="cpu"), **options)
            assert re.search(message, capsys.readouterr().err)


class TestData:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_position_follows_from_the_step(self, workers: int) -> None:
        config = TrainConfig(batch_size=8, accumulate=2, workers=workers)
        feed = lambda: Feed(Noisy(44), BatchOrder(44, config), config, collate, distiller(), torch.device("cpu"))
        batches = feed().start(0)
        every = [next(batches) for _ in range(2 * 14)]
        for step in (3, 5, 11):  # 5 steps per epoch
            resumed = feed()
            batches = resumed.start(step)
            for expected in every[2 * step : 2 * step + 4]:
                found = next(batches)
                assert found["ref_id"] == expected["ref_id"]
                assert torch.equal(found["image"], expected["image"])
            again = resumed.reload(1, 1)  # of an earlier epoch
            assert torch.equal(again["image"], every[3]["image"])

    def test_samples_depend_on_seed_epoch_and_index_only(self) -> None:
        samples = TrainingSamples(Noisy(), 3)
        states = torch.get_rng_state(), random.getstate()
        first = samples[5]["image"]
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == random.getstate()
        assert torch.equal(samples.__getitems__([9, 5])[1]["image"], first)
        samples.epoch = 1
        assert not torch.equal(samples[5]["image"], first)
        assert not torch.equal(TrainingSamples(Noisy(), 4)[5]["image"], first)


def test_two_processes_resume(tmp_path: Path) -> None:
    """With several processes each draws its own dropout; a resumed run repeats it."""
    out = two_processes(f"""
    root = Path({str(tmp_path)!r})
    model = lambda act=None: t.toy(dropout=0.5)
    t.run(model(), t.Scenes(), root / "whole", steps=6)
    fails = t.Acts(5, t.failing(ValueError("a bug")))  # call 1 looks for parameters without a gradient
    try:
        t.run(model(), t.Scenes(), root / "parts", steps=6, task_loss=fails, check=False)
    except ValueError:
        pass
    r = t.run(model(), t.Scenes(), root / "parts", steps=6, resume=True, check=False)
    os.write(1, f"{{rank}} {{r.resumed_at}} {{r.steps}};".encode())
    try:
        t.run(model(), t.Scenes(), root / "parts", steps=7, resume=True)
    except ValueError as error:
        os.write(1, f"{{rank}} {{error}};".encode())
""")
    for rank in "01":
        assert f"{rank} 3 6;" in out
        assert f"{rank} the run to resume has other settings (steps: 6 → 7)" in out
    assert content(tmp_path / "parts")[1] == content(tmp_path / "whole")[1]
    state = json.loads((tmp_path / "parts" / "checkpoints" / "step-000006" / "state.json").read_text())
    assert state["settings"]["processes"] == 2


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL, also inside a save; 20 kills are in benchmarks/results/kill_and_resume.jsonl."""
    command = [sys.executable, "-m", "benchmarks.kill_and_resume", "--kills", "3", "--steps", "30", "--workers", "1"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"inside_a_save": true' in done.stdout

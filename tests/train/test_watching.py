"""The log of a run, what trackers read from it, and the record in the folder of its model."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("accelerate", reason="needs the [ris] extra")

from accelerate import tracking
from train_tools import Scenes, collate, distiller, read_log, run, same, toy

from fastkd.distill import Schedule
from fastkd.distill.gradients import report_gradients
from fastkd.errors import FastKDWarning
from fastkd.train import TrainConfig, train
from fastkd.train.log import Progress
from fastkd.train.step_values import StepValues
from fastkd.train.timing import PARTS, StepTimer


class Recorder(tracking.GeneralTracker):
    """Tracker that records what it gets."""

    name = "recorder"
    requires_logging_directory = False
    runs: list[Recorder]

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.project, self.options = project, options
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.settings: dict[str, Any] | None = None
        self.finished = self.fails = False

    @property
    def tracker(self) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="from the server"))

    def start(self) -> None:
        self.runs.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        assert step is not None
        self.lines.append((step, values))
        if os.environ.get("RECORDER_FAILS"):
            raise ConnectionError("no route")

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Register the recorder under its name and in place of trackers that are not installed; return what starts."""
    started: list[Recorder] = []
    monkeypatch.setattr(Recorder, "runs", started, raising=False)
    for name in ("recorder", "wandb", "trackio", "mlflow"):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Recorder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: object())
    return started


class TestLog:
    def test_weighted_terms_are_means_over_steps(self) -> None:
        values = StepValues(["loss", "kd", "gradient"], ["kd"])
        for weight, value in ((0.5, 2.0), (1.5, 4.0)):  # as with a schedule
            values.add(torch.tensor([1.0, value, 0.0]), torch.tensor(False), weights=[weight])
        values.add(torch.tensor([1.0, 9.0, 0.0]), torch.tensor(True), weights=[1.0])
        [skipped] = values.read(3)
        assert skipped == (3, {"loss": 1.0, "kd": 9.0, "gradient": 0.0})
        assert values.mean().tolist() == [1.0, 3.0, 0.0, (0.5 * 2 + 1.5 * 4) / 2]

    def test_weights_follow_schedules(self) -> None:
        model = distiller()
        model.terms["kd"] = replace(model.terms["kd"], schedule=Schedule("linear", stop=4))
        lines = run(model, steps=4, log_every=1, check=False).history
        for step, line in enumerate(lines):
            weight = model.weights_at(step)["kd"]
            assert line["weighted"]["kd"] == pytest.approx(weight * line["terms"]["kd"])
            assert line["loss"] == pytest.approx(line["task"] + line["weighted"]["kd"])

    def test_lines_state_weighted_terms_times_and_memory(self, tmp_path: Path) -> None:
        class Slow(Scenes):
            def __getitem__(self, i: int) -> dict[str, Any]:
                time.sleep(0.002)
                return super().__getitem__(i)

        def slow_loss(student: Any, teacher: Any) -> Any:
            time.sleep(0.01)
            return F.mse_loss(student, teacher)

        run(distiller(loss=slow_loss), Slow(), tmp_path, log_every=2, accumulate=2)
        for line in (line for line in read_log(tmp_path) if line["event"] == "train"):
            assert line["weighted"]["kd"] == pytest.approx(0.5 * line["terms"]["kd"], rel=1e-6)
            parts = line["milliseconds"]
            assert list(parts) == list(PARTS)
            assert parts["losses"] > 2 * 10  # two micro-batches
            if line["step"] > 2:  # the first batch was loaded before
                assert parts["data"] > 8 * 2
            assert all(value > 0 for value in parts.values())
            assert 0 < line["data_share"] < 1
            assert line["peak_memory_mib"] > 50
        lines = [line for line in read_log(tmp_path) if line["event"] == "train"]
        last = (lines[-1]["seconds"] - lines[-2]["seconds"]) / 2
        assert sum(lines[-1]["milliseconds"].values()) / 1000 == pytest.approx(last, rel=0.3)
        assert lines[-1]["data_share"] == pytest.approx(lines[-1]["milliseconds"]["data"] / 1000 / last, rel=0.01)

    def test_gpu_times_come_from_events_that_are_complete(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Event:
            made = 0
            complete = 2

            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: str) -> None:
                assert stream == "stream of cuda:1"
                Event.made += 1
                self.number = Event.made

            def query(self) -> bool:
                return self.number <= Event.complete

            def elapsed_time(self, other: Event) -> float:
                return 5.0 * (other.number - self.number)

            def synchronize(self) -> None:
                raise AssertionError

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
        timer = StepTimer(torch.device("cuda:1"))
        for part in ("teacher", "losses", "data"):
            with timer.part(part):
                pass
        seconds = timer.read()
        assert seconds["teacher"] == 0.005
        assert seconds["losses"] == 0  # not complete
        assert 0 < seconds["data"] < 1  # the host's time
        assert timer.read()["teacher"] == 0
        Event.complete = 10**9
        for _ in range(1000):
            with timer.part("teacher"):
                pass
        assert len(timer._pending) < 300  # between two lines of the log
        assert timer.read()["teacher"] == pytest.approx(5.0)

    def test_gradient_norms_per_term_change_nothing(self, tmp_path: Path) -> None:
        plain, watched = distiller(dropout=0.5), distiller(dropout=0.5)
        run(plain, accumulate=2, log_every=1)
        result = run(watched, out=tmp_path, accumulate=1, log_every=1, gradients_every=2, grad_clip=None)
        lines = [line for line in read_log(tmp_path) if line["event"] == "gradients"]
        assert [line["step"] for line in lines] == [2, 4, 6]
        assert lines[0]["shares"]["kd"] == pytest.approx(0.5 * lines[0]["norms"]["kd"] / lines[0]["norms"]["task"])
        total = result.history[1]["gradient_norm"]
        low, high = (abs(lines[0]["norms"]["task"] + sign * 0.5 * lines[0]["norms"]["kd"]) for sign in (-1, 1))
        assert low <= total <= high
        again = distiller(dropout=0.5)
        run(again, log_every=1, grad_clip=None)
        assert same(watched.student, again.student)

    def test_gradient_norms_undo_the_loss_scale(self) -> None:
        weight = torch.nn.Parameter(torch.ones(1000))
        small = weight.half().float().mean() * 1e-6  # its gradient in fp16, 1e-9, is 0
        large = weight.half().float().mean() * 1e6  # overflows unless its weight is a factor too
        losses = {"task": small, "kd": large}
        report = report_gradients(losses, [("weight", weight)], {"kd": 1e-6}, scale=2.0**16)
        assert report.norms == pytest.approx({"task": 1e-9 * 1000**0.5, "kd": 1e3 * 1000**0.5}, rel=1e-2)
        assert report_gradients(losses, [("weight", weight)], {"kd": 1e-6}).norms["task"] == 0


class TestTrackers:
    def test_get_the_numbers_and_settings(self, runs: list[Recorder], tmp_path: Path) -> None:
        every = {"log_every": 2, "eval_every": 3, "gradients_every": 6}
        run(distiller(), out=tmp_path, val_dataset=Scenes(9), tracker=("recorder", "wandb"), **every)
        assert len(runs) == 2
        assert runs[0].lines == runs[1].lines
        assert all(one.finished and one.project == "fastkd" for one in runs)
        kinds = [(step, next(iter(values)).partition("/")[0]) for step, values in runs[0].lines]
        assert kinds[:3] == [(2, "train"), (3, "eval"), (4, "train")]
        assert kinds[3:] == [(6, "gradients"), (6, "train"), (6, "eval")]
        log = {(line["event"], line.get("step")): line for line in read_log(tmp_path)}
        values = dict(runs[0].lines[2][1])
        assert values["train/loss"] == pytest.approx(log["train", 4]["loss"])
        assert values["train/weighted/kd"] == pytest.approx(log["train", 4]["weighted"]["kd"])
        assert values["train/milliseconds/teacher"] > 0
        assert "train/loss_scale" not in values  # None without fp16
        assert runs[0].lines[1][1]["eval/mIoU"] == log["eval", 3]["metrics"]["mIoU"]
        assert "eval/P_0.5" in runs[0].lines[1][1]
        assert runs[0].settings["weights.kd"] == 0.5
        assert all(isinstance(value, str | int | float | bool) for value in runs[0].settings.values())
        assert log["start", None]["trackers"].keys() == {"recorder", "wandb"}

    def test_a_resumed_run_continues_theirs(self, runs: list[Recorder], tmp_path: Path) -> None:
        names = ("wandb", "trackio", "mlflow")
        run(distiller(), out=tmp_path, steps=4, log_every=2, tracker=names)
        options = {"log_every": 2, "resume": True, "resume_allow": ["steps"]}
        run(distiller(), out=tmp_path, steps=8, tracker=(*names, "recorder"), **options)
        first, second = runs[:3], runs[3:]
        assert [[step for step, _ in one.lines] for one in (*first, *second)] == [[2, 4]] * 3 + [[6, 8]] * 4
        assert second[0].options == first[0].options
        assert second[0].options["resume"] == second[1].options["resume"] == "allow"
        assert second[0].options["dir"] == str(tmp_path)
        assert second[0].options["name"] == tmp_path.name
        assert second[1].options["name"] == first[1].options["name"]
        assert (first[2].options.get("run_id"), second[2].options["run_id"]) == (None, "from the server")
        assert [one.settings is None for one in second] == [True, True, True, False]  # stored by the first process
        run(distiller(), out=tmp_path, steps=10, tracker=("recorder", "mlflow"), **options)
        assert runs[-1].options["run_id"] == "from the server"
        assert runs[-2].settings is None  # known since it was added to the second process

    def test_a_tracker_that_fails_does_not_end_the_run(
        self, runs: list[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RECORDER_FAILS", "1")
        with pytest.warns(FastKDWarning, match=r"tracker 'recorder' failed \(ConnectionError: no route\)") as caught:
            assert run(toy(), out=tmp_path, log_every=1, tracker=("recorder",)).steps == 6
        assert len(caught) == 1
        assert len(runs[0].lines) == 6  # tried again with each line
        assert runs[0].finished
        assert [line["event"] for line in read_log(tmp_path)].count("train") == 6

    def test_an_error_at_the_start_ends_those_that_have_started(
        self, runs: list[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(self: Recorder) -> None:
            self.runs.append(self)
            if len(self.runs) == 2:
                raise ConnectionError("no login")

        monkeypatch.setattr(Recorder, "start", fails)
        with pytest.raises(ConnectionError, match="no login"):
            run(toy(), out=tmp_path, tracker=("wandb", "trackio"))
        assert [one.finished for one in runs] == [True, False]
        monkeypatch.undo()
        (tmp_path / "wandb").mkdir()  # what a tracker wrote before another one failed
        assert run(toy(), out=tmp_path, steps=1, resume=True).steps == 1

    @pytest.mark.parametrize("failing", ["fastkd.train.loop.RunLog", "fastkd.train.loop.synchronised_norms"])
    def test_trackers_end_if_the_run_cannot_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[Recorder], failing: str
    ) -> None:
        def full(*args: Any) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(failing, full)
        with pytest.raises(OSError, match="No space left"):
            run(toy(), out=tmp_path, tracker=("recorder",))
        assert [one.finished for one in runs] == [True]

    def test_one_error_for_a_name_package_or_folder_that_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ValueError, match=r"no tracker is named 'tensorbord'. Did you mean 'tensorboard'"):
            run(toy(), out=tmp_path / "a", tracker=("tensorbord",))
        monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
        for name in ("tensorboard", "wandb", "trackio", "mlflow"):
            message = f"tracker '{name}' needs the package '{name}', which is not installed: pip install {name}$"
            with pytest.raises(ImportError, match=message):
                run(toy(), out=tmp_path / "a", tracker=(name,))
        monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: object())
        with pytest.raises(ValueError, match=r"tracker 'tensorboard' writes files and needs out_dir"):
            run(toy(), tracker=("tensorboard",))
        with pytest.raises(ValueError, match=r"tracker must be a tuple of names, got the string 'wandb'"):
            TrainConfig(tracker="wandb")  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())

    def test_tensorboard(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        options = {"out": tmp_path, "log_every": 1, "tracker": ("tensorboard",)}
        run(distiller(), steps=4, **options)
        run(distiller(), steps=6, resume=True, resume_allow=["steps"], **options)
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
        logged = [line["loss"] for line in read_log(tmp_path) if line["event"] == "train"]
        assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)
        run(distiller(), out=tmp_path, steps=1, overwrite=True)
        assert not (tmp_path / "tensorboard").exists()


class TestProgress:
    def test_plain_lines_with_the_time_left(self, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
        bar = Progress(100, "run", True)
        later = time.monotonic() + 20
        monkeypatch.setattr("time.monotonic", lambda: later)
        bar.update(25, {"loss": 0.5}, 10.0, 0.25)
        assert capsys.readouterr().err == "run: step 25/100  10 s, 30 s left  loss 0.5\n"


class TestModelFolder:
    def test_holds_the_settings_of_the_run(self, tmp_path: Path) -> None:
        out = tmp_path / "run"
        config = TrainConfig(steps=2, batch_size=8, device="cpu", allow_untrained_teacher=True)
        options: dict[str, Any] = {"collate": collate, "progress": False, "title": "first"}
        chosen = {"data": str(tmp_path / "shapes"), "dataset": "refcoco"}
        result = train(distiller(), Scenes(), config, val_dataset=Scenes(9), out_dir=out, settings=chosen, **options)
        for name in ("last", "best"):
            record = json.loads((out / name / "training.json").read_text())
            assert (record["title"], record["step"]) == ("first", 2)
            assert record["settings"]["weights.kd"] == 0.5
            assert record["settings"]["data"] == "shapes"  # not a local folder
            assert record["evaluation"]["metrics"]["mIoU"] == pytest.approx(result.last.miou)
            assert record["environment"]["torch"] == torch.__version__

    def test_push_to_hub_uploads_a_complete_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("timm", reason="needs the [ris] extra")
        from fastkd.data import RefCOCO, ReferDataset, load_tokenizer, make_shapes
        from fastkd.evaluate import tokenizer_of
        from fastkd.models import RISModel, preset

        hub = tmp_path / "hub"

        class Api:
            """The hub's API on a local folder."""

            def __init__(self, token: str | None = None) -> None:
                """Accept any token."""

            def create_repo(self, repo_id: str, **options: Any) -> Any:
                (hub / repo_id).mkdir(parents=True)
                return SimpleNamespace(repo_id=repo_id)

            def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
                shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)
                return f"commit in {repo_id}"

        monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)

        def download(repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
            def ignored(folder: str, names: list[str]) -> set[str]:
                return {name for name in names if not any(fnmatch(name, pattern) for pattern in allow_patterns)}

            return shutil.copytree(hub / repo_id, tmp_path / "downloaded", ignore=ignored)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        monkeypatch.setattr(
            "huggingface_hub.hub_mixin.hf_hub_download",
            lambda repo_id, filename, **options: str(hub / repo_id / filename),
        )
        make_shapes(tmp_path / "shapes", images=16, image_size=64)
        pieces = load_tokenizer("shapes").pieces()
        (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
        data = ReferDataset(RefCOCO(tmp_path / "shapes"), load_tokenizer(tmp_path / "vocab.txt"), image_size=64)
        config = TrainConfig(steps=1, batch_size=2, device="cpu")
        torch.manual_seed(0)
        train(RISModel(preset("shapes-student")), data, config, out_dir=tmp_path / "run", progress=False)
        trained = RISModel.from_pretrained(tmp_path / "run" / "last")
        assert trained.push_to_hub("me/student") == "commit in me/student"
        names = {path.name for path in (hub / "me" / "student").iterdir()}
        assert {"config.json", "model.safetensors", "training.json", "README.md"} <= names
        assert {"tokenizer.json", "tokenizer_config.json"} <= names
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "vocab.txt").unlink()
        loaded = RISModel.from_pretrained("me/student")
        assert same(loaded, trained)
        assert tokenizer_of(loaded).pieces() == pieces
        assert loaded.config.image_mean == trained.config.image_mean is not None
        assert loaded.training_run["settings"]["steps"] == 1
        text = (hub / "me" / "student" / "config.json").read_text() + json.dumps(loaded.training_run)
        assert str(tmp_path) not in text

"""Values that are not finite, samples that cannot be read, and loading processes that crash."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

pytest.importorskip("accelerate", reason="needs the [ris] extra")

from train_tools import Scenes, distiller, read_log, run, same, toy, two_processes

from fastkd import Distiller
from fastkd.cli import main
from fastkd.errors import FastKDWarning
from fastkd.train import TrainConfig
from fastkd.train.checkpoint import latest_checkpoint, read_checkpoint
from fastkd.train.optim import BatchOrder
from fastkd.train.replay import not_finite, replay_batch
from fastkd.train.samples import TrainingSamples
from fastkd.train.update import Updater

CPU = torch.device("cpu")


def breaks_from(call: int, until: int = 10**9, but: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss that is infinite in some of its calls; the two in the check of the first batch count as call 1."""
    calls = []

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        calls.append(0)
        number = max(1, len(calls) - 1)
        return F.mse_loss(student, teacher) * (float("inf") if call <= number < until and number != but else 1.0)

    return loss


def normed(loss: Any = F.mse_loss) -> Distiller:
    """Return a distiller whose student has running statistics."""
    model = distiller(loss=loss)
    model.student.norm = nn.BatchNorm2d(4)
    return model


class TestNotFinite:
    @pytest.mark.parametrize("waits", [True, False])
    def test_step_is_skipped_and_counted(self, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The host decides on a CPU, the device on a GPU (here simulated on the CPU), with equal results."""
        if not waits:
            monkeypatch.setattr(Updater, "waits", property(lambda self: False, lambda *args: None), raising=False)
        third = BatchOrder(32, TrainConfig(batch_size=8)).indices(2)[0]
        model, data = normed(), Scenes(poison=third[0])
        with pytest.warns(
            FastKDWarning, match="step 3 is skipped: the task loss and term 'kd' is nan; after 10 in a r"
        ):
            result = run(model, data, tmp_path, steps=3, log_every=1, power=0.0)
        expected = normed()
        before = run(expected, steps=2, power=0.0, log_every=1)
        assert same(model.student, expected.student)  # with running statistics
        assert (result.steps, result.skipped) == (3, 1)
        [skip] = [line for line in read_log(tmp_path) if line["event"] == "skip"]
        assert (skip["step"], skip["samples"], skip["values"]["task"]) == (3, [third], None)
        assert [line["skipped"] for line in result.history] == [0, 0, 1]
        assert [line["loss"] for line in result.history[:2]] == [line["loss"] for line in before.history]
        path = latest_checkpoint(tmp_path / "checkpoints")
        assert path is not None
        saved = read_checkpoint(path)
        assert saved.step == 3
        assert {float(state["step"]) for state in saved.optimizer["state"].values()} == {2.0}

    def test_mean_in_the_log_omits_skipped_steps(self) -> None:
        with pytest.warns(FastKDWarning, match="step 2 is skipped"):
            result = run(distiller(loss=breaks_from(3, 4)), steps=4, log_every=4)
        assert result.skipped == result.history[0]["skipped"] == 1
        assert all(torch.isfinite(torch.tensor(value)) for value in result.history[0]["terms"].values())

    @pytest.mark.parametrize("waits", [True, False])
    def test_ten_in_a_row_stop_the_run(self, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if not waits:
            monkeypatch.setattr(Updater, "waits", property(lambda self: False, lambda *args: None), raising=False)
        model = distiller(loss=breaks_from(3), dropout=0.5)
        message = (
            r"10 steps in a row were skipped, the latest at step 11: term 'kd' is inf; samples \d+, .*\(ref_id \d+"
        )
        with pytest.warns(FastKDWarning, match="step 2 is"), pytest.raises(FloatingPointError, match=message) as stop:
            run(model, out=tmp_path, steps=40, log_every=20)
        file = tmp_path / "replay-step-000011.pt"
        assert f"--replay {file} computes it again" in str(stop.value)
        log = read_log(tmp_path)
        assert [line["step"] for line in log if line["event"] == "skip"] == list(range(2, 12))
        assert (log[-1]["event"], log[-1]["reason"]) == ("end", "FloatingPointError")
        assert all(torch.isfinite(p).all() for p in model.student.parameters())
        again = distiller(seed=5, loss=breaks_from(1), dropout=0.5)
        report = replay_batch(file, again, CPU)
        assert not_finite(report) == ["kd"]
        assert same(again.student, model.student)
        [skip] = [line for line in log if line["event"] == "skip" and line["step"] == 11]
        assert report.values["task"] == skip["values"]["task"]  # with the same dropout
        fine = replay_batch(file, distiller(seed=5, dropout=0.5), CPU)
        assert not_finite(fine) == []
        assert fine.values["task"] == report.values["task"]
        with pytest.raises(ValueError, match=r"checkpoint's student does not fit the model"):
            replay_batch(file, distiller(width=6), CPU)

    def test_a_finite_step_ends_the_row_and_a_resumed_run_has_ten_again(self, tmp_path: Path) -> None:
        with pytest.warns(FastKDWarning, match="step 2 is skipped"):
            assert run(distiller(loss=breaks_from(3, but=12)), steps=19).skipped == 17  # step 11 is finite
        with pytest.warns(FastKDWarning, match="is skipped"), pytest.raises(FloatingPointError, match="at step 11"):
            run(distiller(loss=breaks_from(3)), out=tmp_path, steps=24)
        result = run(distiller(loss=breaks_from(1, 9)), out=tmp_path, steps=24, resume=True)
        assert (result.resumed_at, result.steps, result.skipped) == (11, 24, 19)

    def test_gradient_is_traced_to_its_term(self) -> None:
        calls = []

        def cliff(student: Tensor, teacher: Tensor) -> Tensor:
            calls.append(0)
            if len(calls) >= 4:
                return (student - student.detach()).abs().sqrt().sum() + 1  # finite, with an infinite slope
            return F.mse_loss(student, teacher)

        message = r"at step 11: the gradient is nan while every loss is finite; it comes from 'kd'; samples"
        with pytest.warns(FastKDWarning, match="step 2 is"), pytest.raises(FloatingPointError, match=message):
            run(distiller(loss=cliff), steps=20)


class TestHalfPrecision:
    def test_loss_is_scaled_and_the_scale_continues(self, tmp_path: Path) -> None:
        whole, parts, fp16 = distiller(), distiller(), {"precision": "fp16", "power": 0.0}
        result = run(whole, out=tmp_path / "whole", log_every=1, **fp16)
        [first, *_] = run(distiller(), steps=1).history
        assert result.history[0]["loss"] == pytest.approx(first["loss"], rel=1e-2)
        assert result.history[0]["loss"] != first["loss"]
        assert result.history[0]["loss_scale"] >= result.history[-1]["loss_scale"] > 1
        with pytest.raises(ValueError, match="precision: 'fp16' → 'fp32'"):
            run(parts, out=tmp_path / "whole", power=0.0, resume=True)
        run(parts, out=tmp_path / "parts", steps=3, **fp16)
        again = distiller()
        run(again, out=tmp_path / "parts", resume=True, resume_allow=["steps"], **fp16)
        assert same(again.student, whole.student)
        assert not same(again.student, parts.student)
        scalers = [
            read_checkpoint(tmp_path / name / "checkpoints" / "step-000006").state["scaler"]
            for name in ("whole", "parts")
        ]
        assert scalers[0] == scalers[1]
        assert scalers[0]["scale"] == result.history[-1]["loss_scale"]

    def test_overflow_lowers_the_scale_and_is_not_counted(self) -> None:
        large = lambda student, teacher: 1e3 * F.mse_loss(student, teacher)
        result = run(distiller(loss=large), precision="fp16", steps=12, log_every=12, lr=1e-6)
        assert result.skipped == 0
        assert result.history[0]["loss_scale"] < 2.0**16
        assert result.history[0]["loss"] > 0

    def test_a_loss_that_is_not_finite_counts(self) -> None:
        with pytest.warns(FastKDWarning, match="step 3 is"), pytest.raises(FloatingPointError, match="at step 12"):
            run(distiller(loss=breaks_from(4)), precision="fp16", steps=20)

    @pytest.mark.gpu
    def test_on_the_gpu(self) -> None:
        result = run(distiller(), precision="fp16", device="cuda", steps=20, log_every=20)
        assert result.skipped == 0
        assert result.history[0]["loss"] > 0
        assert result.history[0]["loss_scale"] >= 1


class Damaged(Scenes):
    """A set in which some samples cannot be read."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad = bad

    def describe(self, index: int) -> str:
        return f"ref {index + 100}"

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i in self.bad:
            raise ValueError(f"{i}.jpg can't be read as an image")
        return super().__getitem__(i)


class TestSamples:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_error_names_the_sample(self, workers: int) -> None:
        with pytest.raises(
            ValueError, match=r"5.jpg can't be read as an image\nThis is sample 5 \(ref 105\) of the train"
        ):
            run(toy(), Damaged({5}), workers=workers, check=False)

    def test_subset_is_read_sample_by_sample(self) -> None:
        """Torch's `Subset` can read a batch, but by single samples, so seeds and errors are those of samples."""

        class Noisy(Damaged):
            def __getitem__(self, i: int) -> dict[str, Any]:
                return super().__getitem__(i) | {"noise": float(torch.rand(()))}

        samples = TrainingSamples(Subset(Noisy({5}), range(8)), 0)
        together = [sample["noise"] for sample in samples.__getitems__([1, 2, 3])]
        assert together == [samples[n]["noise"] for n in (1, 2, 3)]
        with pytest.raises(ValueError, match="can't be read") as error:
            samples.__getitems__([4, 5])
        assert error.value.__notes__ == ["This is sample 5 of the training set."]

        class Batches(Noisy):
            def __getitems__(self, indices: list[int]) -> list[Any]:
                return [self[n] for n in indices]

        for dataset in (Batches({5}), Subset(Batches({5}), range(8))):
            with pytest.raises(ValueError, match="can't be read") as error:
                TrainingSamples(dataset, 0).__getitems__([4, 5])
            assert error.value.__notes__ == ["This batch has samples 4, 5 of the training set."]

    @pytest.mark.parametrize("workers", [0, 1])
    def test_bad_samples_are_replaced_and_listed(self, workers: int, tmp_path: Path) -> None:
        message = r"cannot be read and are replaced, such as sample \d+ \(ref 10\d\): ValueError: \d\.jpg can't be read"
        with pytest.warns(FastKDWarning, match=message):
            result = run(toy(), Damaged({5, 6}), tmp_path, workers=workers, skip_bad_samples=True)
        assert sorted(result.bad_samples) == [5, 6]
        [line] = [line for line in read_log(tmp_path) if line["event"] == "bad_samples"]
        assert line["samples"]["5"] == "sample 5 (ref 105): ValueError: 5.jpg can't be read as an image"
        assert read_log(tmp_path)[-1]["bad_samples"] == 2
        again = run(toy(), Damaged({5, 6}), tmp_path, skip_bad_samples=True, resume=True)
        assert again.bad_samples == result.bad_samples

    def test_replacement_is_the_next_readable_sample(self) -> None:
        samples = TrainingSamples(Damaged({5, 6}), 0, skip_bad=True)
        found = samples.__getitems__([4, 5])
        assert [found[0]["ref_id"], found[1]["ref_id"]] == [4, 7]
        assert [bad.number for bad in found[2:]] == [5, 6]

    def test_an_unreadable_set_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="can't be read") as error:
            run(toy(), Damaged(set(range(32))), skip_bad_samples=True)
        assert "10 samples in a row cannot be read" in "".join(error.value.__notes__)


class Crashes(Scenes):
    """A set whose loading process is killed."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_crashed_loading_process_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tyro.extras.SubcommandApp.cli", lambda *args, **options: run(toy(), Crashes(), workers=1))
    assert main(["train"]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert re.match(
        r"fastkd: error: a data-loading worker was killed by SIGKILL, most often because memory ran out", line
    )


def test_two_processes() -> None:
    """Processes skip together and list all bad samples; checked in one start, which takes seconds.

    One process has NaN gradients in step 2, then only an infinite loss, with a finite gradient, in step 3.
    """
    out = two_processes("""
    import torch, warnings
    sys.path.insert(0, os.path.dirname(t.__file__) + "/../train")
    from test_faults import Damaged
    from fastkd.train import segmentation_loss
    calls = []
    def loss(output, batch):
        calls.append(0)  # call 1 looks for parameters without a gradient
        value = segmentation_loss(output, batch)
        if rank == 1 and len(calls) == 3:
            value = value * float("nan")
        if rank == 1 and len(calls) == 4:
            value = value + float("inf")
        return value
    model = t.toy()
    warnings.simplefilter("ignore")
    result = t.run(model, steps=5, task_loss=loss, check=False, log_every=1)
    total = float(sum(p.double().sum() for p in model.parameters()))
    os.write(1, f"{rank} {result.skipped} {[line['skipped'] for line in result.history]} {total!r};".encode())
    result = t.run(t.toy(), Damaged({3, 5, 9, 20}), steps=4, skip_bad_samples=True)
    os.write(1, f"bad {sorted(result.bad_samples)};".encode())
""")
    assert out.count("bad [3, 5, 9, 20];") == 2
    first, second = sorted(line for line in out.split(";") if line[:1] in ("0", "1"))
    assert first.startswith("0 2 [0, 1, 1, 0, 0] ")
    assert first[2:] == second[2:]
    assert "nan" not in first

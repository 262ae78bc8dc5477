"""Loading: short errors for failed workers and for samples that cannot be batched."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("timm", reason="needs the [ris] extra")

from fastkd.cli import main
from fastkd.data import collate
from fastkd.data._loading import WorkerExited, batches


class Broken(Dataset[Any]):
    """A dataset whose third sample raises."""

    def __init__(self, fail: Callable[[], Any]) -> None:
        self.fail = fail

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Any:
        return self.fail() if i == 2 else torch.zeros(3, device=None)


class CustomError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def _raise(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def _noted() -> Any:
    error = ValueError("image a.jpg can't be decoded:\nit is truncated")
    error.add_note("Fetch it again.")
    try:
        raise OSError("broken data stream")
    except OSError as cause:
        raise error from cause


def read(fail: Callable[[], Any], workers: int = 1, **options: Any) -> list[Any]:
    return list(batches(DataLoader(Broken(fail), batch_size=1, num_workers=workers, **options)))


class TestWorkers:
    def test_keeps_the_original_message(self) -> None:
        with pytest.raises(ValueError, match="can't be decoded") as caught:
            read(_noted)
        assert str(caught.value) == "image a.jpg can't be decoded:\nit is truncated\nFetch it again."
        assert "Original Traceback" in str(caught.value.__cause__)  # shown with FASTKD_TRACEBACK=1

    @pytest.mark.parametrize(
        ("error", "kind", "text"),
        [
            (KeyError("ref_id"), KeyError, "'ref_id'"),
            (CustomError(1, 2), RuntimeError, "CustomError: 1 and 2"),
            (ValueError(), ValueError, ""),
        ],
    )
    def test_keeps_the_type_if_possible(self, error: Exception, kind: type[Exception], text: str) -> None:
        with pytest.raises(kind) as caught:
            read(_raise(error))
        assert str(caught.value) == text

    def test_without_workers_raises_the_same_object(self) -> None:
        error = ValueError("x")
        with pytest.raises(ValueError, match="x") as caught:
            read(_raise(error), workers=0)
        assert caught.value is error

    def test_reports_a_killed_worker(self) -> None:
        with pytest.raises(
            WorkerExited, match=r"was killed by SIGKILL, most often because memory ran out: lower workers=1 "
        ):
            read(lambda: os.kill(os.getpid(), signal.SIGKILL))

    def test_reports_sizes_that_do_not_stack(self) -> None:
        for workers, seen in ((0, r"got \[3\] at entry 0 and \[2\] at entry 1"), (1, "found by a worker")):
            message = rf"samples of different sizes cannot be batched \({seen}"
            loader = DataLoader(Broken(lambda: torch.zeros(2)), batch_sampler=[[1, 2]], num_workers=workers)
            with pytest.raises(ValueError, match=message):
                list(batches(loader))


class TestCollate:
    def test_reports_samples_of_different_sizes(self) -> None:
        samples = [{"image": torch.zeros(3, s, s), "ref_id": ref} for ref, s in ((7, 64), (8, 64), (9, 32))]
        with pytest.raises(ValueError, match="a batch needs one size of 'image'") as error:
            collate(samples)
        assert "(3, 32, 32) in sample 2 (ref_id 9)" in str(error.value)
        assert "(3, 64, 64) in sample 0 (ref_id 7)" in str(error.value)

    def test_reports_a_missing_key(self) -> None:
        samples = [{"image": torch.zeros(1), "teacher_input_ids": torch.zeros(1)}, {"image": torch.zeros(1)}]
        with pytest.raises(ValueError, match="sample 1 has no 'teacher_input_ids', but sample 0 has"):
            collate(samples)


class TestCommandLine:
    def error_output(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], function: Callable[[], Any]
    ) -> str:
        monkeypatch.setattr("tyro.extras.SubcommandApp.cli", lambda *args, **options: function())
        assert main(["info"]) == 2
        return capsys.readouterr().err

    def test_shortens_long_messages_of_other_packages(self, monkeypatch: Any, capsys: Any) -> None:
        other = _raise(RuntimeError("\x1b[1mcannot go on\x1b[0m\n\nrun this:\n  os.environ['X'] = '1'"))
        text = self.error_output(monkeypatch, capsys, other)
        assert text == "fastkd: error: cannot go on ... (FASTKD_TRACEBACK=1 shows all)\n"

    def test_keeps_messages_of_one_line(self, monkeypatch: Any, capsys: Any) -> None:
        text = self.error_output(monkeypatch, capsys, lambda: torch.zeros(2).view(3))
        assert text.startswith("fastkd: error: shape '[3]' is")
        assert text.count("\n") == 1
        assert self.error_output(monkeypatch, capsys, _raise(ValueError())) == "fastkd: error: ValueError: \n"

    def test_keeps_all_lines_of_own_messages(self, monkeypatch: Any, capsys: Any) -> None:
        text = self.error_output(monkeypatch, capsys, lambda: read(_noted))
        assert text == "fastkd: error: image a.jpg can't be decoded:\nit is truncated\nFetch it again.\n"

"""Batches and their loading: one error in plain words for samples that do not fit and for processes that fail."""

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
from fastkd.data._loading import WorkerEnded, batches


class Broken(Dataset[Any]):
    """A data set whose third sample raises."""

    def __init__(self, fail: Callable[[], Any]) -> None:
        self.fail = fail

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Any:
        return self.fail() if i == 2 else torch.zeros(3, device=None)


class Own(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def _raise(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def _noted() -> Any:
    error = ValueError("image a.jpg can't be decoded:\nit is cut")
    error.add_note("Fetch it again.")
    try:
        raise OSError("broken data stream")
    except OSError as cause:
        raise error from cause


def read(fail: Callable[[], Any], workers: int = 1, **options: Any) -> list[Any]:
    return list(batches(DataLoader(Broken(fail), batch_size=1, num_workers=workers, **options)))


class TestWorkers:
    def test_the_message_is_the_error_s_own(self) -> None:
        with pytest.raises(ValueError, match="can't be decoded") as caught:
            read(_noted)
        assert str(caught.value) == "image a.jpg can't be decoded:\nit is cut\nFetch it again."
        assert "Original Traceback" in str(caught.value.__cause__)  # FASTKD_TRACEBACK=1 shows it

    @pytest.mark.parametrize(
        ("error", "kind", "text"),
        [
            (KeyError("ref_id"), KeyError, "'ref_id'"),
            (Own(1, 2), RuntimeError, "Own: 1 and 2"),
            (ValueError(), ValueError, ""),
        ],
    )
    def test_kinds(self, error: Exception, kind: type[Exception], text: str) -> None:
        with pytest.raises(kind) as caught:
            read(_raise(error))
        assert str(caught.value) == text

    def test_without_workers_the_error_is_the_same_object(self) -> None:
        error = ValueError("x")
        with pytest.raises(ValueError, match="x") as caught:
            read(_raise(error), workers=0)
        assert caught.value is error

    def test_a_worker_that_is_killed(self) -> None:
        with pytest.raises(WorkerEnded, match=r"was ended by SIGKILL: most often memory ran out; lower workers=1 "):
            read(lambda: os.kill(os.getpid(), signal.SIGKILL))

    def test_sizes_that_do_not_stack(self) -> None:
        for workers, seen in ((0, r"got \[3\] at entry 0 and \[2\] at entry 1"), (1, "seen by a worker")):
            message = rf"samples of different sizes do not make a batch \({seen}"
            loader = DataLoader(Broken(lambda: torch.zeros(2)), batch_sampler=[[1, 2]], num_workers=workers)
            with pytest.raises(ValueError, match=message):
                list(batches(loader))


class TestCollate:
    def test_sizes_are_named_with_their_samples(self) -> None:
        samples = [{"image": torch.zeros(3, s, s), "ref_id": ref} for ref, s in ((7, 64), (8, 64), (9, 32))]
        with pytest.raises(ValueError, match="a batch needs one size of 'image'") as error:
            collate(samples)
        assert "(3, 32, 32) in sample 2 (ref_id 9)" in str(error.value)
        assert "(3, 64, 64) in sample 0 (ref_id 7)" in str(error.value)

    def test_keys_that_one_lacks(self) -> None:
        samples = [{"image": torch.zeros(1), "teacher_input_ids": torch.zeros(1)}, {"image": torch.zeros(1)}]
        with pytest.raises(ValueError, match="sample 1 has no 'teacher_input_ids', sample 0 has"):
            collate(samples)


class TestCommandLine:
    def told(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], act: Callable[[], Any]) -> str:
        monkeypatch.setattr("tyro.extras.SubcommandApp.cli", lambda *args, **options: act())
        assert main(["info"]) == 2
        return capsys.readouterr().err

    def test_another_package_s_pages_are_one_line(self, monkeypatch: Any, capsys: Any) -> None:
        foreign = _raise(RuntimeError("\x1b[1mcannot go on\x1b[0m\n\nrun this:\n  os.environ['X'] = '1'"))
        text = self.told(monkeypatch, capsys, foreign)
        assert text == "fastkd: error: cannot go on ... (FASTKD_TRACEBACK=1 shows all of it)\n"

    def test_a_message_of_one_line_is_whole(self, monkeypatch: Any, capsys: Any) -> None:
        text = self.told(monkeypatch, capsys, lambda: torch.zeros(2).view(3))
        assert text.startswith("fastkd: error: shape '[3]' is")
        assert text.count("\n") == 1
        assert self.told(monkeypatch, capsys, _raise(ValueError())) == "fastkd: error: ValueError: \n"

    def test_lines_of_our_own_stay(self, monkeypatch: Any, capsys: Any) -> None:
        text = self.told(monkeypatch, capsys, lambda: read(_noted))
        assert text == "fastkd: error: image a.jpg can't be decoded:\nit is cut\nFetch it again.\n"

"""SIGTERM saves the student like Ctrl-C, only in the main thread, and restores signal handlers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the [ris] extra")

from safetensors.torch import load_file
from train_tools import Scenes, read_log, run, toy

from fastkd.cli import main
from fastkd.data._loading import WorkerExited
from fastkd.errors import Terminated
from fastkd.train.stop import Termination


class CallsAtStep4(Scenes):
    """Dataset that calls a function before its 25th sample, in step 4 with batches of 8."""

    def __init__(self, act: Callable[[], Any]) -> None:
        super().__init__()
        self.act = act

    def __getitem__(self, i: int) -> dict[str, Any]:
        if len(self.served) == 24:
            self.act()
        return super().__getitem__(i)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_saves_the_student(tmp_path: Path) -> None:
    model = toy()
    with pytest.raises(Terminated) as stop:
        run(model, CallsAtStep4(terminate), tmp_path)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    end = read_log(tmp_path)[-1]
    assert (end["event"], end["reason"], end["message"], end["step"]) == ("end", "Terminated", "SIGTERM", 3)
    saved = load_file(tmp_path / "last" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_keeps_a_handler_of_the_caller() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        assert run(toy(), CallsAtStep4(terminate)).steps == 6
        assert calls == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sets_no_handler_in_another_thread() -> None:
    seen: list[Any] = []
    thread = threading.Thread(
        target=lambda: run(toy(), CallsAtStep4(lambda: seen.append(signal.getsignal(signal.SIGTERM))))
    )
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_waits_for_the_signal_if_a_worker_ends_first() -> None:
    """If a process group gets SIGTERM, torch may notice the end of a worker before this process gets the signal."""
    before = signal.getsignal(signal.SIGCHLD)
    lost = WorkerExited(-signal.SIGTERM, 1)
    with Termination() as stop:
        threading.Timer(0.1, terminate).start()
        assert isinstance(stop.settle(lost), Terminated)
        terminate()  # a second signal does not interrupt saving
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    signal.signal(signal.SIGCHLD, before)
    other = ValueError("no loss")
    with Termination() as stop:
        assert stop.settle(other) is other
    assert signal.getsignal(signal.SIGCHLD) is before


def test_exit_status_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def terminated(*args: Any, **options: Any) -> None:
        raise Terminated

    monkeypatch.setattr("tyro.extras.SubcommandApp.cli", terminated)
    assert main(["info"]) == 143
    assert capsys.readouterr().err == "fastkd: ended by SIGTERM\n"


_PROGRAM = """
import os, sys, time; sys.path.insert(0, {folder!r})
from pathlib import Path
import train_tools as t
class Slow(t.Scenes):
    def __getitem__(self, i):
        Path(sys.argv[1], f"worker-{{os.getpid()}}").touch()
        time.sleep(0.01)
        return super().__getitem__(i)
t.run(t.toy(), Slow(), Path(sys.argv[1], "run"), steps=100_000, log_every=1, workers=2)
"""


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize("whole_group", [True, False])
def test_process_with_workers_ends(whole_group: bool, tmp_path: Path) -> None:
    code = _PROGRAM.format(folder=str(Path(__file__).parents[1] / "helpers"))
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "run" / "log.jsonl"
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (log.exists() and '"event": "train"' in log.read_text()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
        error = process.communicate(timeout=100)[1]
        workers = [int(file.name.partition("-")[2]) for file in tmp_path.glob("worker-*")]
        deadline = time.monotonic() + 20  # workers check for their parent every few seconds
        while time.monotonic() < deadline and any(map(_runs, workers)):
            time.sleep(0.1)
        alive = [pid for pid in workers if _runs(pid)]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143, error
    # Python's own thread in a loading process prints one if it was cut off while it passed a tensor on.
    assert all("multiprocessing/resource_sharer.py" in text[:300] for text in error.split("Traceback")[1:]), error
    assert len(workers) == 2
    assert not alive
    assert read_log(tmp_path / "run")[-1]["reason"] == "Terminated"
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()

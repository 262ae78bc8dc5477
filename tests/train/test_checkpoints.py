"""Checkpoints are complete or absent: which are kept, damaged ones, full disks."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="needs the [ris] extra")

from safetensors import SafetensorError
from train_tools import Acts, Scenes, distiller, failing, read_log, run, toy

from fastkd._atomic import remove_leftovers
from fastkd.errors import FastKDWarning
from fastkd.train.checkpoint import find_checkpoints


def run_of_six(folder: Path, **settings: Any) -> Any:
    return run(toy(), out=folder, checkpoint_every=2, keep_checkpoints=3, check=False, **settings)


class TestFiles:
    def test_keeps_the_latest_and_the_best(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scores = iter([10.0, 30.0, 20.0, 20.0, 20.0])

        def scored(*args: Any, **options: Any) -> Any:
            result = evaluate(*args, **options)
            result.metrics["mIoU"] = next(scores)
            return result

        from fastkd.evaluate import evaluate

        monkeypatch.setattr("fastkd.train.run.evaluate", scored)
        run(toy(), out=tmp_path, steps=10, eval_every=2, checkpoint_every=4, val_dataset=Scenes(4))
        assert list(find_checkpoints(tmp_path / "checkpoints")) == [10, 8, 4]

    def test_a_damaged_one_does_not_take_the_place_of_a_good_one(self, tmp_path: Path) -> None:
        settings = {"out": tmp_path, "check": False, "checkpoint_every": 2, "keep_checkpoints": 1}
        run(toy(), steps=4, **settings)
        latest = tmp_path / "checkpoints" / "step-000004"
        (shutil.copytree(latest, latest.with_name("step-000009")) / "optimizer.pt").write_bytes(b"")
        with pytest.warns(FastKDWarning, match="step-000009 is incomplete or damaged"):
            assert run(toy(), steps=8, resume=True, resume_allow=["steps"], **settings).resumed_at == 4
        assert list(find_checkpoints(tmp_path / "checkpoints")) == [8]

    def test_zero_keeps_none(self, tmp_path: Path) -> None:
        run(toy(), out=tmp_path, checkpoint_every=2, keep_checkpoints=0)
        assert not (tmp_path / "checkpoints").exists()
        with pytest.raises(FileExistsError, match="holds a complete run without checkpoints"):
            run(toy(), out=tmp_path, resume=True)

    @pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no state"])
    def test_damaged_checkpoint_is_skipped_and_named(self, damage: str, tmp_path: Path) -> None:
        run_of_six(tmp_path)
        latest = tmp_path / "checkpoints" / "step-000006"
        file = latest / ("state.json" if damage == "no state" else "student.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        if damage in ("missing", "no state"):
            file.unlink()
        else:
            file.write_bytes(data if damage == "flipped" else data[:-1])
        with pytest.warns(FastKDWarning, match="checkpoint .*step-000006 is incomplete or damaged: .*it is skipped"):
            assert run_of_six(tmp_path, resume=True).resumed_at == 4
        for path in find_checkpoints(tmp_path / "checkpoints").values():
            (path / "optimizer.pt").write_bytes(b"")
        before = (tmp_path / "log.jsonl").read_text()
        with pytest.warns(FastKDWarning, match="is skipped"), pytest.raises(FileExistsError, match="none of its check"):
            run_of_six(tmp_path, resume=True)
        assert (tmp_path / "log.jsonl").read_text() == before

    @pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the size of files")
    @pytest.mark.parametrize("kilobytes", [6, 20])
    def test_failed_write_keeps_the_latest_and_says_so(self, kilobytes: int, tmp_path: Path) -> None:
        """Files of 6 KiB do not hold the student, and 20 KiB not the optimiser's state; each has its own writer."""
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = Acts(4, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (kilobytes << 10, hard)))
        options: dict[str, Any] = {"out": tmp_path, "check": False, "checkpoint_every": 2, "steps": 6}
        final_save = pytest.raises((OSError, SafetensorError), match="too large") if kilobytes == 6 else nullcontext()
        try:
            with pytest.warns(FastKDWarning, match="could not be (written|saved) to .*too large") as found, final_save:
                run(toy(width=64), task_loss=limit, val_dataset=Scenes(4), eval_every=5, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "the checkpoint of step 4 could not be written" in str(found[0].message)
        assert any("the student of step 5 could not be saved" in str(w.message) for w in found) is (kilobytes == 6)
        assert list(find_checkpoints(tmp_path / "checkpoints")) == [2]
        assert run(toy(width=64), resume=True, val_dataset=Scenes(4), eval_every=5, **options).resumed_at == 2

    def test_full_disk_keeps_the_latest_and_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        once = Acts(4, partial(monkeypatch.setattr, os, "fsync", full))
        message = r"checkpoint of step 4 could not be written .*No space left on device.*that of step 2 is kept"
        with pytest.warns(FastKDWarning, match="could not be written") as caught:
            assert run_of_six(tmp_path, task_loss=once).steps == 6
        monkeypatch.undo()
        assert re.search(message, str(caught[0].message))
        assert os.listdir(tmp_path / "checkpoints") == ["step-000002"]
        lines = [line for line in read_log(tmp_path) if line["event"] == "checkpoint"]
        assert [(line["step"], "error" in line) for line in lines] == [(2, False), (4, True), (6, True)]
        assert run_of_six(tmp_path, resume=True).resumed_at == 2

    def test_full_disk_does_not_stop_the_log(self, tmp_path: Path) -> None:
        from fastkd.train.log import RunLog

        log = RunLog(tmp_path / "log.jsonl")
        file, log._file = log._file, Full()
        with pytest.warns(FastKDWarning, match=r"log\.jsonl cannot be written .*No space left"):
            log.write("train", step=1)
        log.write("train", step=2)  # warns once
        log._file = file
        log.write("end")
        log.close()

    def test_leftovers_of_killed_processes(self, tmp_path: Path) -> None:
        for name in (".a.12.partial", ".b.12.old", ".c.12.old", "c"):
            (tmp_path / name).mkdir()
            (tmp_path / name / name).touch()
        (tmp_path / ".file.12.partial").touch()
        remove_leftovers(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
        assert os.listdir(tmp_path / "b") == [".b.12.old"]
        assert os.listdir(tmp_path / "c") == ["c"]

    def test_overwriting_removes_the_checkpoints(self, tmp_path: Path) -> None:
        run_of_six(tmp_path)
        model = distiller()
        model.teacher.train()
        with pytest.raises(ValueError, match="teacher is in train mode"):
            run(model, out=tmp_path, overwrite=True)
        assert not (tmp_path / "checkpoints").exists()

    def test_interrupt_before_the_first_step_saves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            run(toy(), out=tmp_path, task_loss=Acts(1, failing(KeyboardInterrupt())), check=False)
        assert os.listdir(tmp_path) == ["log.jsonl"]
        assert run(toy(), out=tmp_path, resume=True).resumed_at is None


class Full:
    """File on a full disk."""

    def write(self, text: str) -> None:
        """Accept the text."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

"""scripts/gpu_check.sh without a GPU: its parts, time limits and resumption, with fake tools."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_in

cache, records, wheels = map(stand_in.script, ("cache", "records", "wheels"))

SCRIPT = stand_in.ROOT / "scripts" / "gpu_check.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=env, timeout=120)


def part_rows(out: Path) -> dict[str, dict]:
    return {row["work"]: row for row in json.loads((out / "check.json").read_text())["rows"]}


# --- usage errors, no GPU ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a GPU")
def test_exits_3_without_a_gpu(tmp_path: Path) -> None:
    done = check(str(tmp_path / "out"))
    assert done.returncode == 3
    assert "no NVIDIA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_missing_folder_prints_the_usage() -> None:
    done = check()
    assert done.returncode == 2
    assert "usage: scripts/gpu_check.sh" in done.stderr
    assert "OUT_DIR" in done.stderr


def test_unknown_part_is_rejected(tmp_path: Path) -> None:
    done = check(str(tmp_path / "out"), "benchmark")
    assert done.returncode == 2
    assert "unknown part 'benchmark'; expected first_light, tests, benchmarks, sanitizer, autotune" in done.stderr


# --- the parts --------------------------------------------------------------------------------------------------------


def test_failed_part_does_not_stop_others_and_the_next_call_resumes(tmp_path: Path) -> None:
    folder, out = stand_in.checkout(tmp_path / "repo"), tmp_path / "out"
    done = stand_in.check(folder, str(out), "--jobs", "1", "--seconds", "120", SANITIZER_FINDS="racecheck")
    assert done.returncode == 1, done.stdout + done.stderr
    rows = part_rows(out)
    assert list(rows) == ["build", "first_light", "tests", "benchmarks", "sanitizer"]
    assert {name: row["ok"] for name, row in rows.items()} == {
        "build": True, "first_light": True, "tests": False, "benchmarks": True, "sanitizer": False,
    }  # fmt: skip
    assert "sums are wrong" in done.stdout
    assert "4 passed" in rows["tests"]["note"]
    tests = records.read(out / "tests.jsonl")
    assert sorted(row["outcome"] for row in tests) == ["failed"] + 4 * ["passed"]
    assert "sums are wrong" in next(row["text"] for row in tests if row["outcome"] == "failed")
    watched = records.read(out / "sanitizer.jsonl")
    assert [(row["tool"], row["status"]) for row in watched if "status" in row] == [("memcheck", 0), ("racecheck", 9)]
    assert [row["tool"] for row in watched if row.get("check") == "sanitize"] == ["memcheck"]
    files = {path.name for path in out.iterdir()}
    results = {"first_light.jsonl", "tests.jsonl", "benchmarks.jsonl", "sanitizer.jsonl"}
    assert files == {
        "check.json",
        "log.txt",
        "cache.tar.gz",
        *results,
    }  # few files and no folder, so that they are easy to copy

    # On another machine: skips the build, passed tests, and tools without findings.
    other = tmp_path / "other"
    done = stand_in.check(folder, str(other), "--resume", str(out), "--jobs", "1", "--cache", str(tmp_path / "cache"))
    assert done.returncode == 1
    assert (folder / "pip.log").read_text() == "built\n"
    assert [r["outcome"] for r in records.read(other / "tests.jsonl")[5:]] == ["failed"]
    again = records.read(other / "sanitizer.jsonl")[len(watched) :]
    assert {row["tool"] for row in again} == {"racecheck"}
    assert (tmp_path / "cache" / "build" / "fastkd").is_dir()


def test_only_named_parts_run_and_a_failed_build_skips_them(tmp_path: Path) -> None:
    folder, out = stand_in.checkout(tmp_path / "repo"), tmp_path / "out"
    done = stand_in.check(folder, str(out), "autotune", PIP_FAILS="1")
    assert done.returncode == 1
    rows = part_rows(out)
    assert list(rows) == ["build", "autotune"]
    assert not any(row["ok"] for row in rows.values())
    assert "no compiler here" in (out / "log.txt").read_text()
    assert rows["autotune"]["note"] == "not run: the build failed"

    assert stand_in.check(folder, str(out), "autotune").returncode == 0
    (folder / "fastkd" / "new.py").write_text("")  # the earlier build no longer matches the sources
    assert stand_in.check(folder, str(out), "autotune", PIP_FAILS="1").returncode == 1
    assert part_rows(out)["autotune"]["note"] == "not run: the build failed"


SLOW = """
import time
import pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("i", range(3))
def test_quick(i):
    pass

def test_wrong():
    assert 1 + 1 == 3, "sums are wrong"

def test_slow():
    time.sleep(100)

def test_last():
    pass
"""


def test_limit_is_kept_and_later_parts_are_skipped(tmp_path: Path) -> None:
    folder, out = stand_in.checkout(tmp_path / "repo", SLOW), tmp_path / "out"
    begin = time.monotonic()
    done = stand_in.check(folder, str(out), "tests", "sanitizer", "--jobs", "1", "--seconds", "36")
    assert time.monotonic() - begin < 70
    assert done.returncode == 1
    rows = part_rows(out)
    assert "stopped at its time limit" in rows["tests"]["note"]
    assert "4 of 6 ran" in rows["tests"]["note"]
    assert "no time was left" in rows["sanitizer"]["note"]
    assert len(records.read(out / "tests.jsonl")) == 4


def test_killed_call_keeps_every_line_and_resumes(tmp_path: Path) -> None:
    folder, out = stand_in.checkout(tmp_path / "repo", SLOW), tmp_path / "out"
    command = ["bash", str(folder / "scripts" / "gpu_check.sh"), str(out), "tests", "--jobs", "1"]
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen(command, stdout=printed, env=stand_in.environment(folder))
        try:
            end = time.monotonic() + 120
            while len(records.read(out / "tests.jsonl")) < 4 and time.monotonic() < end:
                time.sleep(0.1)
            time.sleep(0.5)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    before = records.read(out / "tests.jsonl")
    assert [row["outcome"] for row in before] == ["passed"] * 3 + ["failed"]
    assert "sums are wrong" in before[3]["text"]
    assert "sums are wrong" in (tmp_path / "printed").read_text()
    assert "sums are wrong" in (out / "log.txt").read_text()
    time.sleep(1)
    assert not running(folder)  # its child processes are gone too

    path = folder / "scripts" / "gpu" / "record_tests.py"  # not under test: nothing is repeated
    path.write_text(path.read_text() + "\n")
    done = stand_in.check(folder, str(out), "tests", "--jobs", "1", "--seconds", "30")
    assert "stopped at its time limit" in part_rows(out)["tests"]["note"], done.stdout
    assert [row["test"].rpartition("::")[2] for row in records.read(out / "tests.jsonl")[4:]] == ["test_wrong"]
    assert (folder / "pip.log").read_text() == "built\n"


@pytest.mark.parametrize(("status", "found", "repeated"), [(124, False, False), (124, True, True), (9, False, True)])
def test_sanitizer_skips_calls_of_a_timed_out_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, found: bool, repeated: bool
) -> None:
    """After a run with findings all calls are repeated."""
    sanitizer = stand_in.script("sanitizer")
    out, tools = tmp_path / "out.jsonl", tmp_path / "tools"
    tools.mkdir()
    (tools / "compute-sanitizer").write_text(
        f'#!/bin/sh\nshift 8\nfor last; do :; done\ncat "$last" > {tmp_path}/seen\n'
    )
    (tools / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    call = {"tool": "memcheck", "run": "a", "case": "relation bf16", "ok": True, "id": ""}
    for row in (call, {"tool": "memcheck", "run": "a", "ok": False, "status": status, "found": found, "text": ""}):
        records.append(out, row)
    arguments = sanitizer.argparse.Namespace(out=out, id="a")
    folder = tmp_path / "calls"
    folder.mkdir()
    (folder / "memcheck.jsonl").touch()
    assert sanitizer.watch("memcheck", arguments, 60, folder)
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert seen == ([] if repeated else [{"case": "relation bf16", "ok": True, "id": ""}])


def running(folder: Path) -> list[str]:
    """Return the commands of running processes that mention a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


# --- wheels -----------------------------------------------------------------------------------------------------------


def test_missing_and_old_versions_are_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    installed = {
        "scikit-build-core": "0.11.5",
        "pybind11": "3.0.1",
        "cmake": "3.22.1",
        "pytest": "9.0",
        "setuptools": "77.0.3",
    }
    monkeypatch.setattr(wheels, "installed", installed.get)
    build, tests = wheels.requirements()
    assert [str(package) for package in wheels.find_missing([*build, *tests])] == [
        "scikit-build-core: found 0.11.5, needs >= 1.0",
        "cmake: found 3.22.1, needs >= 3.24",
        "ninja: not found, needs >= 1.11.1",
        "hypothesis: not found, needs >= 6.100",
    ]
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    error = wheels.install(wheels.find_missing(tests), tmp_path, tmp_path / "tools")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert "hypothesis: not found, needs >= 6.100" in error
    assert f"make wheelhouse WHEELHOUSE_PYTHON={python}" in error
    assert f"python3 -m pip download --dest=wheelhouse --only-binary=:all: --python-version={python}" in error


def test_bounds_come_from_pyproject(tmp_path: Path) -> None:
    text = (stand_in.ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace('"pybind11>=3.0"]', '"pybind11>=7.5"]'))
    assert "pybind11>=7.5" in wheels.requirements(tmp_path / "pyproject.toml")[0]


# --- cache archive ----------------------------------------------------------------------------------------------------


def test_cache_archive_has_a_size_limit_and_can_move(tmp_path: Path) -> None:
    folder, archive, moved = tmp_path / "cache", tmp_path / "cache.tar.gz", tmp_path / "moved"
    kernel = folder / "triton" / "KEY"
    kernel.mkdir(parents=True)
    (folder / "build").mkdir()
    (folder / "build" / "module.so").write_bytes(os.urandom(1000))
    files = {f"k.{kind}": str(kernel / f"k.{kind}") for kind in ("cubin", "json", "ttir")}
    for path in files.values():
        Path(path).write_bytes(os.urandom(1000))
    (kernel / "__grp__k.json").write_text(json.dumps({"child_paths": files}))
    (folder / "inductor").mkdir()
    (folder / "inductor" / "large").write_bytes(os.urandom(20_000))
    assert cache.pack(folder, archive, max_bytes=10_000) == ["1 files of inductor"]
    assert archive.stat().st_size < 10_000
    cache.unpack(archive, moved)
    found = {str(path.relative_to(moved)) for path in moved.rglob("*") if path.is_file()}
    assert found == {"build/module.so", "triton/KEY/k.cubin", "triton/KEY/k.json", "triton/KEY/__grp__k.json"}
    group = json.loads((moved / "triton" / "KEY" / "__grp__k.json").read_text())["child_paths"]
    assert group == {name: str(moved / "triton" / "KEY" / name) for name in ("k.cubin", "k.json")}

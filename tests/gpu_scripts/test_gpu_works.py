"""scripts/gpu/measure_works.py: the order, the sweeps, and that a work that dies or a kill costs nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import stand_in

measure_works, records = map(stand_in.script, ("measure_works", "records"))
run, table, workloads = (stand_in.script(f"benchmarks.{name}") for name in ("run", "table", "workloads"))

SCRIPT = str(stand_in.SCRIPTS / "measure_works.py")
# Instead of benchmarks/run.py's process: adds the lines that it is given, and ends or hangs after some of them.
CHILD = """
import json, os, sys, time
for line in json.load(open(sys.argv[2])):
    if line in ("abort", "hang"):
        os.abort() if line == "abort" else time.sleep(100)
    with open(sys.argv[1], "a") as file:
        print(json.dumps(line), file=file, flush=True)
"""
CEILINGS = {"copy_bytes_per_s": 1e12, "matmul_flop_per_s": 1e14, "exp_per_s": 1e12}


def lines_of(work: Any, names: list[str]) -> list[Any]:
    """What a process that measures a work would add: each of a provider's times is the same."""
    ms = {"eager": 4.0, "compile": 3.0}
    lines: list[Any] = []
    for mode in work.modes:
        more = {"ok": True, "error_vs_fp64": 1e-3}
        rows = [run.blank_row(work, mode, name) | more for name in names]
        for row in rows:
            row["ms"] = dict.fromkeys(("p20", "median", "p80"), ms.get(row["provider"], 1.0))
        lines.append({"rows": rows})
        if mode == "both":
            lines += {"cross_modal_kd": ["abort"], "channel_kd": ["hang"]}.get(work.loss, [])
    return lines


def test_the_order_of_value() -> None:
    found = [(work.loss, work.shape) for work in workloads.by_value("cuda")]
    assert found[:6] == workloads.FIRST
    assert len(found) == len(set(found)) == sum(map(len, workloads.GPU_WORKS.values()))
    names = [work.name for work in workloads.by_value("cuda")]
    assert len(set(names)) == len(names)
    assert {work.modes for work in workloads.by_value("cuda")} == {("forward", "both", "graph")}
    assert {work.modes for work in workloads.by_value("cpu")} == {("forward", "both")}


def test_each_sweep_has_eager() -> None:
    (work,) = [w for w in workloads.by_value("cuda") if w.shape == (8, 256, 60, 60)]
    sweeps = {sweep: workloads.swept(work, "cuda", sweep) for sweep in workloads.SWEEPS}
    assert set(sweeps["own"]) == {"eager", "triton", "cuda"}
    assert set(sweeps["compile"]) == {"eager", "compile", "reference"}
    assert set(sweeps["autotune"]) == {"eager", "compile_max"}


def test_ratios_are_of_one_run() -> None:
    """The second sweep's machine was twice as slow: what it measured is halved."""

    def row(provider: str, ms: float, sweep: str) -> dict[str, Any]:
        times = {"p20": ms, "median": ms, "p80": ms}
        return {"provider": provider, "sweep": sweep, "ms": times, "ok": True}

    rows = [
        row("compile", 6.0, "compile"),
        row("eager", 8.0, "compile"),
        row("eager", 4.0, "own"),
        row("cuda", 1.0, "own"),
    ]
    found = {name: r["ms"]["median"] for name, r in table.of_one_run(rows).items()}
    assert found == {"eager": 4.0, "cuda": 1.0, "compile": 3.0}
    assert {r["provider"]: r["ms"]["median"] for r in rows if r["sweep"] == "compile"} == {"compile": 6.0, "eager": 8.0}


def test_a_mode_that_cannot_run_is_a_row_and_the_others_are_measured() -> None:
    """On a CPU: a CUDA graph cannot be recorded."""
    work = workloads.Work("softmax_kl", "channel_distribution_kd", (1, 4, 4, 4), modes=workloads.GPU_MODES)
    rows = {rows[0]["mode"]: rows for rows in run.compare(work, "cpu", 0.05, ["eager", "reference"])}
    assert list(rows) == ["forward", "both", "graph"]
    assert all(row["ok"] and row["ms"]["median"] > 0 for row in rows["forward"] + rows["both"])
    assert not any(row["ok"] for row in rows["graph"])
    assert all(row["note"] for row in rows["graph"])


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A session of stand-ins for the works' processes."""
    child = tmp_path / "child.py"
    child.write_text(CHILD)

    def command(work: Any, device: str, seconds: float, names: list[str], path: Path, ceilings: bool) -> list[str]:
        plan = path.with_name("plan.json")
        plan.write_text(json.dumps([{"ceilings": CEILINGS}] if work is None else lines_of(work, names)))
        return [sys.executable, str(child), str(path), str(plan)]

    monkeypatch.setattr(run, "child_command", command)
    monkeypatch.setattr(measure_works.measure, "environment", lambda device: {"device": "pretended", "commit": "0"})

    def make(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["measure_works", str(tmp_path / "out.jsonl"), "--device", "cuda", *arguments])
        return measure_works.main()

    return make


def test_a_work_that_dies_or_hangs_costs_its_own_limit(
    session: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "out.jsonl", ["--id", "build", "--sweeps", "own", "--work-seconds", "3"]
    for name in ("pixel_relation_kd kl 8x256", "16x14400", "kd kl 32x512", "16x512x60x60"):
        session(*options, "--works", name)
    ended = {line["work"]: line["ended"] for line in records.read(out) if "ended" in line}
    died, hung = "cross_modal_kd 16x14400x20x128 bfloat16", "channel_kd kl 32x512x30x30 bfloat16"
    also = "channel_kd kl 16x512x60x60 bfloat16"
    assert [name for name, good in ended.items() if not good] == [died, hung, also]
    assert len(ended) == 5
    rows = [row for line in records.read(out) if line.get("work") == died for row in line.get("rows", [])]
    assert [row["mode"] for row in rows if row["ok"]] == 3 * ["forward"] + 3 * ["both"]  # what it had measured is there
    assert {(row["mode"], row["note"]) for row in rows if not row["ok"]} == {
        ("graph", "its process: ended with status -6")
    }
    assert "its process: no end after 3 s" in capfd.readouterr().out
    assert len([line for line in records.read(out) if "ceilings" in line]) == 1

    before = len(records.read(out))
    session(*options, "--works", "channel_distribution_kd 16x512")  # has ended
    assert len(records.read(out)) == before
    session(*options, "--works", "16x14400")
    assert {line.get("work") for line in records.read(out)[before:]} == {None, died}

    assert session("--fold", str(tmp_path / "results")) == 0
    results = json.loads((tmp_path / "results" / "relation.json").read_text())
    assert results["environment"]["ceilings"]["copy_bytes_per_s"] == 1e12
    keys = [(row["work"], row["mode"], row["provider"]) for row in results["rows"]]
    assert len(set(keys)) == len(keys)
    assert all(row["share_of_limit"] for row in results["rows"] if row["ok"])


def test_a_real_work_is_measured_killed_and_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    options = ["--device", "cpu", "--works", "channel_distribution_kd 4x1024", "--seconds", "0.2", "--sweeps", "own"]
    command = [sys.executable, SCRIPT, str(out), *options]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 200
        while not any("rows" in line for line in records.read(out)) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (forward,) = [line["rows"] for line in records.read(out) if "rows" in line]
    assert {row["mode"] for row in forward} == {"forward"}
    assert all(row["ok"] for row in forward if row["provider"] == "eager")

    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    lines = records.read(out)
    assert len([line for line in lines if "ceilings" in line]) == 1  # the first call's
    assert [line["ended"] for line in lines if "ended" in line] == [True], done.stdout + done.stderr
    assert {row["mode"] for line in lines for row in line.get("rows", [])} == {"forward", "both"}

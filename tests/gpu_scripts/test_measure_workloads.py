"""scripts/gpu/measure_workloads.py: order, sweeps, and resumption after a crash, a hang or a kill."""

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

measure_workloads, records = map(stand_in.script, ("measure_workloads", "records"))
modules = ("providers", "run", "table", "workloads")
providers, run, table, workloads = (stand_in.script(f"benchmarks.{name}") for name in modules)

SCRIPT = str(stand_in.SCRIPTS / "measure_workloads.py")
# Replaces the process of benchmarks/run.py: appends the planned lines, and crashes or hangs where planned.
CHILD = """
import json, os, sys, time
for line in json.load(open(sys.argv[2])):
    if line in ("abort", "hang"):
        os.abort() if line == "abort" else time.sleep(100)
    with open(sys.argv[1], "a") as file:
        print(json.dumps(line), file=file, flush=True)
"""
CEILINGS = {"copy_bytes_per_s": 1e12, "matmul_flop_per_s": 1e14, "exp_per_s": 1e12}


def lines_of(workload: Any, names: list[str]) -> list[Any]:
    """Return the lines that the process of a workload would append, with one constant time per provider."""
    ms = {"eager": 4.0, "compile": 3.0}
    lines: list[Any] = []
    for mode in workload.modes:
        more = {"ok": True, "error_vs_fp64": 1e-3}
        rows = [run.empty_row(workload, mode, name) | more for name in names]
        for row in rows:
            row["ms"] = dict.fromkeys(("p20", "median", "p80"), ms.get(row["provider"], 1.0))
        lines.append({"rows": rows})
        if mode == "both":
            lines += {"cross_modal_kd": ["abort"], "channel_kd": ["hang"]}.get(workload.loss, [])
    return lines


def test_most_valuable_workloads_come_first() -> None:
    found = [(workload.loss, workload.shape) for workload in workloads.by_value("cuda")]
    assert found[:6] == workloads.FIRST
    assert len(found) == len(set(found)) == sum(map(len, workloads.GPU_WORKLOADS.values()))
    names = [workload.name for workload in workloads.by_value("cuda")]
    assert len(set(names)) == len(names)
    assert {workload.modes for workload in workloads.by_value("cuda")} == {("forward", "both", "graph")}
    assert {workload.modes for workload in workloads.by_value("cpu")} == {("forward", "both")}


def test_every_sweep_times_eager() -> None:
    (workload,) = [w for w in workloads.by_value("cuda") if w.shape == (8, 256, 60, 60)]
    sweeps = {sweep: providers.in_sweep(workload, "cuda", sweep) for sweep in workloads.SWEEPS}
    assert set(sweeps["own"]) == {"eager", "triton", "cuda"}
    assert set(sweeps["compile"]) == {"eager", "compile", "reference"}
    assert set(sweeps["autotune"]) == {"eager", "compile_max"}


def test_times_of_a_later_sweep_are_scaled_by_eager() -> None:
    """The machine was half as fast in the second sweep, so its times are halved."""

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


def test_unavailable_mode_has_rows_with_a_note() -> None:
    """A CPU cannot capture a CUDA graph."""
    workload = workloads.Workload("softmax_kl", "channel_distribution_kd", (1, 4, 4, 4), modes=workloads.GPU_MODES)
    rows = {rows[0]["mode"]: rows for rows in run.compare(workload, "cpu", 0.05, ["eager", "reference"])}
    assert list(rows) == ["forward", "both", "graph"]
    assert all(row["ok"] and row["ms"]["median"] > 0 for row in rows["forward"] + rows["both"])
    assert not any(row["ok"] for row in rows["graph"])
    assert all(row["note"] for row in rows["graph"])


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the script with fake workload processes."""
    child = tmp_path / "child.py"
    child.write_text(CHILD)

    def command(workload: Any, device: str, seconds: float, names: list[str], path: Path, ceilings: bool) -> list[str]:
        plan = path.with_name("plan.json")
        plan.write_text(json.dumps([{"ceilings": CEILINGS}] if workload is None else lines_of(workload, names)))
        return [sys.executable, str(child), str(path), str(plan)]

    monkeypatch.setattr(run, "child_command", command)
    monkeypatch.setattr(measure_workloads.measure, "environment", lambda device: {"device": "fake", "commit": "0"})

    def make(*arguments: str) -> Any:
        monkeypatch.setattr(
            sys, "argv", ["measure_workloads", str(tmp_path / "out.jsonl"), "--device", "cuda", *arguments]
        )
        return measure_workloads.main()

    return make


def test_crash_or_hang_costs_only_its_own_workload(
    session: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "out.jsonl", ["--id", "build", "--sweeps", "own", "--workload-seconds", "3"]
    for name in ("pixel_relation_kd kl 8x256", "16x14400", "kd kl 32x512", "16x512x60x60"):
        session(*options, "--workloads", name)
    ended = {line["work"]: line["ended"] for line in records.read(out) if "ended" in line}
    died, hung = "cross_modal_kd 16x14400x20x128 bfloat16", "channel_kd kl 32x512x30x30 bfloat16"
    also = "channel_kd kl 16x512x60x60 bfloat16"
    assert [name for name, good in ended.items() if not good] == [died, hung, also]
    assert len(ended) == 5
    rows = [row for line in records.read(out) if line.get("work") == died for row in line.get("rows", [])]
    assert [row["mode"] for row in rows if row["ok"]] == 3 * ["forward"] + 3 * [
        "both"
    ]  # the modes measured before the crash
    assert {(row["mode"], row["note"]) for row in rows if not row["ok"]} == {
        ("graph", "the process exited with status -6")
    }
    assert "the process timed out after 3 s" in capfd.readouterr().out
    assert len([line for line in records.read(out) if "ceilings" in line]) == 1

    before = len(records.read(out))
    session(*options, "--workloads", "channel_distribution_kd 16x512")  # already finished
    assert len(records.read(out)) == before
    session(*options, "--workloads", "16x14400")
    assert {line.get("work") for line in records.read(out)[before:]} == {None, died}

    assert session("--fold", str(tmp_path / "results")) == 0
    results = json.loads((tmp_path / "results" / "relation.json").read_text())
    assert results["environment"]["ceilings"]["copy_bytes_per_s"] == 1e12
    keys = [(row["work"], row["mode"], row["provider"]) for row in results["rows"]]
    assert len(set(keys)) == len(keys)
    assert all(row["share_of_limit"] for row in results["rows"] if row["ok"])


def test_killed_measurement_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    options = [
        "--device",
        "cpu",
        "--workloads",
        "channel_distribution_kd 4x1024",
        "--seconds",
        "0.2",
        "--sweeps",
        "own",
    ]
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
    assert len([line for line in lines if "ceilings" in line]) == 1  # from the first call
    assert [line["ended"] for line in lines if "ended" in line] == [True], done.stdout + done.stderr
    assert {row["mode"] for line in lines for row in line.get("rows", [])} == {"forward", "both"}

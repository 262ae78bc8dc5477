"""How it is measured: alternating medians, the machine's ceilings in the same run, environment, results file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """One call, by events on a GPU (after overwriting what its cache holds), by the clock on a CPU."""
    if device.startswith("cuda"):
        _cold_cache(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


_buffers: dict[str, torch.Tensor] = {}


def _cold_cache(device: str) -> None:
    if device not in _buffers:
        _buffers[device] = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    _buffers[device].fill_(1)


def alternate(
    calls: dict[str, Callable[[], Any]],
    device: str,
    seconds: float,
    least: int = 5,
    most: int = 200,
    slow: Collection[str] = (),
) -> dict[str, list[float]]:
    """Time the calls in turn, round after round, so that whatever else the machine does hits all of them alike.

    Before a call is timed it is made once uncounted: what the one before it left in the caches, and what memory the
    allocator had just given back to the system, is not its doing.
    Two calls of each come first, then up to four rounds in a quarter of the time, none of them counted.
    Those named in ``slow``, which take seconds a call, are warmed up once and timed in the first two rounds only.
    """
    for name, call in calls.items():
        for _ in range(1 if name in slow else 2):
            call()
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(4):  # in turn, uncounted: allocators settle on what they keep of each other's memory
        for name, call in calls.items():
            if name not in slow and time.perf_counter() - begin < seconds / 4:
                call()
    synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    rounds = 0
    while rounds < least or (time.perf_counter() - begin < seconds and rounds < most):
        for name, call in calls.items():
            if name in slow:
                if rounds >= 2:
                    continue
            else:
                call()
            times[name].append(milliseconds(call, device))
        rounds += 1
        if rounds == 2 and slow:
            begin = time.perf_counter()
    return times


def summary(times: list[float]) -> dict[str, float]:
    if len(times) == 1:
        return {"p20": times[0], "median": times[0], "p80": times[0]}
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"p20": round(fifths[0], 4), "median": round(statistics.median(times), 4), "p80": round(fifths[3], 4)}


def ceilings(device: str) -> dict[str, float]:
    """What this machine does at best right now: bytes copied (read + written), products, exponentials per second."""
    gpu = device.startswith("cuda")
    n = 2**29 if gpu else 2**25
    a = torch.rand(n, device=device)
    b = torch.empty_like(a)
    side = 8192 if gpu else 1024
    x = torch.randn(side, side, device=device)
    half = x.bfloat16()
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: b.copy_(a),
        "bf16": lambda: half @ half,
        "exp": lambda: torch.exp(a[: n // 8], out=b[: n // 8]),
        "exp_cached": lambda: torch.exp(a[: n // 256], out=b[: n // 256]),
    }
    if not gpu:
        double = x.double()
        calls["fp32"] = lambda: x @ x
        calls["fp64"] = lambda: double @ double
    best = {name: min(t) / 1e3 for name, t in alternate(calls, device, seconds=1.5).items()}
    flop = {name: round(2 * side**3 / best[name]) for name in ("fp32", "bf16", "fp64") if name in best}
    fp64 = {"matmul_fp64_flop_per_s": flop["fp64"]} if "fp64" in flop else {}
    return fp64 | {
        "copy_bytes_per_s": round(2 * 4 * n / best["copy"]),
        "matmul_flop_per_s": flop.get("fp32", flop["bf16"]),
        "matmul_bf16_flop_per_s": flop["bf16"],
        "exp_per_s": round(max(n // 8 / best["exp"], n // 256 / best["exp_cached"])),
    }


def environment(device: str) -> dict[str, Any]:
    """Where and with what the figures were taken; the ceilings are added by who measures them."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            ).stdout
        except (OSError, subprocess.CalledProcessError):
            return None

    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if gpu else cpu_name(),
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit.strip() if commit else None,
        "dirty": bool(status.strip()) if status is not None else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(env: dict[str, Any]) -> str:
    """The folder of a device's results: its name in letters, digits and dashes (a CPU's with its cores)."""
    name = env["device"] if env["device"] != env["cpu"] else f"{env['device']} {env['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(path: Path, env: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": env, "rows": rows} | more, indent=1) + "\n", encoding="utf-8")


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""Measure providers in turn, measure the machine's ceilings, and write results files."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastkd import _info
from fastkd._atomic import replace_files
from fastkd.ops.dispatch import unavailable_reason
from fastkd.ops.launch import native

RESULTS = Path(__file__).parent / "results"

ISA_LIMITS = ("FASTKD_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that limit the instruction sets of fastkd, of torch and of its libraries."""


def synchronize(device: str) -> None:
    """Wait for the GPU, if the device is one."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def settle_malloc() -> None:
    """Free a block of 31 MiB: from then on glibc's malloc keeps freed blocks up to this size, as in a training step.

    malloc keeps those up to the largest block freed so far, and returns all free memory beyond twice that size to the
    system. Where the results of a call are about that much, it may take fresh memory in every call, or in none.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # malloc never keeps blocks of 32 MiB or more


_clock = time.perf_counter


def use_cpu_time() -> None:
    """From now on, time CPU seconds of one thread, which other load on the machine affects little."""
    global _clock
    torch.set_num_threads(1)
    _clock = time.process_time


def uses_cpu_time() -> bool:
    """Return whether :func:`use_cpu_time` was called."""
    return _clock is time.process_time


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Time one call in milliseconds: with events on a GPU (after flushing its L2 cache), with a clock on a CPU."""
    if device.startswith("cuda"):
        _flush_cache(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = _clock()
    call()
    return (_clock() - begin) * 1e3


_buffers: dict[str, torch.Tensor] = {}


def _flush_cache(device: str) -> None:
    """Overwrite the GPU's L2 cache."""
    if device not in _buffers:
        _buffers[device] = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    _buffers[device].fill_(1)


def time_in_turns(
    calls: dict[str, Callable[[], Any]],
    device: str,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    slow: Collection[str] = (),
) -> dict[str, list[float]]:
    """Time the calls in turn, round after round, so that other load on the machine affects all of them alike.

    Each timed call follows an untimed one of the same provider, so that it does not pay for caches filled and memory
    returned to the system by the previous provider. Warm-up: two calls each, then up to four rounds in a quarter of the
    time. Calls named in ``slow`` take seconds; they are warmed up once and timed in two rounds only.
    """
    settle_malloc()
    for name, call in calls.items():
        for _ in range(1 if name in slow else 2):
            call()
    synchronize(device)
    begin = _clock()
    for _ in range(4):  # untimed: let the allocators reach a steady state
        for name, call in calls.items():
            if name not in slow and _clock() - begin < seconds / 4:
                call()
    synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = _clock()
    rounds = 0
    while rounds < min_rounds or (_clock() - begin < seconds and rounds < max_rounds):
        for name, call in calls.items():
            if name in slow:
                if rounds >= 2:
                    continue
            else:
                call()
            times[name].append(milliseconds(call, device))
        rounds += 1
        if rounds == 2 and slow:
            begin = _clock()
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """Return the 20th percentile, median and 80th percentile."""
    if len(times) == 1:
        return {"p20": times[0], "median": times[0], "p80": times[0]}
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"p20": round(fifths[0], 4), "median": round(statistics.median(times), 4), "p80": round(fifths[3], 4)}


def ceilings(device: str) -> dict[str, float]:
    """Return this machine's best rates per second: bytes copied (read + written), matrix FLOP, exponentials.

    On a CPU, products and exponentials are the faster of torch's and of loops in registers (:func:`peak_rates`).
    """
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
    best = {name: min(t) / 1e3 for name, t in time_in_turns(calls, device, seconds=1.5).items()}
    flop = {name: round(2 * side**3 / best[name]) for name in ("fp32", "bf16", "fp64") if name in best}
    rates = {
        "matmul_flop_per_s": flop.get("fp32", flop["bf16"]),
        "matmul_bf16_flop_per_s": flop["bf16"],
        "exp_per_s": round(max(n // 8 / best["exp"], n // 256 / best["exp_cached"])),
    }
    if not gpu:
        rates["matmul_fp64_flop_per_s"] = flop["fp64"]
        for name, rate in peak_rates(torch.get_num_threads()).items():
            rates[name] = max(rates[name], rate)
    return {"copy_bytes_per_s": round(2 * 4 * n / best["copy"]), **rates}


def peak_rates(threads: int, rounds: int = 20) -> dict[str, int]:
    """Return the peak FLOP and exponentials per second of ``threads`` cores, or none without the C++ kernels.

    The exponential is the kernels' own; operands stay in registers or in the first-level cache.
    """
    if unavailable_reason("cpu") is not None:
        return {}
    cpu = native("cpu")
    loops = {
        "matmul_flop_per_s": ("float32", 100_000),  # about 20 ms each
        "matmul_bf16_flop_per_s": ("bfloat16", 100_000),
        "matmul_fp64_flop_per_s": ("float64", 100_000),
        "exp_per_s": ("exp", 100_000),
    }
    best = dict.fromkeys(loops, 0.0)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            for name, (operation, repeats) in loops.items():
                begin = _clock()
                count = sum(pool.map(cpu.peak, [operation] * threads, [repeats] * threads))
                best[name] = max(best[name], count / (_clock() - begin))
    return {name: round(rate) for name, rate in best.items()}


def environment(device: str) -> dict[str, Any]:
    """Return the hardware, the versions and the commit of a run; the caller adds the ceilings."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    facts = _info.environment(device)
    status = git("status", "--porcelain", "--untracked-files=no")
    names = ("device", "driver", "cuda", "cpu", "cores", "threads", "torch", "triton", "python")
    return {
        **{name: facts[name] for name in names},
        "isa": None if unavailable_reason("cpu") else native("cpu").isa(),
        "isa_limits": {name: os.environ[name] for name in ISA_LIMITS if name in os.environ},
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": facts["date"],
        **({"clock": "CPU time of one thread"} if uses_cpu_time() else {}),
    }


def device_slug(env: dict[str, Any]) -> str:
    """Return the folder name of a device's results: lower-case letters, digits and dashes; for a CPU also its cores."""
    name = env["device"] if env["device"] != env["cpu"] else f"{env['device']} {env['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_results(path: Path, env: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> None:
    """Write a results file atomically."""
    with replace_files(path) as (partial,):
        partial.write_text(json.dumps({"environment": env, "rows": rows} | more, indent=1) + "\n", encoding="utf-8")

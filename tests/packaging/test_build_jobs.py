"""Parallel jobs within the limits of a container, and the progress lines of an installation."""

from __future__ import annotations

import importlib.util
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

from fastkd import _machine

ROOT = Path(__file__).parents[2]


def test_installation_shows_compiled_files():
    shown = runpy.run_path(str(ROOT / "scripts" / "install.py"))["shown"]
    object_file = "  [7/25] Building CXX object CMakeFiles/cpu_avx2.dir/cpu/relation/gram.cpp.o"
    assert shown(object_file) == "[7/25] compiled cpu/relation/gram.cpp (avx2)"
    object_file = "  [8/25] Building CUDA object CMakeFiles/_cuda.dir/cuda/relation/backward.cu.o"
    assert shown(object_file) == "[8/25] compiled cuda/relation/backward.cu"
    assert shown("  [25/25] Linking CXX shared module _cpu.cpython-311.so") == "[25/25] linked fastkd._cpu"
    assert (
        shown("  --   CUDA kernels: sm_90 compute_90 (nvcc 13.0.88)") == "CUDA kernels: sm_90 compute_90 (nvcc 13.0.88)"
    )
    assert shown("Collecting torch>=2.11") == "Collecting torch>=2.11"
    assert shown("ERROR: No matching distribution found for torch") is not None
    for hidden in ("  -- Detecting CXX compiler ABI info", "  running build_py", "Requirement already satisfied: pip"):
        assert shown(hidden) is None


def container(root: Path, membership: str, **files: str) -> Path:
    """Create the files of a control group under ``root``; in their names "__" is "/" and "0" is "."."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    (root / "proc/meminfo").write_text(f"MemTotal: {2**25} kB\nMemAvailable: {2**24} kB\n")  # 32 and 16 GiB
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("0", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


GIB = 2**30
V1 = "9:name=systemd:/x\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n"


@pytest.mark.parametrize(
    ("membership", "files", "cores", "memory"),
    [
        ("0::/\n", {}, 64, 16 * GIB),
        ("", {"cpu0max": "100000 100000"}, 64, 16 * GIB),  # not in any group
        ("0::/\n", {"cpu0max": "max 100000", "memory0max": "max"}, 64, 16 * GIB),
        ("0::/\n", {"cpu0max": "250000 100000", "memory0max": f"{4 * GIB}"}, 3, 4 * GIB),
        ("0::/\n", {"cpu0max": "50000 100000"}, 1, 16 * GIB),
        # Memory of the container's other processes counts as used, the page cache does not.
        (
            "0::/\n",
            {
                "memory0max": f"{8 * GIB}",
                "memory0current": f"{5 * GIB}",
                "memory0stat": f"anon 1\ninactive_file {2 * GIB}",
            },
            64,
            5 * GIB,
        ),
        # The lowest limit of a group and its parents.
        (
            "0::/jobs/one\n",
            {"jobs__cpu0max": "200000 100000", "jobs__one__cpu0max": "max 100000", "jobs__memory0max": f"{GIB}"},
            2,
            GIB,
        ),
        # The path is the host's; only the container's part of it is mounted.
        ("0::/kube/pod/abc\n", {"cpu0max": "200000 100000", "memory0max": f"{3 * GIB}"}, 2, 3 * GIB),
        (
            V1,
            {
                "cpu,cpuacct__docker__abc__cpu0cfs_quota_us": "400000",
                "cpu,cpuacct__docker__abc__cpu0cfs_period_us": "100000",
                "memory__docker__abc__memory0limit_in_bytes": f"{6 * GIB}",
                "memory__docker__abc__memory0usage_in_bytes": f"{GIB}",
                "memory__memory0limit_in_bytes": "9223372036854771712",
            },
            4,
            5 * GIB,
        ),
        (
            V1,
            {
                "cpu__cpu0cfs_quota_us": "-1",
                "cpu__cpu0cfs_period_us": "100000",
                "memory__memory0limit_in_bytes": "9223372036854771712",
            },
            64,
            16 * GIB,
        ),
    ],
)
def test_container_limits_bound_processors_and_memory(membership, files, cores, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    root = container(tmp_path, membership, **files)
    assert _machine.cores(root) == cores
    assert _machine.memory(root) == memory


def test_process_affinity_bounds_the_processors(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert _machine.cores(container(tmp_path, "0::/\n", cpu0max="800000 100000")) == 2
    assert _machine.cores(tmp_path / "no proc") == 2
    assert _machine.memory(tmp_path / "no proc") is None


@pytest.mark.parametrize(
    ("cores", "memory", "requested", "jobs"),
    [(8, 64 * GIB, "", 8), (8, 4 * GIB, "", 2), (8, GIB, "", 1), (8, None, "", 8), (2, GIB, "6", 6)],
)
def test_jobs_fit_the_processors_and_the_memory(cores, memory, requested, jobs, monkeypatch):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    setup: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setenv("MAX_JOBS", requested)
    limits = {"cores": lambda: cores, "memory": lambda: memory}
    monkeypatch.setitem(setup["jobs"].__globals__, "runpy", type("Limits", (), {"run_path": lambda path: limits}))
    assert setup["jobs"]() == jobs

"""Builds fastkd: the Python packages, and csrc/ with CMake and Ninja through scikit-build-core's setuptools plugin.

Never imports torch, and needs no flag, GPU or compiler: what cannot be built is left out and said (see
csrc/CMakeLists.txt and ``fastkd.info()``). The environment variables it honours:

    FASTKD_CUDA   "auto" (default): CUDA kernels if nvcc works; "1": fail without them; "0": leave them out
    MAX_JOBS      compiler processes at a time; by default bounded by cores and memory
"""

from __future__ import annotations

import os

from setuptools import find_packages, setup

GIB_PER_JOB = 1.5  # what nvcc takes at its worst, with room


def jobs() -> int:
    """Compiler processes that fit this machine: its usable cores, and its memory."""
    if asked := os.environ.get("MAX_JOBS"):
        if not asked.isdigit() or asked == "0":
            raise SystemExit(f"MAX_JOBS: expected a whole number above 0, got {asked!r}")
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, OSError, ValueError):  # not on every system
        return cores
    return max(1, min(cores, int(memory / GIB_PER_JOB)))


def check_switches() -> None:
    """Refuse a misspelt switch rather than build something else."""
    cuda = os.environ.get("FASTKD_CUDA", "auto")
    if cuda not in ("", "auto", "0", "1"):
        raise SystemExit(f"FASTKD_CUDA: expected auto, 0 or 1, got {cuda!r}")


check_switches()
os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(jobs()))

setup(
    packages=[
        *find_packages(include=["fastkd", "fastkd.*"]),
        "fastkd.data.assets",  # no Python inside: named, so that setuptools takes them for what they are
        "fastkd.models.assets",
        "fastkd.kernels",
        *(f"fastkd.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fastkd.kernels": "kernels"},
    package_data={"": ["py.typed", "**/*.txt", "**/*.json", "**/*.safetensors", "**/*.html"]},
    exclude_package_data={"fastkd": ["_build_info.json"]},
    cmake_source_dir="csrc",
)

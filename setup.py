"""Build fastkd: the Python packages, and csrc/ with CMake and Ninja through scikit-build-core's setuptools plugin.

Needs no torch, flags, GPU or compiler: modules that cannot be built are skipped and reported (csrc/CMakeLists.txt,
``fastkd.info()``). Environment variables:

    FASTKD_CUDA          "auto" (default): CUDA kernels if nvcc works; "1": fail without them; "0": skip them
    FASTKD_CUDA_TARGETS  chips to compile for: the visible GPUs' (default; all without a GPU), "native", "all", "80,90"
    MAX_JOBS             number of parallel compiler processes; by default as many as cores and memory allow
"""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
GIB_PER_JOB = 1.5  # peak memory of nvcc, with a margin


def jobs() -> int:
    """Return the number of compiler processes that the usable cores and memory of this machine or container allow."""
    if requested := os.environ.get("MAX_JOBS"):
        if not requested.isdigit() or requested == "0":
            raise SystemExit(f"MAX_JOBS: expected a whole number above 0, got {requested!r}")
        return int(requested)
    machine = runpy.run_path(str(ROOT / "fastkd" / "_machine.py"))
    memory = machine["memory"]()
    cores: int = machine["cores"]()
    return cores if memory is None else max(1, min(cores, int(memory / 2**30 / GIB_PER_JOB)))


def check_switches() -> None:
    """Raise SystemExit if FASTKD_CUDA has an unknown value."""
    cuda = os.environ.get("FASTKD_CUDA", "auto")
    if cuda not in ("", "auto", "0", "1"):
        raise SystemExit(f"FASTKD_CUDA: expected auto, 0 or 1, got {cuda!r}")


class Build(build):
    """Empty the build folder first: files of an earlier version would get into the wheel."""

    def run(self) -> None:
        """Run the command."""
        # Only the default folder, not one that the user named.
        if self.build_lib in (self.build_purelib, self.build_platlib):
            clear(self.build_lib)
        super().run()


class BdistWheel(bdist_wheel):
    """Empty the folder to be packed first: a killed build leaves files in it."""

    def run(self) -> None:
        """Run the command."""
        if self.bdist_dir and ROOT in Path(self.bdist_dir).resolve().parents:
            clear(self.bdist_dir)
        super().run()


def clear(folder: str) -> None:
    """Remove a folder and its contents, if it exists."""
    if os.path.lexists(folder):
        shutil.rmtree(folder)


if __name__ == "__main__":
    check_switches()
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(jobs()))
    setup(
        packages=[
            *find_packages(include=["fastkd", "fastkd.*"]),
            "fastkd.cli.assets",  # data only: listed so that setuptools treats them as packages
            "fastkd.data.assets",
            "fastkd.models.assets",
            "fastkd.kernels",
            *(f"fastkd.kernels.{name}" for name in find_packages("kernels")),
        ],
        package_dir={"fastkd.kernels": "kernels"},
        package_data={"": ["py.typed", "**/*.txt", "**/*.json", "**/*.yaml", "**/*.safetensors", "**/*.html"]},
        exclude_package_data={"fastkd": ["_build_info*.json"]},
        cmake_source_dir="csrc",
        cmdclass={"build": Build, "bdist_wheel": BdistWheel},
    )

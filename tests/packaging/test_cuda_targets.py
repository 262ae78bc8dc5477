"""The chips that a build compiles CUDA kernels for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from emulation import tool

ROOT = Path(__file__).parents[2]


def on_path(folder: Path, program: str, script: str) -> str:
    """Write a shell script that stands in for ``program`` and return a PATH that finds it first."""
    folder.mkdir(exist_ok=True)
    (folder / program).write_text(f"#!/bin/sh\n{script}\n")
    (folder / program).chmod(0o755)
    return os.pathsep.join([str(folder), os.environ.get("PATH", "")])


def selected_targets(path: str, requested: str) -> subprocess.CompletedProcess[str]:
    try:
        command = [tool("cmake"), "-P", str(ROOT / "csrc" / "cmake" / "CudaTargets.cmake")]
    except RuntimeError as error:
        pytest.skip(str(error))
    environment = os.environ | {"PATH": path, "FASTKD_CUDA_TARGETS": requested}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


ALL = "80;90;100;120"
NO_GPU = "exit 9"


@pytest.mark.parametrize(
    ("nvidia_smi", "requested", "targets"),
    [
        (NO_GPU, "", ALL),
        ("echo 9.0", "", "90"),
        ("echo 9.0", "all", ALL),
        ("echo 9.0", "native", "90"),
        ("echo 9.0", "120, 80", "80;120"),
        ("echo 8.9; echo 8.0; echo 8.9", "", "80;89"),
        (
            "echo 8.7; echo 10.3; echo 12.1",
            "",
            "86;100;120",
        ),  # these run the code for an earlier chip of their generation
        ("echo 9.0; echo 11.0", "", ALL),  # one of the GPUs needs the PTX
        ("echo 7.5", "", ALL),
        ("echo No devices were found", "", ALL),
    ],
)
def test_cuda_targets_follow_request_and_visible_gpus(tmp_path, nvidia_smi, requested, targets):
    done = selected_targets(on_path(tmp_path, "nvidia-smi", nvidia_smi), requested)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == targets


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("native", "FASTKD_CUDA_TARGETS=native needs a supported GPU"),
        ("hopper", "expected all, native, or some of 80, 86, 89, 90, 100, 120, separated by commas; got 'hopper'"),
        ("80,103", "got '80,103'"),
    ],
)
def test_rejects_cuda_targets(tmp_path, requested, message):
    done = selected_targets(on_path(tmp_path, "nvidia-smi", NO_GPU), requested)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("nvidia_smi", "requested", "switch"),
    [("echo 'GPU 0: NVIDIA H100'", None, "auto"), (NO_GPU, None, "0"), ("echo", None, "0"), (NO_GPU, "1", "1")],
)
def test_make_compiles_cuda_kernels_only_for_a_visible_gpu(tmp_path, nvidia_smi, requested, switch):
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    environment = {name: value for name, value in os.environ.items() if name not in ("FASTKD_CUDA", "MAKEFLAGS")}
    environment |= {"PATH": on_path(tmp_path, "nvidia-smi", nvidia_smi)} | (
        {"FASTKD_CUDA": requested} if requested else {}
    )
    done = subprocess.run(
        ["make", "-s", "--eval", "show:; @echo $$FASTKD_CUDA", "show"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == switch, done.stderr

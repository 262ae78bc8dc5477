"""Make a fake checkout for scripts/gpu_check.sh: a fake GPU, tiny tests, and tools that do almost nothing."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "gpu"

NVIDIA_SMI = """#!/bin/sh
case "$*" in *query-gpu*) echo "Fake GPU, 9.0, 580.1" ;; *) echo "GPU 0: fake" ;; esac
"""
# A Python whose torch reports a GPU and whose pip installs only an empty package fastkd.
PYTHON = f"""#!/bin/sh
case "$*" in
  *is_available*) exit 0 ;;
  *"-m pip install"*)
    case "$*" in *" .")
      [ -z "$PIP_FAILS" ] || {{ echo "no compiler here"; exit 1; }}
      echo built >> "$PIP_LOG" ;;
    esac
    while [ "$1" != --target ]; do shift; done
    mkdir -p "$2/fastkd" && echo "def info(): return 'fake'" > "$2/fastkd/__init__.py"
    cp {ROOT}/fastkd/errors.py "$2/fastkd" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
SANITIZER = """#!/bin/sh
[ "$2" != "$SANITIZER_FINDS" ] || { echo "Invalid __global__ read"; exit 9; }
shift 8
exec "$@"
"""
# Writes one line per call, as the real scripts do.
LINES = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("out", type=pathlib.Path)
known, rest = parser.parse_known_args()
with known.out.open("a") as file:
    print(json.dumps({"check": "%s", "ok": True, "arguments": rest}), file=file, flush=True)
"""
KERNELS = """
import time
import pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("i", range(4))
def test_quick(i):
    pass

def test_wrong():
    assert 1 + 1 == 3, "sums are wrong"
"""


def script(name: str) -> Any:
    """Import a module of scripts/gpu or of the benchmarks."""
    for path in (str(SCRIPTS), str(ROOT)):
        if path not in sys.path:
            sys.path.append(path)
    return importlib.import_module(name)


def checkout(folder: Path, kernels: str = KERNELS) -> Path:
    """Write the checkout; ``kernels`` is the only non-empty test file."""
    (folder / "scripts" / "gpu").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "gpu_check.sh", folder / "scripts")
    for path in SCRIPTS.glob("*.py"):
        shutil.copy(path, folder / "scripts" / "gpu")
    for name in ("first_light", "sanitize", "measure_workloads"):
        (folder / "scripts" / "gpu" / f"{name}.py").write_text(LINES % name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "fastkd").mkdir()
    (folder / "fastkd" / "__init__.py").write_text("")
    shutil.copy(ROOT / "fastkd" / "errors.py", folder / "fastkd")  # pyproject.toml's warning filters name its class
    for name in ("_machine.py", "_atomic.py"):  # read by the scripts
        shutil.copy(ROOT / "fastkd" / name, folder / "fastkd")
    for name in script("kernel_tests").KERNEL_TESTS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "tests" / "ops" / "test_relation_cuda.py").write_text(kernels)
    tools = folder / "tools"
    tools.mkdir()
    for name, text in {"nvidia-smi": NVIDIA_SMI, "python": PYTHON, "compute-sanitizer": SANITIZER}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return the environment in which the script of the checkout finds the fake tools."""
    tools = folder / "tools"
    return os.environ | {
        "PATH": f"{tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(tools / "python"),
        "PIP_LOG": str(folder / "pip.log"),
    } | more  # fmt: skip


def check(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/gpu_check.sh of the checkout."""
    command = ["bash", str(folder / "scripts" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(folder, **more), timeout=300)

"""Provide ``fastkd._cuda`` and its facts to tests: the installed module, or a shared build for a single chip."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from emulation import CSRC, tool
from shared_build import shared_folder

import fastkd
from fastkd import _native

ROOT = CSRC.parent
TARGET = "90"  # compiled where fastkd is installed without CUDA kernels
READERS = [ROOT / "benchmarks" / name for name in ("cuda_facts.py", "aot/compiler.py")]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


class CudaBuild(NamedTuple):
    """A compiled module, its build information, and the rows of ``benchmarks.cuda_facts``."""

    module: Path
    info: dict[str, Any]
    rows: list[dict[str, Any]]

    def load(self) -> ModuleType:
        """Import and return the module under another name, so that ``fastkd._cuda`` may be loaded too."""
        spec = importlib.util.spec_from_file_location("built._cuda", self.module)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


@functools.cache
def cuda_build() -> CudaBuild:
    """Return the installed module, or one compiled for ``TARGET``; skip the test if neither is possible."""
    pytest.importorskip("triton", reason="Triton, whose cuobjdump reads the module, is not installed")
    info = _native.build_info().get("cuda", {})
    if info.get("built"):
        module = Path(fastkd.__file__).parent / f"_cuda{SUFFIX}"
        with shared_folder("cuda-facts", module, *_texts(READERS)) as folder:
            return CudaBuild(module, info, _facts(folder, "--module", str(module)))
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None:
        pytest.skip("fastkd was installed without CUDA kernels, and nvcc is not installed")
    pytest.importorskip("pybind11", reason="pybind11, needed to build the CUDA kernels, is not installed")
    try:
        tool("cmake"), tool("ninja")
    except RuntimeError as error:
        pytest.skip(str(error))
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    others = [CSRC / "CMakeLists.txt", *sorted(CSRC.glob("cmake/*")), *sorted(CSRC.glob("common/*"))]
    others += [*sorted(CSRC.glob("bindings/*")), *READERS]
    with shared_folder("cuda-module", CSRC / "cuda", TARGET, version, *_texts(others)) as folder:
        build = folder / "build"
        rows = _facts(folder, "--targets", TARGET, "--build", str(build))
        (record,) = build.glob("_build_info.*.json")
        return CudaBuild(build / f"_cuda{SUFFIX}", json.loads(record.read_text())["cuda"], rows)


def _texts(files: list[Path]) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in files]


def _facts(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run the script unless its results are in the folder already; return their rows."""
    file, unfinished = folder / "cuda.json", folder / "unfinished.json"
    if not file.exists():
        paths = (str(ROOT), os.environ.get("PYTHONPATH"))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        command = [sys.executable, "-m", "benchmarks.cuda_facts", *arguments, "--json", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert unfinished.exists(), (done.stdout + done.stderr)[-4000:]
        unfinished.rename(file)
    return json.loads(file.read_text(encoding="utf-8"))["rows"]

"""Provide ``fastkd._cuda`` and its facts to tests: the installed module, or what is compiled here for a single chip."""

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
from unittest.mock import patch

import pytest
from emulation import CSRC, tool
from shared_build import shared_folder

import fastkd
from fastkd import _native

sys.path.append(str(CSRC.parent))
from benchmarks import cuda_facts

TARGET = "90"  # compiled where fastkd is installed without CUDA kernels
SAMPLE = "cuda/softmax_kl/softmax_kl.cu"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


class CudaModule(NamedTuple):
    """A compiled module and its build information."""

    file: Path
    info: dict[str, Any]

    def load(self) -> ModuleType:
        """Import and return the module: fastkd's own under its name, any other under a different one.

        One file cannot be loaded under two names, since its types are registered once.
        """
        if self.file.parent == Path(fastkd.__file__).parent:
            return importlib.import_module("fastkd._cuda")
        spec = importlib.util.spec_from_file_location("built._cuda", self.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def installed_module() -> CudaModule | None:
    """Return the module installed with fastkd, if it was built."""
    info = _native.build_info().get("cuda", {})
    return CudaModule(Path(fastkd.__file__).parent / f"_cuda{SUFFIX}", info) if info.get("built") else None


@functools.cache
def cuda_module() -> CudaModule:
    """Return the installed module, or one compiled for ``TARGET`` without optimisation, which halves the time."""
    installed = installed_module()
    if installed:
        return installed
    with shared_folder("cuda-module", CSRC / "cuda", *_compiler_and_texts()) as folder:
        flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Xcicc -O0 -Xptxas -O0"
        with patch.dict(os.environ, NVCC_APPEND_FLAGS=flags.strip(), CMAKE_BUILD_TYPE="None"):
            module = cuda_facts.build(folder / "build", TARGET)
        return CudaModule(module, _build_info(module.parent))


class Facts(NamedTuple):
    """Rows of ``benchmarks.cuda_facts`` and the compiler they come from."""

    compiler: str
    rows: list[dict[str, Any]]


@functools.cache
def compiled_facts() -> Facts:
    """Return the facts of the installed module, or of ``SAMPLE`` compiled for ``TARGET``."""
    pytest.importorskip("triton", reason="Triton, whose cuobjdump reads the module, is not installed")
    installed = installed_module()
    if installed:
        return Facts(installed.info["compiler"], list(cuda_facts.facts(installed.file)))
    with shared_folder("cuda-sample", CSRC / "cuda", *_compiler_and_texts()) as folder:
        compiled = cuda_facts.build(folder, TARGET, SAMPLE)
        return Facts(_build_info(folder)["compiler"], list(cuda_facts.facts(compiled)))


def _build_info(folder: Path) -> dict[str, Any]:
    (record,) = folder.glob("_build_info.*.json")
    return json.loads(record.read_text(encoding="utf-8"))["cuda"]


def _compiler_and_texts() -> list[str]:
    """Return what a build depends on in addition to csrc/cuda; skip the test where it is not possible."""
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
    others += sorted(CSRC.glob("bindings/*"))
    return [TARGET, version, *(path.read_text(encoding="utf-8") for path in others)]

"""Run the CUDA C++ kernels on CPU tensors: build the same sources for the host (csrc/tests/emulation)."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from shared_build import shared_folder

CSRC = Path(__file__).parent.parent.parent / "csrc"
READY = "FASTKD_TEST_EMULATED"  # environment variable: a folder with the built module


@contextmanager
def emulated() -> Iterator[ModuleType]:
    """Replace ``fastkd._cuda`` by the module built for the host, which takes CPU tensors.

    Raises:
        RuntimeError: the module cannot be built here, or this machine has a GPU, which runs the kernels itself.
    """
    import fastkd
    from fastkd.ops import dispatch, launch

    module = _module()
    places: list[tuple[dict[str, Any], str]] = [(sys.modules, "fastkd._cuda"), (vars(fastkd), "_cuda")]
    hidden = [place.get(key) for place, key in places]
    reasons = _pop_cached_reasons(dispatch)
    for place, key in places:
        place[key] = module
    launch.native.cache_clear()
    try:
        yield module
    finally:
        for (place, key), was in zip(places, hidden, strict=True):
            if was is None:
                del place[key]
            else:
                place[key] = was
        launch.native.cache_clear()
        _pop_cached_reasons(dispatch)
        dispatch._reasons.update(reasons)


def _pop_cached_reasons(dispatch: Any) -> dict[Any, Any]:
    """Remove and return the cached availability of the backend."""
    found = {key: reason for key, reason in dispatch._reasons.items() if key[0] == "cuda"}
    for key in found:
        del dispatch._reasons[key]
    return found


def _module() -> ModuleType:
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU, which runs the kernels itself")
    return _built()


@functools.cache
def _built() -> ModuleType:
    ready = os.environ.get(READY)
    folder = Path(ready) if ready else _built_folder()
    path = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    # Under another name: pybind11 would return this module wherever the real one is imported later.
    spec = importlib.util.spec_from_file_location("emulated._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _built_folder() -> Path:
    with shared_folder("emulated", CSRC) as folder:
        complete = folder / "complete"
        if not complete.exists():
            build(folder)
            complete.touch()
    return folder


def build(folder: Path, sources: Path = CSRC, *options: str) -> Path:
    """Build the module for the host in ``folder`` and return the folder; raise RuntimeError if that fails."""
    configure = [
        *(tool("cmake"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-S", str(sources), "-B", str(folder)),
        *("-DFASTKD_EMULATE=ON", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={_pybind11()}", *options),
    ]
    for command in (configure, [tool("cmake"), "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the kernels cannot be built for the host:\n{(done.stdout + done.stderr)[-6000:]}")
    return folder


def tool(name: str) -> str:
    """Return the path of a program next to this Python or on PATH; raise RuntimeError if there is none."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise RuntimeError(
            f"building the kernels for the host needs {name}, which is not installed; pip install {name}"
        )
    return found


def _pybind11() -> str:
    try:
        import pybind11
    except ImportError:
        raise RuntimeError("building the kernels for the host needs pybind11; pip install pybind11") from None
    return pybind11.get_cmake_dir()

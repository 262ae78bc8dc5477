"""The CUDA C++ kernels on CPU tensors: built for the host from the same sources (csrc/tests/emulation), for tests."""

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
READY = "FASTKD_TEST_EMULATED"  # a folder with the module, built already


@contextmanager
def emulated() -> Iterator[ModuleType]:
    """Within it ``fastkd._cuda`` is the module built for the host, which takes CPU tensors.

    Raises:
        RuntimeError: it cannot be built here, or this machine's GPU runs the kernels themselves; says which.
    """
    import fastkd
    from fastkd.ops import dispatch, launch

    module = _module()
    places: list[tuple[dict[str, Any], str]] = [(sys.modules, "fastkd._cuda"), (vars(fastkd), "_cuda")]
    hidden = [place.get(key) for place, key in places]
    answers = _answers(dispatch)
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
        _answers(dispatch)
        dispatch._reasons.update(answers)


def _answers(backends: Any) -> dict[Any, Any]:
    """What is remembered of the backend, which is then forgotten."""
    found = {key: reason for key, reason in backends._reasons.items() if key[0] == "cuda"}
    for key in found:
        del backends._reasons[key]
    return found


def _module() -> ModuleType:
    if torch.cuda.is_available():
        raise RuntimeError("this machine's GPU runs the kernels themselves")
    return _built()


@functools.cache
def _built() -> ModuleType:
    ready = os.environ.get(READY)
    folder = Path(ready) if ready else _built_folder()
    path = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    # By another name: pybind11 would hand out this module wherever the real one's name is imported later.
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
    """Build the module for the host in ``folder``, which is returned; RuntimeError says why it cannot be."""
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
    """A program beside this Python, or on PATH."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise RuntimeError(f"the kernels are built for the host by {name}, which is not installed")
    return found


def _pybind11() -> str:
    try:
        import pybind11
    except ImportError:
        raise RuntimeError("the kernels built for the host need pybind11, which is not installed") from None
    return pybind11.get_cmake_dir()

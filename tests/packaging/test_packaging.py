"""An installation holds compiled modules that need neither torch nor CUDA libraries, and a record of the build."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import files
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from cuda_build import cuda_module

from fastkd import _native

ROOT = Path(__file__).parents[2]


def built(name: str) -> Path:
    """Return the file of a compiled module; skip with the reason why it was not built."""
    if name == "cuda":
        return cuda_module().file
    info = _native.build_info().get(name)
    if info is None:
        pytest.skip("this source tree was never installed")
    if not info["built"]:
        pytest.skip(f"fastkd._{name} was not built: {info['reason']}")
    spec = importlib.util.find_spec(f"fastkd._{name}")
    assert spec is not None, f"the build information lists fastkd._{name}, which is not installed"
    assert spec.origin is not None
    return Path(spec.origin)


def importing(*names: str) -> str:
    """Return code after which the modules, installed or built for these tests, import as parts of fastkd."""
    return f"import fastkd; fastkd.__path__ += {[str(built(name).parent) for name in names]!r}\n"


def output(*command: str | Path, **environment: str) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        [str(c) for c in command], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_build_info_records_modules_or_reasons() -> None:
    info = _native.build_info()
    if not info:
        pytest.skip("this source tree was never installed")
    assert set(info) == {"cpu", "cuda"}
    for name, facts in info.items():
        assert facts["built"] is (importlib.util.find_spec(f"fastkd._{name}") is not None)
        assert facts["built"] or len(facts["reason"]) > 10
    if info["cpu"]["built"]:
        assert info["cpu"]["isas"][0] == "baseline"
        assert re.match(r"\w+ \d+", info["cpu"]["compiler"])
    if info["cuda"]["built"]:
        check_targets(info["cuda"]["targets"])


def check_targets(targets: list[str]) -> None:
    assert "sm_103" not in targets
    assert targets[-1] in ("compute_80", "compute_100")  # PTX for later chips


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_modules_need_neither_torch_nor_a_cuda_library(name: str) -> None:
    needed = output("readelf", "-d", built(name))
    libraries = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", needed))
    allowed = re.compile(r"(libstdc\+\+|libgcc_s|libc|libm|libgomp|libomp|libpthread|libdl|librt|ld-linux[\w-]*)\.so")
    assert [library for library in libraries if not allowed.match(library)] == []
    undefined = output("nm", "-D", "--undefined-only", built(name))
    assert not re.search(r"c10|torch|THP|\bcu[A-Z]|\bcuda[A-Z]", undefined)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_modules_import_without_torch_and_without_a_gpu(name: str) -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # importing it would fail
{importing(name)}
from fastkd import _native
module = _native.load({name!r})
print(module.isa() if {name!r} == "cpu" else module.device_count())
"""
    printed = output(sys.executable, "-c", code, CUDA_VISIBLE_DEVICES="").strip()
    assert printed == "0" if name == "cuda" else printed in _native.build_info()["cpu"]["isas"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_modules_define_separate_types_for_the_same_classes(first: str, second: str) -> None:
    code = f"""
{importing(first, second)}
import fastkd._{first} as a, fastkd._{second} as b
print(a.Relation is b.Relation, a.PixelWord is b.PixelWord)
"""
    assert output(sys.executable, "-c", code).split() == ["False", "False"]


@pytest.mark.timeout(1800)
def test_cuda_module_reports_its_targets_and_cuda_errors() -> None:
    module = cuda_module()
    cuda = module.load()
    assert cuda.targets() == module.info["targets"]
    check_targets(module.info["targets"])
    assert cuda.runtime_version() >= 11080
    if cuda.device_count() == 0:
        unused = (256,) * 5  # addresses that are not read, since the launch fails
        with pytest.raises(RuntimeError, match="softmax_kl_forward: cudaError"):
            cuda.softmax_kl_forward(*unused, 1, 1, 4, (4, 4), (4, 4), "float32", 1.0, 0)


def test_load_rejects_unknown_modules() -> None:
    with pytest.raises(ValueError, match="name: expected 'cpu' or 'cuda', got 'tpu'"):
        _native.load("tpu")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({}, "never installed"),
        ({"cuda": {"built": False, "reason": "no working nvcc was found"}}, "no working nvcc was found.*FASTKD_CUDA=1"),
        ({"cuda": {"built": True}}, "was built but does not load here: no such symbol"),
    ],
)
def test_missing_module_error_states_reason_and_fix(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, Any], message: str
) -> None:
    def fail(name: str) -> None:
        raise ImportError("no such symbol")

    monkeypatch.setattr(_native, "build_info", lambda: info)
    monkeypatch.setattr(_native.importlib, "import_module", fail)
    with pytest.raises(ImportError, match=message):
        _native.load("cuda")


def test_kernels_and_data_are_part_of_the_package() -> None:
    import fastkd.kernels

    assert Path(fastkd.kernels.__file__).is_file()
    installed = {str(path) for path in files("fastkd") or ()}
    if not any(path.startswith("fastkd/") for path in installed):
        pytest.skip("an editable installation: the sources are the package")
    assert {"fastkd/py.typed", "fastkd/kernels/__init__.py"} <= installed
    assert sum(path.startswith("fastkd/_build_info.") for path in installed) == 1
    assert not any(path.startswith(("kernels/", "tests/", "csrc/")) for path in installed)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTKD_CUDA": "yes"}, "FASTKD_CUDA: expected auto, 0 or 1, got 'yes'"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS: expected a whole number above 0, got 'many'"),
    ],
)
def test_rejects_misspelt_build_switches(environment: dict[str, str], message: str) -> None:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert message in done.stderr


def test_no_machine_specific_or_inexact_compiler_flags() -> None:
    undone_in = {ROOT / "csrc" / "cmake" / "Exact.cmake", ROOT / "csrc" / "cpu" / "kernels.h"}  # see test_build.py
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.suffix != ".md" and path not in undone_in:
            assert not re.search(r"march=native|fast-math|use_fast_math|Ofast", path.read_text()), path


def test_lower_bounds_are_the_tested_versions() -> None:
    """``make test-versions`` runs the suite under tests/versions/oldest.txt, which pins every bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"]
    required = [*project["build-system"]["requires"], *project["project"]["dependencies"], *chain(*extras.values())]
    bounds = dict(re.sub(r"\[.*\]", "", requirement).split(">=") for requirement in required)
    lines = (ROOT / "tests" / "versions" / "oldest.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert set(pins) == set(bounds)
    for name, bound in bounds.items():
        missing = pins[name].count(".") - bound.count(".")
        assert pins[name] == bound + missing * ".0", name

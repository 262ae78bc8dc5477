"""The build: packaged files, several Python versions, compiler flags."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from emulation import tool

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "examples", "fastkd", "kernels")
TAG = "cpython-311-x86_64-linux-gnu"
OTHER = "cpython-399-x86_64-linux-gnu"


def cmake(*arguments: str | Path, **environment: str) -> str:
    try:
        command = [tool("cmake"), *map(str, arguments)]
    except RuntimeError as error:
        pytest.skip(str(error))
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return a copy of the sources, to build in."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build_info*")
            )
        else:
            shutil.copy(ROOT / name, tree / name)
    return tree


def test_wheel_holds_the_sources_and_nothing_of_earlier_builds(tree):
    sources = {
        path.relative_to(tree).as_posix() for name in ("fastkd", "kernels") for path in tree.rglob(f"{name}/**/*")
    }
    sources = {name for name in sources if not name.startswith("csrc/") and (tree / name).is_file()}
    expected = {f"fastkd/{name}" if name.startswith("kernels/") else name for name in sources}
    platform = f"{sys.platform}-{os.uname().machine}" if hasattr(os, "uname") else sys.platform
    tag = f"{sys.implementation.cache_tag}"
    for folder in (f"lib.{platform}-{tag}", "lib", f"bdist.{platform}/wheel"):
        left = tree / "build" / folder
        (left / "fastkd" / "old").mkdir(parents=True)
        for name in ("removed.py", "fastkd/removed.py", "fastkd/old/__init__.py", f"fastkd/_cpu.{OTHER}.so"):
            (left / name).write_text("left = True\n")
    (tree / "fastkd" / f"_cpu.{OTHER}.so").write_text("another Python's")
    (tree / "fastkd" / f"_build_info.{OTHER}.json").write_text("{}")
    (tree / "fastkd.egg-info").mkdir()
    (tree / "fastkd.egg-info" / "SOURCES.txt").write_text(f"fastkd/removed.py\nfastkd/_cpu.{OTHER}.so\n")
    environment = {"CXX": "/nowhere/c++", "FASTKD_CUDA": "0", "MAX_JOBS": "1"}  # nothing is compiled
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "out"],
        cwd=tree,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = (tree / "out").iterdir()
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    facts = {name for name in packed if name.startswith("fastkd/_build_info.")}  # with scikit-build-core
    assert OTHER not in str(facts)
    assert packed - facts == expected
    assert (tree / "fastkd" / f"_cpu.{OTHER}.so").exists()


def test_in_place_installation_replaces_only_the_modules_of_its_python(tmp_path):
    package = tmp_path / "tree" / "fastkd"
    package.mkdir(parents=True)
    for tag in (TAG, OTHER):
        for module in ("_cpu", "_cuda"):
            (package / f"{module}.{tag}.so").write_text(f"built earlier for {tag}")
        (package / f"_build_info.{tag}.json").write_text("{}")
    build = tmp_path / "build"
    cmake(
        "-G", "Ninja", "-S", ROOT / "csrc", "-B", build, f"-DSKBUILD_SOABI={TAG}", CXX="/nowhere/c++", FASTKD_CUDA="0"
    )
    cmake("--install", build, "--prefix", package.parent)
    remaining = {path.name for path in package.iterdir()}
    own = {f"_build_info.{TAG}.json"}  # without a compiler no module is built; the old ones are out of date
    assert remaining == own | {f"_cpu.{OTHER}.so", f"_cuda.{OTHER}.so", f"_build_info.{OTHER}.json"}
    assert json.loads((package / f"_build_info.{TAG}.json").read_text())["cpu"]["built"] is False
    assert (package / f"_build_info.{OTHER}.json").read_text() == "{}"


def test_each_python_reads_its_own_build_info():
    from fastkd import _native

    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    assert _native._build_info_name() == "_build_info" + suffix.rpartition(".")[0] + ".json"


FAST = {"CXXFLAGS": "-O2 -ffast-math -DKEPT", "LDFLAGS": "-Ofast", "CUDAFLAGS": "", "NVCC_APPEND_FLAGS": ""}


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Return CMake's output and the commands, by source file and for the link, with fast maths in the environment."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler is installed")
    build = tmp_path_factory.mktemp("build")
    sanitize = "-DFASTKD_SANITIZE=address"  # same options, without Python's headers and pybind11
    printed = cmake("-G", "Ninja", "-S", ROOT / "csrc", "-B", build, sanitize, FASTKD_CUDA="0", **FAST)
    listed = json.loads((build / "compile_commands.json").read_text())
    found = {Path(entry["file"]).name: shlex.split(entry["command"]) for entry in listed}
    rules = (build / "build.ninja").read_text()
    found["link"] = next(line for line in rules.splitlines() if "LINK_FLAGS = " in line).split()
    return printed, found


@pytest.mark.parametrize("flag", ["-ffast-math", "-funsafe-math-optimizations", "-ffinite-math-only", "-Ofast"])
def test_undoes_fast_maths_from_the_environment(commands, flag):
    _, found = commands
    command = [flag if word == "-ffast-math" else word for word in found["streamed.cpp"]]
    assert "-DKEPT" in command
    options = [word for word in command if word.startswith(("-O", "-f")) and "sanitize" not in word]
    macros = subprocess.run(
        [command[0], *options, "-O3", "-dM", "-E", "-xc++", os.devnull], capture_output=True, text=True, check=True
    ).stdout
    defined = dict((*line.split(None, 2), "")[1:3] for line in macros.splitlines())
    assert defined.get("__FINITE_MATH_ONLY__", "0") == "0"
    assert not {"__FAST_MATH__", "__ASSOCIATIVE_MATH__", "__RECIPROCAL_MATH__", "__NO_SIGNED_ZEROS__"} & set(defined)


def test_links_without_the_startup_code_that_flushes_denormals(commands):
    _, found = commands
    options = [word for word in found["link"] if word.startswith(("-O", "-f")) and "sanitize" not in word]
    assert "-Ofast" in options
    for flags, added in ((options, False), (["-ffast-math"], True)):
        done = subprocess.run(
            ["c++", "-ffast-math", *flags, "-shared", "-xc++", os.devnull, "-###"], capture_output=True, text=True
        )
        if added and "crtfastmath" not in done.stderr:
            pytest.skip("this compiler adds no such code")
        assert ("crtfastmath" in done.stderr) is added


@pytest.mark.parametrize("flag", ["-ffast-math", "-funsafe-math-optimizations", "-ffinite-math-only"])
def test_kernels_do_not_compile_with_fast_maths(flag):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler is installed")
    command = ["c++", "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc'}", "-DFASTKD_ISA=baseline", "-xc++"]
    command += ["-include", "cpu/kernels.h", os.devnull]
    assert subprocess.run(command, capture_output=True).returncode == 0
    done = subprocess.run([*command[:1], flag, *command[1:]], capture_output=True, text=True)
    assert done.returncode != 0
    assert "fastkd needs exact arithmetic: remove -ffast-math" in done.stderr


def test_removes_fast_maths_from_nvcc_flags(tmp_path):
    if not shutil.which("nvcc") or not importlib.util.find_spec("pybind11"):
        pytest.skip("needs nvcc and pybind11")
    import pybind11

    fast = {"CUDAFLAGS": "-lineinfo --use_fast_math -ftz=true", "NVCC_APPEND_FLAGS": "-use_fast_math -DKEPT"}
    printed = cmake(
        *("-G", "Ninja", "-S", ROOT / "csrc", "-B", tmp_path, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-DSKBUILD_SOABI={TAG}"),
        **fast | {"FASTKD_CUDA": "auto", "FASTKD_CUDA_TARGETS": "80"},
    )
    assert "--use_fast_math in CUDAFLAGS, -use_fast_math in NVCC_APPEND_FLAGS" in printed
    listed = json.loads((tmp_path / "compile_commands.json").read_text())
    (command,) = (entry["command"] for entry in listed if entry["file"].endswith("cuda/softmax_kl/softmax_kl.cu"))
    assert "-lineinfo" in command
    assert "fast_math" not in command
    assert "ftz" not in command
    rules = (tmp_path / "build.ninja").read_text() + (tmp_path / "CMakeFiles" / "rules.ninja").read_text()
    launches = {
        line for line in rules.splitlines() if "NVCC_APPEND_FLAGS" in line
    }  # in one of the two files, depending on CMake's version
    assert launches
    assert all("fast_math" not in line and "-DKEPT" in line for line in launches)

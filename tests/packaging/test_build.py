"""The build: packaged files, several Python versions, compiler flags, CUDA targets, parallel jobs and progress."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from emulation import tool

from fastkd import _machine

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


# --- CUDA targets -----------------------------------------------------------------------------------------------------


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


def test_installation_shows_compiled_files():
    shown = runpy.run_path(str(ROOT / "scripts" / "install.py"))["shown"]
    object_file = "  [7/25] Building CXX object CMakeFiles/cpu_avx2.dir/cpu/relation/gram.cpp.o"
    assert shown(object_file) == "[7/25] compiled cpu/relation/gram.cpp (avx2)"
    object_file = "  [8/25] Building CUDA object CMakeFiles/_cuda.dir/cuda/relation/backward.cu.o"
    assert shown(object_file) == "[8/25] compiled cuda/relation/backward.cu"
    assert shown("  [25/25] Linking CXX shared module _cpu.cpython-311.so") == "[25/25] linked fastkd._cpu"
    assert (
        shown("  --   CUDA kernels: sm_90 compute_90 (nvcc 13.0.88)") == "CUDA kernels: sm_90 compute_90 (nvcc 13.0.88)"
    )
    assert shown("Collecting torch>=2.11") == "Collecting torch>=2.11"
    assert shown("ERROR: No matching distribution found for torch") is not None
    for hidden in ("  -- Detecting CXX compiler ABI info", "  running build_py", "Requirement already satisfied: pip"):
        assert shown(hidden) is None


# --- jobs -------------------------------------------------------------------------------------------------------------


def container(root: Path, membership: str, **files: str) -> Path:
    """Create the files of a control group under ``root``; in their names "__" is "/" and "0" is "."."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    (root / "proc/meminfo").write_text(f"MemTotal: {2**25} kB\nMemAvailable: {2**24} kB\n")  # 32 and 16 GiB
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("0", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


GIB = 2**30
V1 = "9:name=systemd:/x\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n"


@pytest.mark.parametrize(
    ("membership", "files", "cores", "memory"),
    [
        ("0::/\n", {}, 64, 16 * GIB),
        ("", {"cpu0max": "100000 100000"}, 64, 16 * GIB),  # not in any group
        ("0::/\n", {"cpu0max": "max 100000", "memory0max": "max"}, 64, 16 * GIB),
        ("0::/\n", {"cpu0max": "250000 100000", "memory0max": f"{4 * GIB}"}, 3, 4 * GIB),
        ("0::/\n", {"cpu0max": "50000 100000"}, 1, 16 * GIB),
        # Memory of the container's other processes counts as used, the page cache does not.
        (
            "0::/\n",
            {
                "memory0max": f"{8 * GIB}",
                "memory0current": f"{5 * GIB}",
                "memory0stat": f"anon 1\ninactive_file {2 * GIB}",
            },
            64,
            5 * GIB,
        ),
        # The lowest limit of a group and its parents.
        (
            "0::/jobs/one\n",
            {"jobs__cpu0max": "200000 100000", "jobs__one__cpu0max": "max 100000", "jobs__memory0max": f"{GIB}"},
            2,
            GIB,
        ),
        # The path is the host's; only the container's part of it is mounted.
        ("0::/kube/pod/abc\n", {"cpu0max": "200000 100000", "memory0max": f"{3 * GIB}"}, 2, 3 * GIB),
        (
            V1,
            {
                "cpu,cpuacct__docker__abc__cpu0cfs_quota_us": "400000",
                "cpu,cpuacct__docker__abc__cpu0cfs_period_us": "100000",
                "memory__docker__abc__memory0limit_in_bytes": f"{6 * GIB}",
                "memory__docker__abc__memory0usage_in_bytes": f"{GIB}",
                "memory__memory0limit_in_bytes": "9223372036854771712",
            },
            4,
            5 * GIB,
        ),
        (
            V1,
            {
                "cpu__cpu0cfs_quota_us": "-1",
                "cpu__cpu0cfs_period_us": "100000",
                "memory__memory0limit_in_bytes": "9223372036854771712",
            },
            64,
            16 * GIB,
        ),
    ],
)
def test_container_limits_bound_processors_and_memory(membership, files, cores, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    root = container(tmp_path, membership, **files)
    assert _machine.cores(root) == cores
    assert _machine.memory(root) == memory


def test_process_affinity_bounds_the_processors(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert _machine.cores(container(tmp_path, "0::/\n", cpu0max="800000 100000")) == 2
    assert _machine.cores(tmp_path / "no proc") == 2
    assert _machine.memory(tmp_path / "no proc") is None


@pytest.mark.parametrize(
    ("cores", "memory", "requested", "jobs"),
    [(8, 64 * GIB, "", 8), (8, 4 * GIB, "", 2), (8, GIB, "", 1), (8, None, "", 8), (2, GIB, "6", 6)],
)
def test_jobs_fit_the_processors_and_the_memory(cores, memory, requested, jobs, monkeypatch):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    setup: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setenv("MAX_JOBS", requested)
    limits = {"cores": lambda: cores, "memory": lambda: memory}
    monkeypatch.setitem(setup["jobs"].__globals__, "runpy", type("Limits", (), {"run_path": lambda path: limits}))
    assert setup["jobs"]() == jobs


def copy_package(folder: Path) -> Path:
    """Copy fastkd's sources without build outputs."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info*", "assets")
    return Path(shutil.copytree(ROOT / "fastkd", folder / "fastkd", ignore=ignore))


def record(site: Path, **origin: Any) -> None:
    """Record an installation of fastkd in ``site``, as pip does."""
    facts = site / "fastkd-9.9.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: fastkd\nVersion: 9.9\n")
    (facts / "RECORD").write_text("")
    if origin:
        (facts / "direct_url.json").write_text(json.dumps(origin))


def unavailable_reasons(tree: Path, site: Path) -> dict[str, str]:
    """Return why the modules are unavailable to a Python started in ``tree``, and which package the tree hides."""
    code = f"""
import functools, json, sys
from importlib.metadata import distributions
from fastkd import _native
_native.distributions = functools.partial(distributions, path={[str(tree), str(site)]!r})  # not this machine's
answer = {{"hides": str(_native.hidden()), "kernels": _native.not_installed("fastkd.kernels")}}
try:
    _native.load("cpu")
except ImportError as error:
    print(json.dumps(answer | {{"cpu": str(error)}}))
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_error_names_a_checkout_that_hides_the_installed_package(tmp_path):
    tree, site = tmp_path / "checkout", tmp_path / "site"
    copy_package(tree)
    (tree / "fastkd.egg-info").mkdir()  # a build leaves it; it is not an installation
    (tree / "fastkd.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: fastkd\nVersion: 9.8\n")
    alone = unavailable_reasons(tree, site)
    assert alone["hides"] == "None"
    assert alone["cpu"].endswith("this source tree was never installed; run `pip install -e .` in it")

    installed = copy_package(site)
    record(site)
    found = unavailable_reasons(tree, site)
    assert found["hides"] == str(installed)
    for name in ("cpu", "kernels"):
        assert (
            f"source tree {tree}, which was never installed and hides the installed package {installed}" in found[name]
        )
        assert "start Python in another folder or with `python -P`" in found[name]
        assert "run `pip install -e .` in the source tree" in found[name]


@pytest.mark.parametrize("own", [True, False])
def test_editable_installation_is_hidden_only_by_another_tree(own, tmp_path):
    tree, other, site = tmp_path / "checkout", tmp_path / "other tree", tmp_path / "site"
    copy_package(tree)
    copy_package(other)
    record(site, url=(tree if own else other).as_uri(), dir_info={"editable": True})
    found = unavailable_reasons(tree, site)
    assert found["hides"] == ("None" if own else str(other / "fastkd"))

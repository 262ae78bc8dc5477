"""Print the resources that every CUDA kernel uses on each chip it is compiled for; no GPU is needed.

    python -m benchmarks.cuda_facts                                              # the installed fastkd._cuda
    python -m benchmarks.cuda_facts --targets 80,86,89,90,100,120 --json benchmarks/results/nvcc/13.0.88.json

Registers, spills, local memory, stack, static shared memory and the numbers of matrix instructions, asynchronous copies
and two-byte loads from global memory come from ``cuobjdump``, which ships with CUDA and inside Triton. ``code`` is a
digest of the machine code. A table also holds a digest of the sources it was compiled from, without comments, and the
size of the module. The module does not record dynamic shared memory; launches check it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.aot.compiler import instructions
from benchmarks.aot.facts import write_table

CSRC = Path(__file__).parents[1] / "csrc"
FAMILIES = sorted(folder.name for folder in (CSRC / "cuda").iterdir() if folder.is_dir())

SOURCES = ("cuda/**/*.cu", "cuda/**/*.cuh", "cuda/**/*.h", "common/*.h", "cmake/Cuda.cmake", "cmake/Exact.cmake")
"""Files in csrc that the machine code is compiled from; ``cuda/relation/plan.cpp`` has no device code."""

SHARED_LIMIT = 48 * 1024
"""Bytes of static shared memory that a kernel may declare, on every chip."""

USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
ASYNC_COPY = re.compile(r"\bLDGSTS\b")
TWO_BYTE_LOAD = re.compile(r"\bLDG\.[A-Z0-9.]*[US]16\b")
ENCODING = re.compile(r"/\* (0x[0-9a-f]{16}) \*/")
NAMESPACE = "fastkd4cuda"
"""Part of the mangled name of each fastkd kernel, as opposed to other functions in the module."""


def build(folder: Path, targets: str, source: str | None = None) -> Path:
    """Compile for ``targets`` (as ``FASTKD_CUDA_TARGETS``) in ``folder`` and return the module.

    With ``source``, a .cu file relative to csrc, compile only that file and return the object.
    """
    import pybind11

    configure = [
        *(program("cmake"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={program('ninja')}"),
        *("-S", str(CSRC), "-B", str(folder)),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    ]
    environment = os.environ | {"FASTKD_CUDA": "1", "FASTKD_CUDA_TARGETS": targets}
    product = f"CMakeFiles/_cuda.dir/{source}.o" if source else "_cuda"
    for command in (configure, [program("cmake"), "--build", str(folder), "--target", product]):
        subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
    (built,) = [folder / product] if source else folder.glob("_cuda.*")
    return built


def source_digest() -> str:
    """Return a hash of all sources of the machine code; comments and white space do not count."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in CSRC.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"#[^\n]*" if path.suffix == ".cmake" else r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
        digest.update(f"{path.relative_to(CSRC)}\0{' '.join(text.split())}\0".encode())
    return digest.hexdigest()[:12]


def program(name: str) -> str:
    """Return the path of a program: next to this Python, on PATH, or CUDA's tools inside Triton."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=places)
    if found is None and name in ("cuobjdump", "nvdisasm"):
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    if found is None:
        raise SystemExit(f"{name} was not found: install it, or put it on PATH")
    return found


def installed() -> Path:
    """Return the module that ``import fastkd`` would use."""
    from fastkd._native import load

    return Path(load("cuda").__file__)


def compiler() -> str:
    """Return "nvcc <version>" of the nvcc that a build uses."""
    nvcc = os.environ.get("CUDACXX") or program("nvcc")
    version = re.search(r"release .*, V(\S+)", run(nvcc, "--version"))
    return f"nvcc {version[1]}" if version else "nvcc unknown"


def facts(module: Path, match: str = "", jobs: int = 2) -> Iterator[dict[str, Any]]:
    """Yield one row per kernel and chip; kernels are named as in the sources, with their template arguments."""
    with tempfile.TemporaryDirectory() as folder:
        run(program("cuobjdump"), "--extract-elf", "all", str(module), cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        with ThreadPoolExecutor(jobs) as pool:
            for rows in pool.map(facts_of, cubins):
                yield from (row for row in rows if re.search(match, row["kernel"]))


def facts_of(cubin: Path) -> list[dict[str, Any]]:
    """Return the rows of one cubin: all kernels of one source file for one chip."""
    chip = re.search(r"sm_(\d+)", cubin.name)
    if chip is None:
        raise RuntimeError(f"{cubin.name}: expected cuobjdump to name the cubin with its sm_ target")
    usage = USAGE.findall(run(program("cuobjdump"), "-res-usage", str(cubin)))
    sass = run(program("cuobjdump"), "--dump-sass", str(cubin)).split("Function : ")[1:]
    code = {part.split(maxsplit=1)[0]: part for part in sass}
    names = [name for name, *_ in usage if NAMESPACE in name]
    readable = dict(zip(names, demangled(names), strict=True))
    return [row_of(readable[name], chip[1], numbers, code[name]) for name, *numbers in usage if name in readable]


def row_of(kernel: str, chip: str, numbers: list[str], sass: str) -> dict[str, Any]:
    """Return a kernel's row from its resource usage and its disassembly."""
    registers, stack, shared, local = map(int, numbers)
    counts = instructions(sass)
    return {
        "kernel": kernel,
        "target": f"sm_{chip}",
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "local": local,
        **counts,
        "async_copies": len(ASYNC_COPY.findall(sass)),
        "two_byte_loads": len(TWO_BYTE_LOAD.findall(sass)),
        "code": hashlib.sha256(" ".join(ENCODING.findall(sass)).encode()).hexdigest()[:12],
        "ok": counts["spills"] == 0 and local == 0 and shared <= SHARED_LIMIT,
    }


def demangled(names: list[str]) -> list[str]:
    """Return names such as ``softmax_kl.forward_kernel<float, 32>``: family, kernel, arguments, no namespaces."""
    if not names:
        return []
    text = run(shutil.which("cu++filt") or shutil.which("c++filt") or "c++filt", *names)
    found = []
    for line in text.splitlines():
        family = re.search(rf"fastkd::(?:cuda::)?({'|'.join(FAMILIES)})::", line)
        own = rf"({family[1]}::)?" if family else ""
        line = re.sub(rf"fastkd::(cuda::)?{own}|\(anonymous namespace\)::|<unnamed>::|\((int|bool)\)", "", line)
        found.append((f"{family[1]}." if family else "") + re.sub(r"^void |\([^()]*\)( \[clone.*)?$", "", line))
    return found


def run(*command: str, cwd: str | None = None) -> str:
    """Run a command and return its output."""
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--module", type=Path, help="read this module instead of the installed one")
    parser.add_argument("--targets", help="first build the module for these chips: all, or e.g. 80,90")
    parser.add_argument("--build", type=Path, help="folder of that build (default: a temporary one)")
    parser.add_argument("--match", default="", help="only kernels whose name matches this pattern")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        module = args.module
        if args.targets:
            module = build(args.build or Path(folder), args.targets)
        return report(module or installed(), args.match, args.json)


def report(module: Path, match: str, file: Path | None) -> int:
    """Print the rows, write them to ``file``, and return the exit status: 1 if a kernel spills."""
    print(f"{'kernel':64} {'chip':>6} {'regs':>5} {'shared':>7} {'spills':>6} matrix instructions")
    rows = []
    for row in facts(module, match):
        counts = ", ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items())
        print(
            f"{row['kernel']:64} {row['target']:>6} {row['registers']:>5} {row['shared']:>7} "
            f"{row['spills']:>6} {counts}{'' if row['ok'] else '  <- fails'}"
        )
        rows.append(row)
    print(f"{module.name}: {module.stat().st_size / 2**20:.1f} MiB")
    if file:
        facts_of_module = {"compiler": compiler(), "sources": source_digest(), "bytes": module.stat().st_size}
        write_table(file, facts_of_module, rows)
    return 0 if rows and all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

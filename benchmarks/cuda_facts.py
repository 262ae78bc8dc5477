"""What every CUDA kernel in an installed ``fastkd._cuda`` costs on each chip it was compiled for; no GPU is needed.

    python -m benchmarks.cuda_facts [--json FILE] [--module PATH] [--match PATTERN]

Registers, spills, local memory, stack, shared memory and the number of matrix instructions come from ``cuobjdump``,
which ships inside Triton and with CUDA. Shared memory that a launch asks for is not in the module: what it may be at
most is checked by the launches themselves.
"""

from __future__ import annotations

import argparse
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
from fastkd._native import build_info
from fastkd.ops.dispatch import FAMILIES

SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory that a kernel may declare, on every chip."""

USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
OWN = "fastkd4cuda"
"""Of the mangled name of every kernel of ours; the runtime brings none."""


def tool(name: str) -> str:
    """A program of CUDA, from PATH or from inside Triton."""
    found = shutil.which(name)
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    return found


def installed() -> Path:
    """The module that ``import fastkd`` would use."""
    from fastkd._native import load

    return Path(load("cuda").__file__)


def facts(module: Path, match: str = "", jobs: int = 2) -> Iterator[dict[str, Any]]:
    """One row per kernel and chip; kernels are named as in the sources, with their template arguments."""
    with tempfile.TemporaryDirectory() as folder:
        run(tool("cuobjdump"), "--extract-elf", "all", str(module), cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        with ThreadPoolExecutor(jobs) as pool:
            for rows in pool.map(facts_of, cubins):
                yield from (row for row in rows if re.search(match, row["kernel"]))


def facts_of(cubin: Path) -> list[dict[str, Any]]:
    """The kernels in one cubin, which is all of one source file for one chip."""
    chip = re.search(r"sm_(\d+)", cubin.name)
    if chip is None:
        raise RuntimeError(f"cuobjdump named a cubin otherwise than expected: {cubin.name}")
    usage = USAGE.findall(run(tool("cuobjdump"), "-res-usage", str(cubin)))
    sass = run(tool("cuobjdump"), "--dump-sass", str(cubin)).split("Function : ")[1:]
    counts = {part.split(maxsplit=1)[0]: instructions(part) for part in sass}
    names = [name for name, *_ in usage if OWN in name]
    readable = dict(zip(names, demangled(names), strict=True))
    return [
        {
            "kernel": readable[name],
            "target": f"sm_{chip[1]}",
            **dict(zip(("registers", "stack", "shared", "local"), map(int, numbers), strict=True)),
            **counts[name],
            "ok": counts[name]["spills"] == 0 and int(numbers[3]) == 0 and int(numbers[2]) <= SHARED_LIMIT,
        }
        for name, *numbers in usage
        if name in readable
    ]


def demangled(names: list[str]) -> list[str]:
    """``softmax_kl.forward_kernel<float, 32>``: the family that its arguments belong to, its name, no namespaces."""
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
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--module", type=Path, help="a module that is not installed")
    parser.add_argument("--match", default="", help="only kernels whose name this pattern finds")
    args = parser.parse_args(argv)
    module = args.module or installed()
    print(f"{'kernel':64} {'chip':>6} {'regs':>5} {'shared':>7} {'spills':>6} matrix instructions")
    rows = []
    for row in facts(module, args.match):
        counts = ", ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items())
        print(
            f"{row['kernel']:64} {row['target']:>6} {row['registers']:>5} {row['shared']:>7} "
            f"{row['spills']:>6} {counts}{'' if row['ok'] else '  <- no'}"
        )
        rows.append(row)
    print(f"{module.name}: {module.stat().st_size / 2**20:.1f} MiB")
    if args.json:
        write_table(
            args.json, {"compiler": build_info()["cuda"]["compiler"] if args.module is None else "unknown"}, rows
        )
    return 0 if rows and all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Compile every Triton kernel and block shape ahead of time, with no GPU, and print what each costs on each chip.

    python -m benchmarks.aot [--json FILE] [--targets 80 90 100 120] [--dtypes fp32 bf16]

Registers, spills, shared memory and the number of matrix instructions come from ``cuobjdump``, which ships inside
Triton. What FILE holds already for the same code is not compiled again. ``benchmarks.aot.versions`` does the same
for every supported version of Triton.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.aot.cases import TARGETS, Case
from benchmarks.aot.digest import digest
from benchmarks.aot.pixel_word import pixel_word_cases
from benchmarks.aot.relation import relation_cases
from benchmarks.aot.softmax_kl import softmax_kl_cases

DTYPES = ("fp32", "fp16", "bf16", "fp64")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that one block may have, by compute capability × 10."""

RESULTS = Path(__file__).parents[1] / "results" / "triton"
"""One file of facts for each version of Triton, as ``benchmarks.aot.versions`` writes them."""

CASES = {"softmax_kl": softmax_kl_cases, "relation": relation_cases, "pixel_word": pixel_word_cases}


def compile_case(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, target: int, **options: Any
) -> Any:
    """Compile one kernel for one chip, as a launch with aligned pointers and strides would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [
        i
        for i, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or kind.endswith(":16") or "stride_b" in name
    ]
    source = ASTSource(
        fn=kernel,
        signature={name: kind.removesuffix(":16") for name, kind in types.items()},
        constexprs={(list(types).index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True, **options}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


MATRIX_INSTRUCTION = re.compile(r"\b(HGMMA|QGMMA|UTC[A-Z]*MMA|HMMA|QMMA)\b")
"""Those of sm_90, of sm_100, and of the warps of all others."""

LOCAL = {"loads": re.compile(r"\bLDL\b"), "stores": re.compile(r"\bSTL\b")}


def instructions(sass: str) -> dict[str, Any]:
    """Count a kernel's spills, the loads and stores of local memory, and its matrix instructions, by name.

    Neither a stack nor LOCAL of ``-res-usage`` tells: a stack may be alignment, and LOCAL stays 0 where registers are
    spilled. Loads without a store are none: on sm_100 ptxas emits one after asynchronous copies, without a stack.
    """
    found = {name: len(pattern.findall(sass)) for name, pattern in LOCAL.items()}
    spills = found["stores"] + found["loads"] if found["stores"] else 0
    return {"spills": spills, "matrix_instructions": dict(Counter(MATRIX_INSTRUCTION.findall(sass)))}


def resources(cubin: bytes) -> dict[str, Any]:
    """Return what the kernel in a cubin takes: registers, bytes of stack, shared and local memory, and instructions."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "--dump-sass")
        )
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    if set(found) != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise RuntimeError(f"cuobjdump -res-usage said something else than expected: {text!r}")
    used = {"registers": found["REG"], "stack": found["STACK"], "shared": found["SHARED"], "local": found["LOCAL"]}
    return used | instructions(sass)


def identity(dtype: str, case: Case, target: int) -> dict[str, Any]:
    """Return what tells the row of a case and a chip from the others: kernel, dtype, constants, warps, chip, code."""
    named = {n: value for n, value in case[3].items() if n.isupper() and isinstance(value, int | str)}
    chip = {"target": f"sm_{target}", "source": digest(case)}
    return {"kernel": case[0], "dtype": dtype, **named, "warps": case[4], **chip}


FACTS = ("registers", "stack", "shared", "local", "spills", "matrix_instructions", "shared_limit", "ok")


def key(row: dict[str, Any]) -> str:
    """Return the identity of a row without its facts, as a string."""
    return json.dumps({name: value for name, value in row.items() if name not in FACTS})


def fact(family: str, dtype: str, index: int, target: int) -> dict[str, Any]:
    """What one case of a family costs on one chip."""
    case = list(CASES[family](dtype))[index]
    _, kernel, types, constants, warps, *more = case
    options = {k: v for more in more for k, v in more.items() if k != "but"}
    compiled = compile_case(kernel, types, constants, warps, target, **options)
    row = identity(dtype, case, target) | resources(compiled.asm["cubin"])
    row["shared"] = max(row["shared"], compiled.metadata.shared)
    row["shared_limit"] = SHARED_LIMIT[target]
    row["ok"] = row["local"] == 0 and row["spills"] == 0 and row["shared"] <= row["shared_limit"]
    return row


def cases_of(
    family: str, targets: tuple[int, ...], dtypes: tuple[str, ...], match: str = ""
) -> Iterator[tuple[str, int, int, Case]]:
    """Yield (dtype, index, target, case) of every kernel and block shape that a chip uses, each once."""
    seen = set()
    for dtype in dtypes:
        for i, case in enumerate(CASES[family](dtype)):
            if not re.search(match, f"{case[0]} {block_of(case[3])}"):
                continue
            excluded = case[5].get("but", ()) if len(case) > 5 else ()
            for target in (target for target in targets if target not in excluded):
                name = key(identity(dtype, case, target))
                if name not in seen:
                    seen.add(name)
                    yield dtype, i, target, case


def facts(
    family: str, cases: list[tuple[str, int, int, Case]], known: dict[str, dict[str, Any]], jobs: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield one row per case and chip: from ``known`` where it has it, else from ``jobs`` compilers at a time."""
    keys = [key(identity(dtype, case, target)) for dtype, _, target, case in cases]
    missing = [
        (family, dtype, i, target) for (dtype, i, target, _), k in zip(cases, keys, strict=True) if k not in known
    ]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(fact, *zip(*missing, strict=True)) if missing else iter(())
        for k in keys:
            yield known[k] if k in known else next(compiled)


def sample(cases: list[tuple[str, int, int, Case]]) -> list[tuple[str, int, int, Case]]:
    """Return one block shape of each kernel for each chip: of bf16 where it has that, and the middle one."""
    groups: dict[tuple[str, int], list[tuple[str, int, int, Case]]] = {}
    for entry in cases:
        groups.setdefault((entry[3][0], entry[2]), []).append(entry)
    chosen = []
    for group in groups.values():
        trained = [entry for entry in group if entry[0] == "bf16"] or group
        chosen.append(trained[len(trained) // 2])
    return chosen


SIZES = ("ROWS", "COLS", "PARTS", "BLOCK", "WIDTH", "DEPTH", "BN", "TP", "BD", "SLAB")
MARKS = {"LOOP": "+", "SPLIT": "+", "KEEP": "k", "KEPT": "k", "STUDENT_ROWS_INNER": "'"}


def block_of(row: dict[str, Any]) -> str:
    """The block shape in brief. A + where the kernel loops, and one where it shares rows with others; k where tiles are
    kept; ' where rows are the inner dimension."""
    sizes = [str(row[size]) for size in SIZES if size in row]
    return "x".join(sizes) + "".join(mark for name, mark in MARKS.items() if row.get(name) is True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--families", nargs="+", default=tuple(CASES), choices=tuple(CASES))
    parser.add_argument(
        "--match", default="", help="only kernels and block shapes, as printed, that this pattern finds"
    )
    parser.add_argument("--jobs", type=int, help="compilers at a time; as many as processors by default")
    parser.add_argument("--sample", action="store_true", help="only one block shape of each kernel for each chip")
    parser.add_argument("--all", action="store_true", help="compile also what FILE holds for the same code")
    parser.add_argument("--list", action="store_true", help="only print what would be compiled, one JSON object a line")
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel has nothing to compile
    selected = {
        family: list(cases_of(family, tuple(args.targets), tuple(args.dtypes), args.match)) for family in args.families
    }
    if args.sample:
        selected = {family: sample(cases) for family, cases in selected.items()}
    if args.list:
        for cases in selected.values():
            for dtype, _, target, case in cases:
                print(json.dumps(identity(dtype, case, target)))
        return 0
    print(
        f"{'kernel':22} {'method':10} {'dtype':5} {'block':>13} {'warps':>5} {'chip':>6} {'regs':>5} {'shared':>7} "
        f"{'spills':>6} matrix instructions"
    )
    known = {} if args.all or not args.json else known_facts(args.json)
    rows = []
    for family, cases in selected.items():
        rows += print_facts(facts(family, cases, known, args.jobs))
    if args.json:
        write_facts(args.json, {"triton": version("triton")}, rows)
    return 0 if all(row["ok"] for row in rows) else 1


def known_facts(file: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a file by their key, if they are of the installed Triton."""
    table = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if table.get("environment", {}).get("triton") != version("triton"):
        return {}
    return {key(row): row for row in table["rows"]}


def write_facts(file: Path, environment: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Write the rows, one a line, and the versions that they are of."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    file.write_text(f'{{"environment": {json.dumps(environment)}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def print_facts(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows again, each printed as it comes."""
    for row in rows:
        matrix = ", ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items())
        print(
            f"{row['kernel']:22} {row.get('DISTANCE', ''):10} {row['dtype']:5} {block_of(row):>13} {row['warps']:>5} "
            f"{row['target']:>6} {row['registers']:>5} {row['shared']:>7} {row['spills']:>6} {matrix}"
            f"{'' if row['ok'] else '  <- no'}",
            flush=True,
        )
        yield row


if __name__ == "__main__":
    sys.exit(main())

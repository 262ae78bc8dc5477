"""Compile every Triton kernel and block shape ahead of time, with no GPU, and print what each costs on each chip.

    python benchmarks/aot.py [--json FILE] [--targets 80 90 100 120] [--dtypes fp32 bf16]

Registers, local memory (spills) and shared memory come from ``cuobjdump``, which ships inside Triton.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aot_pixel_word import pixel_word_cases

TARGETS = (80, 90, 100, 120)
DTYPES = ("fp32", "fp16", "bf16", "fp64")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that one block may have, by compute capability × 10."""


def softmax_kl_cases(dtype: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """(name, kernel, argument types, constants, warps) of every block shape in the family's table.

    A type that ends in ":16" is of a number that 16 divides; STAGES and FUSED among the constants are
    the compiler's options.
    """
    from fastkd.kernels import softmax_kl as family

    acc = "fp64" if dtype == "fp64" else "fp32"
    itemsize = 8 if dtype == "fp64" else 2
    longest = family.blocks_for(1 << 20, itemsize).cols
    for cols in (*(blocks.cols for blocks in family.SHORT), longest, longest + 1):
        blocks = family.blocks_for(cols, itemsize)
        constants = {"ROWS": blocks.rows, "COLS": blocks.cols, "LOOP": cols > blocks.cols}
        for name in ("forward", "backward"):
            if name == "backward" and constants.pop("LOOP"):
                continue  # it has no loop
            kernel = getattr(family, f"{name}_kernel")
            types = {}
            for argument in kernel.arg_names:
                if argument in ("student_ptr", "teacher_ptr", "grad_student_ptr"):
                    types[argument] = f"*{dtype}"
                elif argument.endswith("_ptr"):
                    types[argument] = f"*{acc}"
                elif argument == "inv_temperature":
                    types[argument] = "fp64"
                elif argument.isupper():
                    types[argument] = "constexpr"
                else:
                    types[argument] = "i64" if "stride" in argument else "i32"
            yield f"softmax_kl.{name}", kernel, types, dict(constants), blocks.warps


CASES = {"softmax_kl": softmax_kl_cases, "pixel_word": pixel_word_cases}


def compile_case(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, target: int) -> Any:
    """Compile one kernel for one chip, as a launch with aligned pointers and strides would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(constants)
    options = {"num_warps": warps, "enable_fp_fusion": constants.pop("FUSED", True)}
    if "STAGES" in constants:
        options["num_stages"] = constants.pop("STAGES")
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
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack, shared and local memory of the kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    if set(found) != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise RuntimeError(f"cuobjdump -res-usage said something else than expected: {text!r}")
    return {"registers": found["REG"], "stack": found["STACK"], "shared": found["SHARED"], "local": found["LOCAL"]}


def facts(family: str, targets: tuple[int, ...], dtypes: tuple[str, ...], match: str = "") -> Iterator[dict[str, Any]]:
    """One row per kernel, block shape, dtype and chip."""
    for dtype in dtypes:
        for name, kernel, types, constants, warps in CASES[family](dtype):
            if not re.search(match, f"{name} {block_of(constants)}"):
                continue
            for target in targets:
                compiled = compile_case(kernel, types, constants, warps, target)
                shape = {key: value for key, value in constants.items() if key.isupper() and isinstance(value, int)}
                row = {"kernel": name, "dtype": dtype, **shape, "warps": warps, "target": f"sm_{target}"}
                row |= resources(compiled.asm["cubin"])
                row["shared"] = max(row["shared"], compiled.metadata.shared)
                row["shared_limit"] = SHARED_LIMIT[target]
                row["ok"] = row["local"] == 0 and row["stack"] == 0 and row["shared"] <= row["shared_limit"]
                yield row


def block_of(row: dict[str, Any]) -> str:
    """Sizes in the order of their names here; "+" for a loop."""
    sizes = [str(row[size]) for size in ("ROWS", "COLS", "BN", "TP", "BD", "SLAB") if size in row]
    return "x".join(sizes) + ("+" if row.get("LOOP") else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--families", nargs="+", default=tuple(CASES), choices=tuple(CASES))
    parser.add_argument(
        "--match", default="", help="only kernels and block shapes, as printed, that this pattern finds"
    )
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel has nothing to compile
    rows = [
        row for family in args.families for row in facts(family, tuple(args.targets), tuple(args.dtypes), args.match)
    ]
    print(f"{'kernel':22} {'dtype':5} {'block':>12} {'warps':>5} {'chip':>6} {'regs':>5} {'shared':>7} {'local':>6}")
    for row in rows:
        print(
            f"{row['kernel']:22} {row['dtype']:5} {block_of(row):>12} {row['warps']:>5} {row['target']:>6} "
            f"{row['registers']:>5} {row['shared']:>7} {row['local'] + row['stack']:>6}{'' if row['ok'] else '  <- no'}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in rows)
        args.json.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

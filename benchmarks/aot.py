"""Compile every Triton kernel and block shape ahead of time, with no GPU, and print what each costs on each chip.

    python benchmarks/aot.py [--json FILE] [--targets 80 90 100 120] [--dtypes fp32 bf16]

Registers, local memory (spills), shared memory and the number of matrix instructions come from ``cuobjdump``, which
ships inside Triton.
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
from pathlib import Path
from typing import Any

TARGETS = (80, 90, 100, 120)
DTYPES = ("fp32", "fp16", "bf16", "fp64")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that one block may have, by compute capability × 10."""


Case = tuple[Any, ...]
"""(name, kernel, argument types, constants, warps), and further options of the compiler, if any; of these "but" names
chips on which the case is not used."""


def softmax_kl_cases(dtype: str) -> Iterator[Case]:
    """Every block shape in the family's table."""
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


def relation_cases(dtype: str) -> Iterator[Case]:
    """Every kernel of the family in every block shape of its table; what differs by method alone, once or twice."""
    from fastkd.kernels import _relation_derivative as derivative
    from fastkd.kernels import _relation_merge as merge
    from fastkd.kernels import relation as forward
    from fastkd.kernels import relation_backward as backward
    from fastkd.kernels._relation_plan import NARROW_CAPABILITIES, PLANES, REGIMES, WIDE_METHODS

    if dtype == "fp64":
        return  # the family has none
    # Rows of 900 contiguous bfloat16 numbers, a factor of 4; or maps of 3600 pixels.
    channels, pixels = (
        {
            **{f"{side}_UNIT": unit for side in ("STUDENT", "TEACHER", "GRAD")},
            **{f"{side}_ROWS_INNER": inner for side in ("STUDENT", "TEACHER", "GRAD")},
            "ROW_UNIT": unit if inner else 1,
        }
        for unit, inner in ((4, False), (4 if dtype == "fp32" else 8, True))
    )
    h_type = "bf16" if dtype == "bf16" else "fp32"
    common = {"COSINE": True, "NEGATE": False, "KEEP": False, "KEPT": False, "MIRROR": True, "SPLIT": dtype == "bf16"}

    def case(name: str, kernel: Any, constants: dict[str, Any], warps: int, stages: int = 3, **options: Any) -> Case:
        constants = {n: constants[n] for n in kernel.arg_names if n.isupper()}
        rows_inner = constants.get("STUDENT_ROWS_INNER", False)
        types = {}
        for argument in kernel.arg_names:
            is_row_gradient = argument.startswith("grad") and kernel is derivative.coefficients_kernel
            if argument in ("student_ptr", "teacher_ptr") or (argument == "grad_ptr" and not is_row_gradient):
                types[argument] = f"*{dtype}"
            elif argument.endswith("_ptr"):
                types[argument] = f"*{h_type if argument == 'h_ptr' else 'fp32'}"
            elif argument.endswith("_factor") or argument == "inv_temperature":
                types[argument] = "fp32"
            elif argument.endswith("stride_r" if rows_inner else "stride_k") and not is_row_gradient:
                types[argument] = "constexpr"
                constants[argument] = 1
            else:
                types[argument] = "constexpr" if argument.isupper() else "i32"
        return f"relation.{name}", kernel, types, constants, warps, {"num_stages": stages, **options}

    def method(name: str) -> dict[str, Any]:
        return {**common, "DISTANCE": name, "PLANES": PLANES[name], "PRECISION": forward.PRECISION[dtype]}

    registers = forward.ROW_LAUNCH["maxnreg"]
    for layout in (channels, pixels):
        yield case("scales", forward.scales_kernel, {**layout, **forward.SCALE_BLOCK}, 4, maxnreg=registers)
    for name in PLANES:
        blocks = {**forward.MERGE_BLOCK, "ROWS": 128, "COLS": 64}
        yield case("merge", merge.merge_kernel, {**method(name), **blocks}, 4, maxnreg=registers)
    for name in ("kl", "row_cosine"):
        block = {"BLOCK": backward.COEFFICIENTS_BLOCK}
        yield case("coefficients", derivative.coefficients_kernel, {**method(name), **block}, 4)
    unfused = {"enable_fp_fusion": False}
    for i, regime in enumerate(REGIMES[dtype]):
        tiles, launch = regime.tiles.constants(), (regime.tiles.warps, regime.tiles.stages)
        methods = [name for name in PLANES if name != "kl maxima" or regime is REGIMES[dtype][-1]]
        for name in methods:
            yield case("tiles", forward.tiles_kernel, {**channels, **method(name), **tiles}, *launch)
        kept = {**channels, **method("kl"), **tiles}
        yield case("tiles", forward.tiles_kernel, {**kept, "KEEP": True}, *launch)
        yield case("tiles", forward.tiles_kernel, {**pixels, **method("kl"), **tiles}, *launch)
        launch = (regime.derivative_warps, regime.tiles.stages)
        yield case("derivative", derivative.derivative_kernel, {**kept, "KEPT": True}, *launch, **unfused)
        for name in methods if i == 0 else ("kl", "kl maxima"):
            constants = {**channels, **method(name), **tiles}
            yield case("derivative", derivative.derivative_kernel, constants, *launch, **unfused)
        stripe = {**pixels, **method("kl"), **tiles, "MIRROR": False}
        yield case("derivative", derivative.derivative_kernel, stripe, *launch, **unfused)
        if regime.wide is not None:
            narrow = [target for target in TARGETS if target // 10 in NARROW_CAPABILITIES]
            wide, launch = regime.wide.constants(), (regime.wide.warps, regime.wide.stages)
            for name in WIDE_METHODS:
                yield case("tiles", forward.tiles_kernel, {**channels, **method(name), **wide}, *launch, but=narrow)
            yield case("tiles", forward.tiles_kernel, {**pixels, **method("kl"), **wide}, *launch, but=narrow)
        product = {**method("kl"), **tiles, **backward.product_constants(regime.product, dtype)}
        for layout in (channels, pixels):
            launch = (regime.product.warps, regime.product.stages)
            yield case("product", backward.product_kernel, {**layout, **product}, *launch)


CASES = {"softmax_kl": softmax_kl_cases, "relation": relation_cases}


def compile_case(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, target: int, **options: Any
) -> Any:
    """Compile one kernel for one chip, as a launch with aligned pointers and strides would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [i for i, (name, kind) in enumerate(types.items()) if kind.startswith("*") or "stride_b" in name]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(list(types).index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True, **options}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


MATRIX_INSTRUCTION = re.compile(r"\b(HGMMA|QGMMA|UTC[A-Z]*MMA|HMMA|QMMA)\b")
"""Those of sm_90, of sm_100, and of the warps of all others."""


def resources(cubin: bytes) -> dict[str, Any]:
    """Registers, bytes of stack, shared and local memory, and matrix instructions by name, of the kernel in a cubin."""
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
    return used | {"matrix_instructions": dict(Counter(MATRIX_INSTRUCTION.findall(sass)))}


def fact(family: str, dtype: str, index: int, target: int) -> dict[str, Any]:
    """What one case of a family costs on one chip."""
    name, kernel, types, constants, warps, *more = list(CASES[family](dtype))[index]
    options = {k: v for more in more for k, v in more.items() if k != "but"}
    compiled = compile_case(kernel, types, constants, warps, target, **options)
    named = {n: value for n, value in constants.items() if n.isupper()}
    row = {"kernel": name, "dtype": dtype, **named, "warps": warps, "target": f"sm_{target}"}
    row |= resources(compiled.asm["cubin"])
    row["shared"] = max(row["shared"], compiled.metadata.shared)
    row["shared_limit"] = SHARED_LIMIT[target]
    row["ok"] = row["local"] == 0 and row["stack"] == 0 and row["shared"] <= row["shared_limit"]
    return row


def facts(
    family: str, targets: tuple[int, ...], dtypes: tuple[str, ...], jobs: int | None = None
) -> Iterator[dict[str, Any]]:
    """One row per kernel, block shape, dtype and chip, from ``jobs`` compilers at a time."""
    cases = [
        (family, dtype, i, target)
        for dtype in dtypes
        for i, case in enumerate(CASES[family](dtype))
        for target in targets
        if not (len(case) > 5 and target in case[5].get("but", ()))
    ]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(fact, *zip(*cases, strict=True)) if cases else ()


def block_of(row: dict[str, Any]) -> str:
    """The block shape in brief, a + where the kernel loops or keeps its tiles, ' where rows are the inner dimension."""
    names = ("ROWS", "WIDTH" if "WIDTH" in row else "COLS", "DEPTH") if "DEPTH" in row and "ROWS" in row else ()
    names = names or (("BLOCK",) if "BLOCK" in row else ("ROWS", "COLS"))
    marks = ("+" if row.get("LOOP") or row.get("KEEP") or row.get("KEPT") else "") + (
        "'" if row.get("STUDENT_ROWS_INNER") else ""
    )
    return "x".join(str(row[name]) for name in names) + marks


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--families", nargs="+", default=tuple(CASES), choices=tuple(CASES))
    parser.add_argument("--jobs", type=int, help="compilers at a time; as many as processors by default")
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel has nothing to compile
    print(
        f"{'kernel':22} {'method':10} {'dtype':5} {'block':>13} {'warps':>5} {'chip':>6} {'regs':>5} {'shared':>7} "
        f"{'local':>6} matrix instructions"
    )
    rows = []
    for family in args.families:
        rows += print_facts(facts(family, tuple(args.targets), tuple(args.dtypes), args.jobs))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in rows)
        args.json.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return 0 if all(row["ok"] for row in rows) else 1


def print_facts(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows again, each printed as it comes."""
    for row in rows:
        matrix = ", ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items())
        print(
            f"{row['kernel']:22} {row.get('DISTANCE', ''):10} {row['dtype']:5} {block_of(row):>13} {row['warps']:>5} "
            f"{row['target']:>6} {row['registers']:>5} {row['shared']:>7} {row['local'] + row['stack']:>6} {matrix}"
            f"{'' if row['ok'] else '  <- no'}",
            flush=True,
        )
        yield row


if __name__ == "__main__":
    sys.exit(main())

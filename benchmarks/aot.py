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

TARGETS = (80, 90, 100, 120)
DTYPES = ("fp32", "fp16", "bf16", "fp64")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that one block may have, by compute capability × 10."""


def softmax_kl_cases(dtype: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """(name, kernel, argument types, constants, warps) of every block shape in the family's table."""
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


def pixel_word_cases(dtype: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """The same for every number of words that has blocks of its own: all terms, masked; rows and maps; the cosine."""
    if dtype == "fp64":
        return  # it has no such kernels
    for words in (16, 32, 64, 128):
        yield from pixel_word_kernels(dtype, words, maps=False, cosine=False)
    yield from pixel_word_kernels(dtype, 32, maps=True, cosine=True)


def pixel_word_kernels(
    dtype: str, words: int, *, maps: bool, cosine: bool
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """Every kernel of the family for one padded number of words."""
    import triton.language as tl

    from fastkd.kernels import _pixel_word as shared
    from fastkd.kernels import pixel_word, pixel_word_backward

    half = dtype != "fp32"
    logits, terms = shared.logits_blocks(words, half), shared.terms_blocks(words)
    gradient, to_pixels = shared.gradient_blocks(words), shared.pixels_blocks(words, half)
    to_words = shared.words_blocks(words, half)
    dot = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[dtype]
    tile = lambda blocks: {"BN": blocks.pixels, "TP": words}
    slab = lambda blocks: {"SLAB": min(words, blocks.columns)}
    later = words > terms.columns
    cases: list[tuple[Any, dict[str, Any], Any]] = [
        (pixel_word.logits_kernel, tile(logits) | {"BD": logits.columns, "DOT": dot, "COSINE": cosine}, logits),
        (pixel_word.terms_kernel, tile(terms) | {"TERMS": 3 if later else 15}, terms),
        (pixel_word.merge_kernel, {"TP": words, "TERMS": 15, "MOST": shared.MOST_SUMS}, shared.MERGE),
        (pixel_word_backward.gradient_kernel, tile(gradient) | slab(gradient) | {"TERMS": 15}, gradient),
        (pixel_word_backward.pixels_kernel, tile(to_pixels) | {"BD": to_pixels.columns}, to_pixels),
        (pixel_word_backward.words_kernel, tile(to_words) | {"BD": to_words.columns}, to_words),
        (pixel_word_backward.merge_words_kernel, {"BD": shared.MERGE_WORDS.columns, "SOME": 8}, shared.MERGE_WORDS),
    ]  # fmt: skip
    if later:
        cases.append((pixel_word.grams_kernel, tile(terms) | slab(terms), terms))
    features = ("words_ptr", "features_ptr", "grad_pixels_ptr", "grad_words_ptr")
    for kernel, constants, blocks in cases:
        name = kernel.__name__.removesuffix("_kernel")
        constants = constants | {"STAGES": blocks.stages}
        absent = () if cosine else ABSENT.get(name, ())
        types = {}
        for argument in kernel.arg_names:
            if argument in constants:
                types[argument] = "constexpr"
            elif argument in absent:
                types[argument], constants[argument] = "constexpr", None
            elif argument.endswith("mask_ptr"):
                types[argument] = "*u8"
            elif argument.endswith(features) or (name == "logits" and argument in ("student_ptr", "teacher_ptr")):
                types[argument] = f"*{dtype}"
            elif argument.endswith("_ptr"):
                types[argument] = "*fp32"
            elif argument.endswith("_scale"):
                types[argument] = "fp32"
            elif argument.endswith(unit_strides(name, maps)):
                types[argument], constants[argument] = "constexpr", 1
            else:
                types[argument] = "i64" if "stride_b" in argument else "i32"
        yield f"pixel_word.{name}", kernel, types, constants, blocks.warps


ABSENT = {
    "logits": ("norms_ptr",),
    "pixels": ("norms_ptr", "features_ptr", "logits_ptr"),
    "words": ("norms_ptr",),
    "merge_words": ("words_ptr",),
}
"""What only the cosine has."""


def unit_strides(kernel: str, maps: bool) -> tuple[str, ...]:
    """Arguments that are 1 where pixels are rows of features, or maps; logits are laid out as maps are."""
    words = ("words_stride_d",)
    if kernel in ("gradient", "terms", "grams"):
        words += ("student_stride_n", "teacher_stride_n", "grad_logits_stride_n")
    if kernel != "logits" and not maps:
        return (*words, "features_stride_d", "grad_pixels_stride_d")
    if not maps:
        return (*words, "features_stride_d", "grad_pixels_stride_d", "student_stride_d", "teacher_stride_d")
    return (*words, "features_stride_n", "grad_pixels_stride_n", "student_stride_n", "teacher_stride_n")


CASES = {"softmax_kl": softmax_kl_cases, "pixel_word": pixel_word_cases}


def compile_case(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, target: int) -> Any:
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
    return triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )


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


def facts(family: str, targets: tuple[int, ...], dtypes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """One row per kernel, block shape, dtype and chip."""
    for dtype in dtypes:
        for name, kernel, types, constants, warps in CASES[family](dtype):
            for target in targets:
                compiled = compile_case(kernel, types, constants, warps, target)
                row = {"kernel": name, "dtype": dtype, **constants, "warps": warps, "target": f"sm_{target}"}
                row |= resources(compiled.asm["cubin"])
                row["shared"] = max(row["shared"], compiled.metadata.shared)
                row["shared_limit"] = SHARED_LIMIT[target]
                row["ok"] = row["local"] == 0 and row["stack"] == 0 and row["shared"] <= row["shared_limit"]
                yield row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--families", nargs="+", default=tuple(CASES), choices=tuple(CASES))
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel has nothing to compile
    rows = [row for family in args.families for row in facts(family, tuple(args.targets), tuple(args.dtypes))]
    print(f"{'kernel':22} {'dtype':5} {'block':>9} {'warps':>5} {'chip':>6} {'regs':>5} {'shared':>7} {'local':>6}")
    for row in rows:
        block = f"{row['ROWS']}x{row['COLS']}{'+' if row.get('LOOP') else ''}"
        print(
            f"{row['kernel']:22} {row['dtype']:5} {block:>9} {row['warps']:>5} {row['target']:>6} "
            f"{row['registers']:>5} {row['shared']:>7} {row['local'] + row['stack']:>6}{'' if row['ok'] else '  <- no'}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in rows)
        args.json.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

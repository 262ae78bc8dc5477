"""Ahead-of-time cases of ``softmax_kl``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.aot.cases import Case


def softmax_kl_cases(dtype: str) -> Iterator[Case]:
    """Yield every kernel in every block shape of its plan."""
    from fastkd.kernels.softmax_kl import backward, forward, plan

    kernels = {
        "forward": forward.forward_kernel,
        "merge": forward.merge_kernel,
        "backward": backward.backward_kernel,
    }
    acc = "fp64" if dtype == "fp64" else "fp32"
    itemsize = 8 if dtype == "fp64" else 2
    long = plan.blocks_for(1 << 20, itemsize).cols

    def case(name: str, constants: dict[str, Any], warps: int, **options: Any) -> Case:
        kernel = kernels[name]
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
        return f"softmax_kl.{name}", kernel, types, constants, warps, options

    for cols in (*(blocks.cols for blocks in plan.SHORT_ROW_BLOCKS), long, long + 1):
        blocks = plan.blocks_for(cols, itemsize)
        block = {"ROWS": blocks.rows, "COLS": blocks.cols}
        loop = cols > blocks.cols
        for split in (False, True) if loop else (False,):
            yield case("forward", block | {"LOOP": loop, "SPLIT": split}, blocks.warps, **forward.MAX_REGISTERS)
        if not loop:  # the backward does not loop
            yield case("backward", block, blocks.warps, enable_fp_fusion=False)
    yield case("merge", {"PARTS": plan.MAX_PARTS}, 1)

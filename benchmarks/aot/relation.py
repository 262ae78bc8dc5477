"""Ahead-of-time cases of ``relation``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.aot.cases import TARGETS, Case


def relation_cases(dtype: str) -> Iterator[Case]:
    """Yield every kernel in every block shape of its plan, but not every method in every shape."""
    from fastkd.kernels.relation import backward, derivative, forward, merge
    from fastkd.kernels.relation.plan import NARROW_CAPABILITIES, PLANES, REGIMES, SMALL_BACKWARD, WIDE_METHODS

    if dtype == "fp64":
        return  # the family has no fp64 kernels
    # Rows of 900 contiguous bfloat16 elements (divisible by 4), or maps of 3600 pixels.
    channels, pixels = (
        {
            **{f"{side}_UNIT": unit for side in ("STUDENT", "TEACHER", "GRAD")},
            **{f"{side}_ROWS_INNER": inner for side in ("STUDENT", "TEACHER", "GRAD")},
            "ROW_UNIT": unit if inner else 1,
        }
        for unit, inner in ((4, False), (4 if dtype == "fp32" else 8, True))
    )
    h_type = "bf16" if dtype == "bf16" else "fp32"
    common = {
        "COSINE": True,
        "NEGATE": False,
        "STORE": False,
        "STORED": False,
        "MIRROR": True,
        "SPLIT": dtype == "bf16",
    }

    def case(name: str, kernel: Any, constants: dict[str, Any], launch: dict[str, Any], **options: Any) -> Case:
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
        return f"relation.{name}", kernel, types, constants, launch["num_warps"], launch | options

    def method(name: str) -> dict[str, Any]:
        return {**common, "DISTANCE": name, "PLANES": PLANES[name], "PRECISION": forward.PRECISION[dtype]}

    for layout in (channels, pixels):
        yield case("scales", forward.scales_kernel, {**layout, **forward.SCALE_BLOCK}, forward.ROW_LAUNCH)
    for name in PLANES:
        blocks = {**forward.MERGE_BLOCK, "ROWS": 128, "COLS": 64}
        yield case("merge", merge.merge_kernel, {**method(name), **blocks}, forward.ROW_LAUNCH)
    for name in ("kl", "row_cosine"):
        block = {"BLOCK": backward.COEFFICIENTS_BLOCK}
        yield case("coefficients", derivative.coefficients_kernel, {**method(name), **block}, {"num_warps": 4})
    for i, regime in enumerate(REGIMES[dtype]):
        tiles, launch, heavy = regime.tiles.constants(), regime.tiles.launch(), regime.heavy.launch()
        unfused = regime.heavy.launch(fused=False)
        methods = [name for name in PLANES if name != "kl maxima" or regime is REGIMES[dtype][-1]]
        for name in methods:
            with_maxima = heavy if name == "kl maxima" else launch
            yield case("tiles", forward.tiles_kernel, {**channels, **method(name), **tiles}, with_maxima)
        stored = {**channels, **method("kl"), **tiles}
        yield case("tiles", forward.tiles_kernel, {**stored, "STORE": True}, launch)
        yield case("tiles", forward.tiles_kernel, {**pixels, **method("kl"), **tiles}, launch)
        yield case("derivative", derivative.derivative_kernel, {**stored, "STORED": True}, unfused)
        but = [target for target in TARGETS if i + 1 < len(REGIMES[dtype]) and target // 10 in SMALL_BACKWARD[dtype]]
        for name in methods:
            constants = {**channels, **method(name), **tiles}
            yield case("derivative", derivative.derivative_kernel, constants, unfused, but=but)
        stripe = {**pixels, **method("kl"), **tiles, "MIRROR": False}
        yield case("derivative", derivative.derivative_kernel, stripe, unfused, but=but)
        if regime.wide is not None:
            narrow = [target for target in TARGETS if target // 10 in NARROW_CAPABILITIES]
            wide, launch = regime.wide.constants(), regime.wide.launch()
            for name in WIDE_METHODS:
                yield case("tiles", forward.tiles_kernel, {**channels, **method(name), **wide}, launch, but=narrow)
            yield case("tiles", forward.tiles_kernel, {**pixels, **method("kl"), **wide}, launch, but=narrow)
        product = {**method("kl"), **tiles, **backward.product_constants(regime.product, dtype)}
        for layout in (channels, pixels):
            yield case("product", backward.product_kernel, {**layout, **product}, regime.product.launch())

"""Ahead-of-time cases of ``pixel_word``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.aot.cases import TARGETS, Case


def pixel_word_cases(dtype: str) -> Iterator[Case]:
    """Yield the kernels for each padded number of words, with all terms and masks, and for the cosine of maps."""
    if dtype == "fp64":
        return  # the family has no fp64 kernels
    for words in (16, 32, 64, 128):
        yield from pixel_word_kernels(dtype, words, maps=False, cosine=False)
    yield from pixel_word_kernels(dtype, 32, maps=True, cosine=True)


def pixel_word_kernels(dtype: str, words: int, *, maps: bool, cosine: bool) -> Iterator[Case]:
    """Yield every kernel of the family for one padded number of words."""
    import triton.language as tl
    from fastkd.kernels.pixel_word import backward as pixel_word_backward
    from fastkd.kernels.pixel_word import features as pixel_word_features
    from fastkd.kernels.pixel_word import forward as pixel_word
    from fastkd.kernels.pixel_word import merge, plan

    half = dtype != "fp32"
    logits = plan.logits_blocks(words, half)
    terms_of = {target: plan.terms_blocks(words, target // 10) for target in TARGETS}
    gradient, to_pixels = plan.gradient_blocks(words), plan.pixels_blocks(words, half)
    to_words, merge_words = plan.words_blocks(words, half), plan.MERGE_WORDS_BLOCKS
    dot = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[dtype]
    tile = lambda blocks: {"BN": blocks.pixels, "TP": words}
    slab = lambda blocks: {"SLAB": min(words, blocks.columns)}
    cases: list[tuple[Any, dict[str, Any], Any]] = [
        (pixel_word.logits_kernel, tile(logits) | {"BD": logits.columns, "DOT": dot, "COSINE": cosine}, logits),
        (merge.merge_kernel, {"TP": words, "TERMS": 15, "MAX_PROGRAMS": plan.MAX_PARTIALS}, plan.MERGE_BLOCKS),
        (pixel_word_backward.gradient_kernel, tile(gradient) | slab(gradient) | {"TERMS": 15}, gradient),
        (pixel_word_features.pixels_kernel, tile(to_pixels) | {"BD": to_pixels.columns}, to_pixels),
        (pixel_word_features.words_kernel, tile(to_words) | {"BD": to_words.columns}, to_words),
        (pixel_word_features.merge_words_kernel, {"BD": merge_words.columns, "CHUNK": 8}, merge_words),
    ]  # fmt: skip
    for terms in dict.fromkeys(terms_of.values()):
        separate_grams = words > terms.columns
        cases.append((pixel_word.terms_kernel, tile(terms) | {"TERMS": 3 if separate_grams else 15}, terms))
        if separate_grams:
            cases.append((pixel_word.grams_kernel, tile(terms) | slab(terms), terms))
    features = ("words_ptr", "features_ptr", "grad_pixels_ptr", "grad_words_ptr")
    for kernel, constants, blocks in cases:
        name = kernel.__name__.removesuffix("_kernel")
        constants = dict(constants)
        options = blocks.launch(plan.FUSED or name not in COMPARING)
        if name in ("terms", "grams"):
            options["but"] = [target for target, own in terms_of.items() if own != blocks]
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
            elif "stride" in argument:
                types[argument] = "i64:16" if "stride_b" in argument else "i32:16"
            else:  # Triton specialises these sizes on divisibility by 16
                types[argument] = "i32:16" if argument.endswith(SPECIALISED.get(name, ("pixels", "width"))) else "i32"
        yield f"pixel_word.{name}", kernel, types, constants, blocks.warps, options


COMPARING = ("terms", "grams", "merge", "gradient")
"""Kernels that compare student and teacher."""

SPECIALISED: dict[str, tuple[str, ...]] = {"merge": ()}
"""Sizes specialised on divisibility by 16, for kernels where these are not ``pixels`` and ``width``."""

ABSENT = {
    "logits": ("norms_ptr",),
    "pixels": ("norms_ptr", "features_ptr", "logits_ptr"),
    "words": ("norms_ptr",),
    "merge_words": ("words_ptr",),
}
"""Arguments that are None unless the similarity is cosine."""


def unit_strides(kernel: str, maps: bool) -> tuple[str, ...]:
    """Return the strides that are 1, for pixels as rows of features or as maps; logits are laid out like maps."""
    words = ("words_stride_d",)
    if kernel in ("gradient", "terms", "grams"):
        words += ("student_stride_n", "teacher_stride_n", "grad_logits_stride_n")
    if kernel != "logits" and not maps:
        return (*words, "features_stride_d", "grad_pixels_stride_d")
    if not maps:
        return (*words, "features_stride_d", "grad_pixels_stride_d", "student_stride_d", "teacher_stride_d")
    return (*words, "features_stride_n", "grad_pixels_stride_n", "student_stride_n", "teacher_stride_n")

"""What ``aot.py`` compiles of the family ``pixel_word``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.aot.cases import TARGETS, Case


def pixel_word_cases(dtype: str) -> Iterator[Case]:
    """The same for every number of words that has blocks of its own: all terms, masked; rows and maps; the cosine."""
    if dtype == "fp64":
        return  # it has no such kernels
    for words in (16, 32, 64, 128):
        yield from pixel_word_kernels(dtype, words, maps=False, cosine=False)
    yield from pixel_word_kernels(dtype, 32, maps=True, cosine=True)


def pixel_word_kernels(dtype: str, words: int, *, maps: bool, cosine: bool) -> Iterator[Case]:
    """Every kernel of the family for one padded number of words."""
    import triton.language as tl
    from fastkd.kernels.pixel_word import backward as pixel_word_backward
    from fastkd.kernels.pixel_word import forward as pixel_word
    from fastkd.kernels.pixel_word import tiles as shared

    half = dtype != "fp32"
    logits = shared.logits_blocks(words, half)
    terms_of = {target: shared.terms_blocks(words, target // 10) for target in TARGETS}
    gradient, to_pixels = shared.gradient_blocks(words), shared.pixels_blocks(words, half)
    to_words = shared.words_blocks(words, half)
    dot = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[dtype]
    tile = lambda blocks: {"BN": blocks.pixels, "TP": words}
    slab = lambda blocks: {"SLAB": min(words, blocks.columns)}
    cases: list[tuple[Any, dict[str, Any], Any]] = [
        (pixel_word.logits_kernel, tile(logits) | {"BD": logits.columns, "DOT": dot, "COSINE": cosine}, logits),
        (pixel_word.merge_kernel, {"TP": words, "TERMS": 15, "MOST": shared.MOST_SUMS}, shared.MERGE),
        (pixel_word_backward.gradient_kernel, tile(gradient) | slab(gradient) | {"TERMS": 15}, gradient),
        (pixel_word_backward.pixels_kernel, tile(to_pixels) | {"BD": to_pixels.columns}, to_pixels),
        (pixel_word_backward.words_kernel, tile(to_words) | {"BD": to_words.columns}, to_words),
        (pixel_word_backward.merge_words_kernel, {"BD": shared.MERGE_WORDS.columns, "SOME": 8}, shared.MERGE_WORDS),
    ]  # fmt: skip
    for terms in dict.fromkeys(terms_of.values()):
        later = words > terms.columns
        cases.append((pixel_word.terms_kernel, tile(terms) | {"TERMS": 3 if later else 15}, terms))
        if later:
            cases.append((pixel_word.grams_kernel, tile(terms) | slab(terms), terms))
    features = ("words_ptr", "features_ptr", "grad_pixels_ptr", "grad_words_ptr")
    for kernel, constants, blocks in cases:
        name = kernel.__name__.removesuffix("_kernel")
        constants = dict(constants)
        options = blocks.launch(shared.FUSED or name not in COMPARING)
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
            else:  # the sizes that Triton specialises on where 16 divides them
                types[argument] = "i32:16" if argument.endswith(SPECIALISED.get(name, ("pixels", "width"))) else "i32"
        yield f"pixel_word.{name}", kernel, types, constants, blocks.warps, options


COMPARING = ("terms", "grams", "merge", "gradient")
"""Kernels where student and teacher meet."""

SPECIALISED: dict[str, tuple[str, ...]] = {"merge": ()}
"""Which sizes, where not the usual ones."""

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

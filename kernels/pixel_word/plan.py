"""Block shapes of the ``pixel_word`` kernels, and how a launch is divided into programs.

This module does not import Triton.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from fastkd.kernels.launch import launch_options

from fastkd._integers import ceil_div

MAX_WORDS = 128
"""Maximum number of words; more would not fit in the registers of a program."""

TARGET_PROGRAMS = 528
"""Approximate number of programs per launch: four for each of 132 multiprocessors (H100)."""

MAX_PARTIALS = 64
"""Maximum number of programs per sample; ``merge_kernel`` adds their partial sums."""

FUSED = False
"""Fused multiply-adds are off where student and teacher are compared: they would round only one of two equal products,
and the difference would not be 0."""


class Blocks(NamedTuple):
    """Block shape of a kernel: ``pixels`` × ``columns`` (features, or columns of a words × words matrix) per step."""

    pixels: int
    columns: int
    warps: int
    stages: int = 3
    registers: int | None = None
    """Register limit per thread, set where the default of ptxas spills (``launch.MAX_REGISTERS``)."""

    def launch(self, fused: bool = True) -> dict[str, Any]:
        """Return the options of a launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": fused, **limit}


def padded_words(words: int) -> int:
    """Return TP, the number of words padded to a power of two of at least 16, the minimum for tensor cores."""
    return max(16, 1 << (words - 1).bit_length())


# Chosen by ahead-of-time compilation for every chip (benchmarks/aot): first to avoid spills, then to fit several
# programs on a multiprocessor. ``half`` means 16-bit features.
def logits_blocks(words: int, half: bool) -> Blocks:
    """Return the blocks of ``logits_kernel`` for TP words."""
    if half:
        return Blocks(64, 64 if words <= 64 else 32, 8)
    return Blocks(64 if words <= 64 else 32, 32, 4 if words <= 32 else 8)


def terms_blocks(words: int, capability: int) -> Blocks:
    """Return the blocks of ``terms_kernel`` and, for more words than ``columns``, of ``grams_kernel``.

    With two stages registers spill at 16 and 32 words on 9.0 and 10.x, and Triton 3.6 cannot compile ``grams_kernel``
    at 64 words for 10.x, where odd widths at 32 words spill without a stated limit.
    """
    return {
        16: Blocks(32, 32, 4, 1),
        32: Blocks(16, 32, 4, 1, registers=255 if capability == 10 else None),
        64: Blocks(32, 32, 8, 1),
        128: Blocks(16, 16, 8, 1, registers=255),
    }[words]


def gradient_blocks(words: int) -> Blocks:
    """Return the blocks of ``gradient_kernel``."""
    return {
        16: Blocks(32, 16, 4, 2),
        32: Blocks(16, 32, 4, 2),
        64: Blocks(32, 64, 8, 1),
        128: Blocks(16, 16, 8, 1),
    }[words]


def pixels_blocks(words: int, half: bool) -> Blocks:
    """Return the blocks of ``pixels_kernel``."""
    if words > 64:
        return Blocks(32 if half else 16, 32, 8, 2)
    return Blocks(64, 64, 8) if half else Blocks(64, 32, 4 if words <= 32 else 8)


def words_blocks(words: int, half: bool, capability: int) -> Blocks:
    """Return the blocks of ``words_kernel``.

    By default ptxas stops at 128 or 168 registers, and odd widths spill: 16 words on 9.0, 32 on 10.x and 12.x.
    """
    registers = 255 if (half and words == 16) or (words == 32 and capability >= 10) else None
    if half:
        return Blocks(64 if words <= 64 else 32, 64, 4 if words <= 32 else 8, 3 if words <= 64 else 2, registers)
    return Blocks(32, 32, 4 if words <= 64 else 8, 2, registers)


MERGE_BLOCKS = Blocks(0, 0, 8, registers=255)
"""Blocks of ``merge_kernel``, one program per sample."""

MERGE_WORDS_BLOCKS = Blocks(0, 128, 4)
"""Blocks of ``merge_words_kernel``."""


def pixel_unit(pixels: int) -> int:
    """Return the unit in which kernels take the number of pixels: 16, which makes loads wide, where it divides it."""
    return 1 if pixels % 16 else 16


def split_pixels(pixels: int, block: int, batch: int, max_programs: int) -> tuple[int, int]:
    """Return the numbers of pixel blocks per program and of programs per sample."""
    blocks = ceil_div(pixels, block)
    blocks_per_program = ceil_div(blocks, min(max_programs, ceil_div(TARGET_PROGRAMS, batch)))
    return blocks_per_program, ceil_div(blocks, blocks_per_program)


# ---------------------------------------------------------------------------------------------------------------------
# The launches of a call. Sizes and options repeat from step to step, and on the host a plan takes as long to make as a
# launch: plans are cached.
# ---------------------------------------------------------------------------------------------------------------------
PLANS = 256
"""Number of plans of each pass that are kept."""

SECOND_ORDER = 12
"""The bits of "pixel_pixel" and "word_word" in ``terms``."""


class Launch(NamedTuple):
    """The arguments of a launch that follow from sizes and options, without tensors."""

    sizes: tuple[int, ...]
    options: dict[str, Any]


def _launch(grid: tuple[int, ...], sizes: tuple[int, ...], constants: dict[str, Any]) -> Launch:
    return Launch(sizes, launch_options(grid, constants))


class ForwardPlan(NamedTuple):
    """The launches of a forward; None where a kernel is not needed."""

    logits: Launch
    terms: Launch | None
    grams: Launch | None
    merge: Launch
    partials: tuple[int, int, int]  # shape of the programs' sums


@functools.lru_cache(PLANS)
def forward_plan(
    batch: int, pixels: int, counts: tuple[int, int], half: bool, cosine: bool, terms: int, capability: int
) -> ForwardPlan:
    """Return the launches of a forward for ``counts`` words of student and teacher; ``half``: 16-bit features."""
    words = padded_words(max(counts))
    blocks = logits_blocks(words, half)
    unit = pixel_unit(pixels)
    logits = _launch(
        (batch, ceil_div(pixels, blocks.pixels)),
        (pixels // unit,),
        {
            "PIXEL_UNIT": unit,
            "BN": blocks.pixels,
            "TP": words,
            "BD": blocks.columns,
            "COSINE": cosine,
            **blocks.launch(),
        },
    )
    blocks = terms_blocks(words, capability)
    separate_grams = words > blocks.columns and bool(terms & SECOND_ORDER)
    blocks_per_program, programs = split_pixels(pixels, blocks.pixels, batch, MAX_PARTIALS)
    sizes, common = (pixels, blocks_per_program, programs), {"BN": blocks.pixels, "TP": words, **blocks.launch(FUSED)}
    first_order = terms & ~SECOND_ORDER
    of_terms = of_grams = None
    if first_order or not separate_grams:
        of_terms = _launch((batch, programs), sizes, {"TERMS": first_order if separate_grams else terms, **common})
    if separate_grams:
        of_grams = _launch((batch, programs, words // blocks.columns), sizes, {"SLAB": blocks.columns, **common})
    merge = _launch(
        (batch,),
        (pixels, counts[0], max(counts), programs),
        {"TP": words, "TERMS": terms, "MAX_PROGRAMS": MAX_PARTIALS, **MERGE_BLOCKS.launch(FUSED)},
    )
    return ForwardPlan(logits, of_terms, of_grams, merge, (batch, programs, 8 * words + 3 * words * words))


class BackwardPlan(NamedTuple):
    """The launches of a backward; ``pixels``, ``words`` and ``merge`` are for features."""

    gradient: Launch
    pixels: Launch
    words: Launch
    merge: Launch
    sums: tuple[int, int, int, int]  # shape of the sums of ``words_kernel``


@functools.lru_cache(PLANS)
def backward_plan(
    batch: int, pixels: int, width: int, counts: tuple[int, int], half: bool, terms: int, capability: int
) -> BackwardPlan:
    """Return the launches of a backward for features of ``width``, or logits."""
    count, padded = counts[0], padded_words(max(counts))
    blocks = gradient_blocks(padded)
    blocks_per_program, programs = split_pixels(pixels, blocks.pixels, batch, pixels)
    gradient = _launch(
        (batch, programs),
        (pixels, max(counts), blocks_per_program),
        {
            "BN": blocks.pixels,
            "TP": padded,
            "SLAB": min(padded, blocks.columns),
            "TERMS": terms,
            **blocks.launch(FUSED),
        },
    )
    unit, padded = pixel_unit(pixels), padded_words(count)
    blocks = pixels_blocks(padded, half)
    of_pixels = _launch(
        (batch, ceil_div(pixels, blocks.pixels)),
        (pixels // unit, count, width),
        {"PIXEL_UNIT": unit, "BN": blocks.pixels, "TP": padded, "BD": blocks.columns, **blocks.launch()},
    )
    blocks = words_blocks(padded, half, capability)
    chunks = ceil_div(width, blocks.columns)
    blocks_per_program, runs = split_pixels(pixels, blocks.pixels, batch * chunks, MAX_PARTIALS)
    of_words = _launch(
        (batch, runs, chunks),
        (pixels // unit, count, width, blocks_per_program, runs),
        {"PIXEL_UNIT": unit, "BN": blocks.pixels, "TP": padded, "BD": blocks.columns, **blocks.launch()},
    )
    merge = _launch(
        (batch, count),
        (count, width, runs),
        {
            "BD": MERGE_WORDS_BLOCKS.columns,
            "CHUNK": 8,
            "num_warps": MERGE_WORDS_BLOCKS.warps,
            "enable_fp_fusion": True,
        },
    )
    return BackwardPlan(gradient, of_pixels, of_words, merge, (batch, runs, count, width))

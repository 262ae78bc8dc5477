"""Triton kernels of ``pixel_word``: padded words, blocks and their edges, programs and layouts.

Without a GPU the kernels run under the interpreter on CPU tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from gpu_kernels import MARKS, require_gpu_kernels
from pixel_word_tools import Kernels, as_maps, check, here, make, masks_of, run

from fastkd._integers import ceil_div
from fastkd.ops import dispatch
from fastkd.ops.pixel_word.plan import MAX_WORDS
from fastkd.ops.pixel_word.reference import pixel_word as reference
from fastkd.ops.pixel_word.reference import pixel_word_from_logits as reference_from_logits

if reason := dispatch.unavailable_reason("triton"):
    pytest.skip(f"Triton is unavailable: {reason}", allow_module_level=True)

from fastkd.kernels.pixel_word import plan

pytestmark = [*MARKS, pytest.mark.usefixtures("kernels")]
INF, NAN = math.inf, math.nan


@pytest.fixture
def kernels() -> Iterator[None]:
    with require_gpu_kernels("triton"):
        yield


triton, from_logits = Kernels("triton").features, Kernels("triton").logits

# (B, N, T, D_S, D_T) for each padded number of words, 16 to 128: less than a block of pixels, whole blocks, one pixel
# more; one or more blocks of features. Gram matrices are computed in slabs from 33 words on, the gradient from 65.
SHAPES = [(2, 1, 1, 1, 2), (2, 33, 16, 3, 70), (2, 64, 20, 65, 40), (1, 65, 33, 17, 5), (1, 40, 128, 8, 8)]


@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_fp64(shape: tuple[int, ...], similarity: str) -> None:
    inputs = here(make(*shape))
    options = {"similarity": similarity, "temperature": 0.7}
    check(inputs, triton, reference, **options, **masks_of(*shape[:3]))
    check(as_maps(inputs), triton, reference, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]], ids=str)
def test_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = here(make(*shape, dtype=dtype))
    check(inputs, triton, reference)
    check(as_maps(inputs), triton, reference, similarity="cosine", **masks_of(*shape[:3]))


@pytest.mark.parametrize("words", [5, 40])
@pytest.mark.parametrize("programs", [1, 4])
def test_results_do_not_depend_on_the_number_of_programs(
    monkeypatch: pytest.MonkeyPatch, programs: int, words: int
) -> None:
    """One program with five or more blocks, and a few programs with unequal numbers of blocks."""
    inputs, masks = here(make(2, 150, words, 8)), masks_of(2, 150, words)
    many = run(triton, inputs, **masks)
    monkeypatch.setattr(plan, "TARGET_PROGRAMS", programs)
    few = run(triton, inputs, **masks)
    check(inputs, triton, reference, **masks)
    for got, want in zip(few, many, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_merges_the_maximum_number_of_partial_sums() -> None:
    """More than 64 blocks of pixels, shared by the maximum number of programs per sample."""
    logits = here(make(1, 32 * 70, 2, 2)[::2])
    check(logits, from_logits, reference_from_logits, 1)


def test_every_number_of_words_has_blocks() -> None:
    """Each padded number of words has blocks, and no sample has more programs than ``merge_kernel`` adds."""
    assert MAX_WORDS["triton"] == plan.MAX_WORDS
    for words in range(1, plan.MAX_WORDS + 1):
        padded = plan.padded_words(words)
        assert words <= padded <= max(16, 2 * words)
        for blocks in (plan.logits_blocks(padded, True), plan.words_blocks(padded, False, 9)):
            assert blocks.pixels >= 16
            assert blocks.columns >= 16
        assert padded % plan.gradient_blocks(padded).columns == 0
    for pixels in (1, 32, 14_400, 10_000_000):
        for batch in (1, 16, 10_000):
            per_program, programs = plan.split_pixels(pixels, 32, batch, plan.MAX_PARTIALS)
            assert programs <= plan.MAX_PARTIALS
            assert (programs - 1) * per_program < ceil_div(pixels, 32) <= programs * per_program

"""What is particular to the pixel_word kernels in Triton: padded words, blocks and their edges, programs, layouts.

Under the interpreter on CPU tensors where there is no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from gpu_kernels import MARKS, require_gpu_kernels
from pixel_word_tools import Kernels, as_maps, check, here, make, masks_of, run

from fastkd.ops import dispatch
from fastkd.ops.pixel_word.plan import MOST_WORDS
from fastkd.ops.pixel_word.reference import pixel_word as reference
from fastkd.ops.pixel_word.reference import pixel_word_from_logits as reference_from_logits

if reason := dispatch.unavailable_reason("triton"):
    pytest.skip(f"no Triton: {reason}", allow_module_level=True)

from fastkd.kernels.pixel_word import tiles as shared

pytestmark = [*MARKS, pytest.mark.usefixtures("kernels")]
INF, NAN = math.inf, math.nan


@pytest.fixture
def kernels() -> Iterator[None]:
    with require_gpu_kernels("triton"):
        yield


triton, from_logits = Kernels("triton").features, Kernels("triton").logits

# One of each padded number of words, 16 to 128, with less than a block of pixels, whole blocks and one more, features
# within a block and beyond one. 33 words and more have their Grams by slabs, 65 and more the gradient too.
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
def test_several_blocks_and_several_programs(monkeypatch: pytest.MonkeyPatch, programs: int, words: int) -> None:
    """One program for five blocks and more; a few, of unequal work; the same numbers but for the order of sums."""
    inputs, masks = here(make(2, 150, words, 8)), masks_of(2, 150, words)
    many = run(triton, inputs, **masks)
    monkeypatch.setattr(shared, "PROGRAMS", programs)
    few = run(triton, inputs, **masks)
    check(inputs, triton, reference, **masks)
    for got, want in zip(few, many, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_many_partial_sums_are_merged() -> None:
    """As many programs to a sample as there can be, each with its share of more than 64 blocks."""
    logits = here(make(1, 32 * 70, 2, 2)[::2])
    check(logits, from_logits, reference_from_logits, 1)


def test_blocks_exist_for_all_words() -> None:
    """Whatever the number of words, a power of two that the tables know, and no more programs than are merged."""
    assert MOST_WORDS["triton"] == shared.MOST_WORDS
    for words in range(1, shared.MOST_WORDS + 1):
        padded = shared.padded(words)
        assert words <= padded <= max(16, 2 * words)
        for blocks in (shared.logits_blocks(padded, True), shared.words_blocks(padded, False)):
            assert blocks.pixels >= 16
            assert blocks.columns >= 16
        assert padded % shared.gradient_blocks(padded).columns == 0
    for pixels in (1, 32, 14_400, 10_000_000):
        for batch in (1, 16, 10_000):
            each, programs = shared.cut(pixels, 32, batch, shared.MOST_SUMS)
            assert programs <= shared.MOST_SUMS
            assert (programs - 1) * each < -(-pixels // 32) <= programs * each

"""The pixel_word kernels in CUDA C++: numbers of words, edges of steps, layouts, fp64.

Without a GPU they run on CPU tensors, built for the host (``emulation.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_kernels import DEVICE, MARKS, require_gpu_kernels
from pixel_word_tools import Kernels, as_maps, check, here, make, masks_of, run

from fastkd.ops.pixel_word.reference import pixel_word as reference
from fastkd.ops.pixel_word.reference import pixel_word_from_logits as reference_from_logits

pytestmark = [*MARKS, pytest.mark.usefixtures("kernels")]
INF, NAN = math.inf, math.nan


@pytest.fixture
def kernels() -> Iterator[None]:
    with require_gpu_kernels("cuda"):
        yield


cuda, from_logits = Kernels("cuda").features, Kernels("cuda").logits

# Kernels are compiled for up to 24, 32, 64 and 128 words. Steps have 128 pixels (64 or 32 where two or four warps share
# the words), tiles 16 pixels, feature blocks 32 (16-bit) or 16 features; words are in shared memory a chunk at a time.
SHAPES = [
    (2, 1, 1, 1, 2),
    (2, 33, 16, 3, 70),
    (2, 128, 24, 64, 40),
    (2, 129, 30, 72, 40),
    (1, 65, 33, 17, 5),
    (1, 64, 64, 32, 96),
    (1, 40, 128, 8, 8),
]


@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_fp64(shape: tuple[int, ...], similarity: str) -> None:
    inputs = here(make(*shape))
    options = {"similarity": similarity, "temperature": 0.7}
    check(inputs, cuda, reference, **options, **masks_of(*shape[:3]))
    check(as_maps(inputs), cuda, reference, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3], SHAPES[6]], ids=str)
def test_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = here(make(*shape, dtype=dtype))
    check(inputs, cuda, reference)
    check(as_maps(inputs), cuda, reference, similarity="cosine", **masks_of(*shape[:3]))


@pytest.mark.parametrize("shape", [(530, 130, 5, 4), (530, 33, 65, 2)], ids=str)
def test_several_steps_per_block(shape: tuple[int, ...]) -> None:
    """A batch with one thread block per sample: two steps of 128 or 32 pixels, the second one partial."""
    inputs, masks = here(make(*shape)), masks_of(*shape[:3])
    in_batch = run(cuda, inputs, **masks)
    check([x[-2:] for x in inputs], cuda, reference, **{name: mask[-2:] for name, mask in masks.items()})
    weights = torch.linspace(1, 2, shape[0], device=DEVICE)[-2:] / torch.linspace(1, 2, 2, device=DEVICE)
    alone = run(cuda, [x[-2:] for x in inputs], **{name: mask[-2:] for name, mask in masks.items()})
    alone[1:] = [x * weights[:, None, None] for x in alone[1:]]  # alone, each step has its own thread block
    for got, want in zip(in_batch, alone, strict=True):
        torch.testing.assert_close(got[-2:], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", [20, 100])
def test_words_larger_than_shared_memory(words: int, dtype: torch.dtype) -> None:
    inputs = here(make(1, 150, words, 1100, 520, dtype=dtype))
    check(inputs, cuda, reference, similarity="cosine", temperature=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 47, 7, 21), (1, 50, 35, 30)], ids=str)
def test_any_alignment(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Rows and maps at odd addresses, without 16-byte loads."""
    inputs = here(make(*shape, dtype=dtype))
    odd = [torch.cat([x.new_full((1,), NAN), x.flatten()])[1:].view(x.shape) for x in inputs]
    for got, want in zip(run(cuda, odd), run(cuda, [x.clone() for x in inputs]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    check(as_maps(odd), cuda, reference)
    padded = [torch.nn.functional.pad(x, (0, 5))[..., : x.shape[2]] for x in inputs]
    check(padded, cuda, reference, similarity="cosine")


@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1, 2), (3, 70, 20, 33, 17), (1, 41, 128, 9, 9)], ids=str)
def test_fp64(shape: tuple[int, ...], similarity: str) -> None:
    inputs = here(make(*shape, dtype=torch.float64))
    masks = masks_of(*shape[:3])
    check(inputs, cuda, reference, similarity=similarity, temperature=0.7, **masks)
    check(as_maps(inputs), cuda, reference, similarity=similarity)
    logits = [v @ w.mT for v, w in (inputs[:2], inputs[2:])]
    check(logits, from_logits, reference_from_logits, 1, **masks)
    mixed = [x.float() if i == 0 else x for i, x in enumerate(inputs)]  # its gradient has its dtype, not fp64
    got = run(cuda, mixed, similarity=similarity)
    want = run(reference, [x.double() for x in mixed], similarity=similarity)
    assert [x.dtype for x in got] == [torch.float64, torch.float32, torch.float64]
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)


def test_rejects_problems_beyond_the_index_range() -> None:
    """Errors are raised before any launch or access."""
    from fastkd.ops.launch import native

    module = native("cuda")
    memory = torch.zeros(64, device=DEVICE)
    side = ((memory.data_ptr(), "float32", (0, 0, 1)), memory.data_ptr(), 0, 4, 8, 1.0, False)

    def problem(words: int = 4, width: int = 8, batch: int = 1, pixels: int = 4, address: int = 0) -> Any:
        own = ((address or memory.data_ptr(), "float32", (0, 0, 1)), *side[1:3], words, width, 1.0, False)
        return module.PixelWord((own, own, 0, batch, pixels, "float32", False, 15), 0, 2**25)

    problem()
    for beyond in ({"words": 129}, {"width": 2**28 + 1}, {"pixels": 2**28 + 1}, {"batch": 2**31}):
        with pytest.raises(ValueError, match="too many words, pixels, features or samples"):
            problem(**beyond)
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        problem(address=memory.data_ptr() + 2)
    with pytest.raises(ValueError, match="loss: expected an address, got 0"):
        problem().forward([0, 0, 0, 0], 0, memory.data_ptr())
    with pytest.raises(RuntimeError, match="pixel_word_forward: cudaErrorInvalidValue"):  # no array for the logits
        problem().forward([0, 0, 0, 0], memory.data_ptr(), memory.data_ptr())

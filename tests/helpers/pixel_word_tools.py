"""Inputs, calls and error bounds shared by the tests of the pixel_word operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpu_kernels import DEVICE
from torch import Tensor

from fastkd.ops.pixel_word import pixel_word, pixel_word_from_logits
from fastkd.ops.pixel_word.reference import TERMS

WEIGHTS = dict(zip(TERMS, (1.0, 0.7, 3.0, 2.0), strict=True))
Masks = dict[str, Tensor]


def make(
    b: int, n: int, t: int, d: int, d_teacher: int | None = None, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Return pixels and words of student and teacher, drawn in fp64 and rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, n, d), (b, t, d), (b, n, d_teacher or d), (b, t, d_teacher or d)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def make_masks(b: int, n: int, t: int) -> Masks:
    generator = torch.Generator().manual_seed(n + t)
    words, pixels = torch.rand(b, t, generator=generator) > 0.4, torch.rand(b, n, generator=generator) > 0.3
    words[:, t // 2] = pixels[:, n // 2] = True
    return {"student_word_mask": words, "teacher_word_mask": words, "pixel_mask": pixels}


def as_maps(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the inputs with pixels in the memory layout of (B, D, N) maps."""
    return [x.mT.contiguous().mT if i % 2 == 0 else x for i, x in enumerate(inputs)]


def run(function: Any, inputs: Sequence[Tensor], leaves: int = 2, **options: Any) -> list[Tensor]:
    """Return the terms (B, number of terms) and the gradients of a weighted sum by the first ``leaves`` inputs."""
    inputs = [x.detach().requires_grad_(i < leaves) for i, x in enumerate(inputs)]
    terms = function(*inputs, **options)
    samples = torch.linspace(1, 2, inputs[0].shape[0], dtype=torch.float64, device=inputs[0].device)
    total = sum((WEIGHTS[name] * samples.to(value.dtype) * value).sum() for name, value in terms.items())
    return [torch.stack(list(terms.values()), 1).detach(), *torch.autograd.grad(total, inputs[:leaves])]


def check(inputs: Sequence[Tensor], ours: Any, plain: Any, leaves: int = 2, **options: Any) -> None:
    """Assert that errors are at most twice the eager formula's in the same dtype, plus roundings of intermediates."""
    exact = run(plain, [x.double() for x in inputs], leaves, **options)
    theirs = run(plain, inputs, leaves, **options)
    got = run(ours, inputs, leaves, **options)
    entries = inputs[0].shape[1] * (inputs[1] if leaves == 2 else inputs[0].mT).shape[1]
    arithmetic = torch.finfo(got[0].dtype).eps
    for index, (g, p, e) in enumerate(zip(got, theirs, exact, strict=True)):
        assert g.dtype == p.dtype
        assert g.shape == e.shape
        error, plain_error = ((x.double() - e).abs().max().item() for x in (g, p))
        stored = torch.finfo(g.dtype).eps
        # A KL is a difference of terms around 1; its gradient is a difference of terms around 1/entries.
        size = max(e.abs().max().item(), 1 / entries if index else 1.0)
        if g.dtype == torch.float64:  # the eager formula is the oracle
            assert error <= 32 * arithmetic * size
            continue
        assert error <= 2 * plain_error + (stored + 8 * arithmetic) * size, (index, error, plain_error, size)
        assert error <= (8 * stored + 64 * arithmetic) * size


class Kernels:
    """The operator on one backend."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def features(self, *inputs: Tensor, **options: Any) -> dict[str, Tensor]:
        return pixel_word(*inputs, backend=self.backend, **options)

    def logits(self, *inputs: Tensor, **options: Any) -> dict[str, Tensor]:
        return pixel_word_from_logits(*inputs, backend=self.backend, **options)


def here(inputs: list[Tensor]) -> list[Tensor]:
    """Return the inputs on the device of this machine's GPU kernels."""
    return [x.to(DEVICE) for x in inputs]


def masks_of(b: int, n: int, t: int) -> Masks:
    return {name: mask.to(DEVICE) for name, mask in make_masks(b, n, t).items()}

"""Inputs, runs and error bounds that the files on relation's kernels share."""

from __future__ import annotations

import math
from typing import Any

import torch
from gpu_kernels import DEVICE
from torch import Tensor

from fastkd.ops.relation import relation
from fastkd.ops.relation.reference import relation as reference

# Each method of the kernels, negated or not; 0.03 is below the fixed shift.
METHODS: dict[str, dict[str, Any]] = {
    "kl": {"temperature": 0.2},
    "kl away from its shift": {"temperature": 0.05, "negate": True},
    "kl maxima": {"temperature": 0.03, "negate": True},
    "kl of means": {"temperature": 0.5, "similarity": "mean"},
    "mse": {"distance": "mse"},
    "row_cosine": {"distance": "row_cosine"},
    "row_cosine of products": {"distance": "row_cosine", "similarity": "dot"},
}
FORMS: dict[str, dict[str, Any]] = {"streamed": {}, "stored": {"keep": True}, "across samples": {"cross": True}}
# Half a unit of what stores the gradient, of its largest entry.
STORED = {torch.float32: 6e-8, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = list(STORED)
H_IN_BF16 = ("cuda",)
"""Backends that round to bfloat16, for rows of bfloat16, the matrix that gives the gradient as well."""


def rows(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(DEVICE, dtype)


def loss_and_gradient(f: Any, student: Tensor, teacher: Tensor, weight: Tensor, **options: Any) -> list[Tensor]:
    leaf = student.detach().requires_grad_()
    loss = f(leaf, teacher, **options)
    return [loss.detach(), torch.autograd.grad(loss, leaf, weight.to(loss.dtype))[0]]


def run_kernel(backend: str, student: Tensor, teacher: Tensor, weight: Tensor, **options: Any) -> list[Tensor]:
    return loss_and_gradient(relation, student, teacher, weight, backend=backend, **options)


def check_kernel(
    backend: str, student: Tensor, teacher: Tensor, weight: Tensor, least: float = 0.1, **options: Any
) -> list[Tensor]:
    """No further from fp64 than twice the plain formula in fp32, a few roundings of the logits, and what is stored.

    ``least`` bounds from below the size of what cancels in a loss or a gradient that vanishes.
    """
    condition = 1.0
    if options.get("distance", "kl") == "kl":  # logits and log-sum-exps, whose differences losses are
        condition = 1 / options.get("temperature", 0.1) + math.log(student.shape[1])
    got = run_kernel(backend, student, teacher, weight, **options)
    options.pop("keep", None)
    exact = loss_and_gradient(reference, student.double(), teacher.double(), weight.double(), **options)
    plain = loss_and_gradient(reference, student.float(), teacher.float(), weight, **options)
    for mine, eager, right in zip(got, plain, exact, strict=True):
        largest = right.abs().max().item()
        stored = STORED[mine.dtype] * (2 if mine.dtype == torch.bfloat16 and backend in H_IN_BF16 else 1)
        allowed = 2 * (eager.double() - right).abs().max().item() + stored * largest
        assert (mine.double() - right).abs().max().item() <= allowed + 3e-7 * condition * max(largest, least)
    return got

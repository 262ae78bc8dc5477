"""Inputs, calls and error bounds shared by the tests of the relation kernels."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from gpu_kernels import DEVICE
from torch import Tensor

from fastkd.ops import launch
from fastkd.ops.relation import relation
from fastkd.ops.relation.reference import relation as reference

# Every method of the kernels, with and without negation. At a temperature of 0.03 the fixed shift does not apply.
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
# Half a unit in the last place of each dtype that stores gradients, relative to the largest entry.
STORED = {torch.float32: 6e-8, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = list(STORED)
H_IN_BF16 = ("triton", "cuda")
"""Backends that also round the matrix H to bfloat16 for rows of bfloat16."""


def rows(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(device, dtype)


def distance(got: Tensor, exact: Tensor) -> float:
    """Return the relative error in norm."""
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def drawn_for(method: str, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return a student of this shape and a slightly wider teacher that exercise every term of the method."""
    batch, count, width = shape
    student, teacher = rows(shape, 0, dtype), rows((batch, count, width + 5), 1, dtype)
    if "maxima" in method:  # at a temperature of 0.03 only similar rows have several nonzero probabilities
        student, teacher = (0.05 * x + rows((batch, 1, x.shape[2]), 2, dtype) for x in (student, teacher))
    if method == "row_cosine":  # sum d^2 <= n m in the first sample, which selects the formula of close relations
        teacher[0, :, :width] += student[0]
    return student, teacher


def one_block_per_launch(monkeypatch: pytest.MonkeyPatch, calls: str) -> None:
    """Plan for a workspace of one byte: each launch of ``fastkd.ops.relation.<calls>`` computes one block of rows."""
    module = importlib.import_module(f"fastkd.ops.relation.{calls}")
    for owner, name in ((launch, "check_workspace"), (module, "check_workspace"), (module, "workspace_limit")):
        if hasattr(owner, name):
            monkeypatch.setattr(owner, name, lambda *_: 1)


def loss_and_gradient(f: Any, student: Tensor, teacher: Tensor, weight: Tensor, **options: Any) -> list[Tensor]:
    leaf = student.detach().requires_grad_()
    loss = f(leaf, teacher, **options)
    return [loss.detach(), torch.autograd.grad(loss, leaf, weight.to(loss.dtype))[0]]


def run_kernel(backend: str, student: Tensor, teacher: Tensor, weight: Tensor, **options: Any) -> list[Tensor]:
    return loss_and_gradient(relation, student, teacher, weight, backend=backend, **options)


def check_kernel(
    backend: str, student: Tensor, teacher: Tensor, weight: Tensor, min_size: float = 0.1, **options: Any
) -> list[Tensor]:
    """Assert that errors against fp64 are at most twice the eager formula's in fp32, plus roundings.

    ``min_size`` is a lower bound on the size of summands that cancel.
    """
    condition = 1.0
    if options.get("distance", "kl") == "kl":  # the loss is a difference of logits and log-sum-exps
        condition = 1 / options.get("temperature", 0.1) + math.log(student.shape[1])
    got = run_kernel(backend, student, teacher, weight, **options)
    options.pop("keep", None)
    exact = loss_and_gradient(reference, student.double(), teacher.double(), weight.double(), **options)
    plain = loss_and_gradient(reference, student.float(), teacher.float(), weight, **options)
    for ours, eager, expected in zip(got, plain, exact, strict=True):
        largest = expected.abs().max().item()
        stored = STORED[ours.dtype] * (2 if ours.dtype == torch.bfloat16 and backend in H_IN_BF16 else 1)
        allowed = 2 * (eager.double() - expected).abs().max().item() + stored * largest
        assert (ours.double() - expected).abs().max().item() <= allowed + 3e-7 * condition * max(largest, min_size)
    return got


def assert_near(got: list[Tensor], want: list[Tensor]) -> None:
    """Compare up to the order of sums and the rounding of the stored results."""
    for a, b in zip(got, want, strict=True):
        near = 3e-6 + (torch.finfo(a.dtype).eps if a.dtype != torch.float32 else 0.0)
        torch.testing.assert_close(a, b, rtol=0, atol=5e-7 + near * b.abs().max().item())

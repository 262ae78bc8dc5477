"""What the launches of a ``relation`` call have in common. It depends on shapes, strides, dtypes and options only.

These repeat from step to step, and on the host a plan takes longer to make than all launches: plans are cached, without
tensors. Temperatures may change at every step and are not part of them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, Protocol

import torch
from fastkd.kernels.common import capability
from fastkd.kernels.relation.plan import Blocks, Plan, method_of
from torch import Tensor

Ints = tuple[int, ...]

PLANS = 256
"""Number of plans that are kept."""

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PRECISION = {"bf16": "ieee", "fp16": "ieee", "fp32": "tf32x3"}
"""Precision of products: those of 16-bit inputs are exact in fp32; fp32 takes three TF32 products (error 2^-21)."""


class Options(Protocol):
    """The operator's options that the kernels use."""

    similarity: str
    distance: str
    temperature: float
    negate: bool
    cross: bool


class Operand(NamedTuple):
    """A (B, R, K) tensor of any strides as kernel arguments ``tensor, width, stride_b, stride_outer, stride_inner``.

    Triton vectorises loads only if it can prove alignment, but it specialises arguments only on divisibility by 16, and
    a row of 900 elements is divisible only by 4. Outer strides are therefore passed in units of ``unit`` elements, a
    constant of the kernel, and so is the width if it is the inner dimension.
    """

    sizes: tuple[int, int, int, int]  # the arguments after the tensor
    rows_inner: bool  # the rows' stride is 1 and the columns' is not: a (C, H, W) map viewed as rows of pixels
    unit: int

    @classmethod
    def of(cls, shape: Ints, stride: Ints, itemsize: int, largest: int = 16) -> Operand:
        """Return the operand of a (B, R, K) tensor, with a unit of up to ``largest`` elements or 16 bytes."""
        _, rows, width = shape
        by_batch, by_row, by_col = stride
        largest = min(largest, 16 // itemsize)
        if by_col != 1 and by_row == 1:
            unit = math.gcd(by_batch, by_col, rows, largest)
            return cls((width, by_batch // unit, by_col // unit, 1), True, unit)
        if by_col == 1:
            unit = math.gcd(by_batch, by_row, width, largest)
            return cls((width // unit, by_batch // unit, by_row // unit, 1), False, unit)
        return cls((width, by_batch, by_row, by_col), False, 1)


UNREAD = Operand((0, 0, 0, 1), False, 1)
"""An operand for a kernel that does not read it: the same constants for all layouts."""


class Networks(NamedTuple):
    """The rows of both networks as operands. Their units are equal: one kernel per combination would be compiled."""

    student: Operand
    teacher: Operand

    @property
    def layout(self) -> dict[str, Any]:
        """Return the operands' units and orders as constants of a kernel."""
        return {
            "STUDENT_UNIT": self.student.unit,
            "STUDENT_ROWS_INNER": self.student.rows_inner,
            "TEACHER_UNIT": self.teacher.unit,
            "TEACHER_ROWS_INNER": self.teacher.rows_inner,
        }

    @property
    def row_unit(self) -> int:
        """Return a unit of the number of rows that makes masks of rows as wide as the loads."""
        return self.student.unit if self.student.rows_inner or self.teacher.rows_inner else 1


class Call:
    """The plan of a call, and the arguments shared by its kernels. Equal calls are one object."""

    def __init__(
        self,
        shapes: tuple[Ints, Ints],
        strides: tuple[Ints, Ints],
        dtype: torch.dtype,
        similarity: str,
        method: str,
        negate: bool,
        cross: bool,
        stored: int,
        capability: int,
    ) -> None:
        batch, self.rows, self.width = shapes[0]
        self.batch, self.n_rows, self.method, self.stored = batch, batch * self.rows, method, stored
        self.plan = Plan(batch, self.rows, cross, method, DTYPES[dtype], stored > 0, capability)
        self.min_bytes = self.plan.min_bytes()
        student, teacher = (Operand.of(*layout, dtype.itemsize) for layout in zip(shapes, strides, strict=True))
        unit = min(student.unit, teacher.unit)
        self.networks = Networks(*(Operand.of(*x, dtype.itemsize, unit) for x in zip(shapes, strides, strict=True)))
        self.itemsize = dtype.itemsize
        self.cosine = similarity == "cosine"
        sign = -1.0 if negate else 1.0
        widths = (self.width, shapes[1][2]) if similarity == "mean" else (1, 1)
        self.factors = (sign / widths[0], sign / widths[1])

    def constants(self, networks: Networks, shape: Blocks, fused: bool = True) -> dict[str, Any]:
        """Return the constants and launch options of the kernels that compute tiles of ``networks``."""
        return {
            **networks.layout,
            "ROW_UNIT": networks.row_unit,
            "COSINE": self.cosine,
            "DISTANCE": self.method,
            "PRECISION": PRECISION[self.plan.dtype],
            **shape.constants(),
            **shape.launch(fused),
        }


_call = functools.lru_cache(PLANS)(Call)


def call_of(student: Tensor, teacher: Tensor, options: Options, stored: Tensor) -> Call:
    """Return the plan of a call; ``stored`` is empty if no tile is stored."""
    distance = options.distance
    return _call(
        (student.shape, teacher.shape),
        (student.stride(), teacher.stride()),
        student.dtype,
        options.similarity,
        method_of(options.similarity, distance, options.temperature),
        options.negate and distance == "kl",
        options.cross,
        stored.numel(),
        capability(student),
    )

"""Compare channel relations on a GPU with a form on cuBLAS, by counts and by simulated errors; no GPU is needed.

    python -m benchmarks.library_form [--rows 128]

"own" is the plan of the Triton kernels. "library" is a batched product per network, a kernel for the rows of both
matrices (norms from the diagonal, sums of the loss), one that writes H, the product H X in fp32, and one that projects
and rounds it. "mixed" takes only the forward's products from the library: the backward's own product ends with the
projection.

A launch takes the larger of FLOP / rate and bytes / bandwidth, with every operand moved once. The rates are assumptions
about an H100 (``RATES``), so that the times compare forms and predict nothing. Errors are those of the loss, as a
multiple of plain fp32's, with a tensor core's sum simulated: each step of 16 columns is added exactly and truncated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from fastkd.kernels.relation.plan import Plan
from torch import Tensor

from benchmarks.workloads import GPU_WORKLOADS, Workload
from fastkd._console import plain_characters
from fastkd.ops.relation.plan import MIN_KEPT_WIDTH
from fastkd.ops.relation.reference import relation, row_distances

BYTES_PER_S = 3.0e12
RATES = {
    torch.bfloat16: {"own": 350e12, "library": 650e12},
    torch.float32: {"own": 350e12 / 6, "library": 50e12},  # three TF32 products, and without TF32 the vector units
}
"""Assumed FLOP/s of products."""

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
STEP = 16
"""Columns that a tensor core multiplies and adds in one instruction."""


class Launch(NamedTuple):
    """A launch with its FLOP in products and its bytes."""

    name: str
    flop: int
    moved: int
    by: str = "own"  # whose rate

    def seconds(self, dtype: torch.dtype) -> float:
        """Return the larger of the times of its arithmetic and its traffic."""
        return max(self.flop / RATES[dtype][self.by], self.moved / BYTES_PER_S)


def launches(form: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Iterator[Launch]:
    """Yield the launches of a forward and its backward of (B, R, K) rows of both networks, distance "kl"."""
    batch, rows, width = shape
    size, whole = dtype.itemsize, batch * rows**2
    x, product = batch * rows * width * size, 2 * whole * width
    stored = width >= MIN_KEPT_WIDTH[dtype]
    plan = Plan(batch, rows, False, "kl", NAMES[dtype], stored, 9)
    if form == "own":
        forward, backward = (
            grid.programs * grid.shape.rows * grid.shape.cols for grid in (plan.forward, plan.backward)
        )
        yield Launch("norms", 0, 2 * x)
        yield Launch("tiles", 2 * 2 * forward * width, 2 * x + (8 * forward if stored else 0))
        if stored:
            yield Launch("H", 0, 8 * backward + size * whole)
        else:
            yield Launch("H", 2 * 2 * backward * width, 2 * x + size * whole)
    else:
        for network in ("student", "teacher"):
            yield Launch(f"product of the {network}", product, x + 4 * whole, "library")
        yield Launch("rows", 0, 8 * whole)
        yield Launch("H", 0, 8 * whole + size * whole)
    if form == "library":
        yield Launch("H X", product, size * whole + x + x * 4 // size, "library")
        yield Launch("projection", 0, x * 4 // size + 2 * x)
    else:
        yield Launch("H X and projection", product, size * whole + 2 * x)


def truncated(exact: Tensor) -> Tensor:
    """Return fp64 numbers as fp32, rounded towards 0."""
    near = exact.float()
    return torch.where(near.double().abs() > exact.abs(), torch.nextafter(near, torch.zeros_like(near)), near)


def products(x: Tensor, restart: int) -> Tensor:
    """Return X Xᵀ, summed as tensor cores do, from 0 again after every ``restart`` columns."""
    total = torch.zeros(x.shape[0], x.shape[0])
    for first in range(0, x.shape[1], restart):
        chain = torch.zeros_like(total)
        for part in x[:, first : first + restart].double().split(STEP, 1):
            chain = truncated(chain.double() + part @ part.T)
        total += chain
    return total


def cosines(x: Tensor, restart: int, diagonal: bool) -> Tensor:
    """Return the cosines of 16-bit rows from their products, with norms of the diagonal or of the rows."""
    product = products(x, restart)
    scale = product.diagonal().rsqrt() if diagonal else x.float().square().sum(1).rsqrt()
    return product * scale[:, None] * scale


def inputs(kind: str, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return bf16 rows of student and teacher: "normal", "positive", or positive and "near" each other."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, width, generator=generator) for _ in range(2))
    if kind != "normal":
        student, teacher = student.abs(), teacher.abs()
    if kind == "near":
        student = teacher + 0.1 * student
    return student.bfloat16(), teacher.bfloat16()


def errors(kind: str, rows: int, width: int, distance: str) -> dict[str, float]:
    """Return the largest error of a row's loss by way of summing, divided by that of plain fp32."""
    pair = inputs(kind, rows, width)
    exact, plain = (
        relation(*(x[None].to(dtype) for x in pair), distance=distance)[0] for dtype in (torch.float64, torch.float32)
    )
    summed = (x.float() @ x.float().T for x in pair)
    from_fp32 = (e * (scale := e.diagonal().rsqrt())[:, None] * scale for e in summed)
    losses = {"fp32 on the CPU, norms of the diagonal": row_distances(*from_fp32, distance, 0.1)}
    for restart, name in ((width, "one chain"), (64, "restarts after 64 columns")):
        for diagonal in (True, False):
            of_rows, norms = (cosines(x, restart, diagonal) for x in pair), "diagonal" if diagonal else "rows"
            losses[f"{name}, norms of the {norms}"] = row_distances(*of_rows, distance, 0.1)
    largest = (plain - exact).abs().max()
    return {name: ((loss - exact).abs().max() / largest).item() for name, loss in losses.items()}


def works() -> list[Workload]:
    """Return the channel relations that are large enough to fill a GPU."""
    return [one for one in GPU_WORKLOADS["relation"] if one.loss == "channel_kd" and not one.small]


@plain_characters()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="rows of the simulated relations")
    args = parser.parse_args(argv)
    for work in works():
        batch, rows, width, _ = work.relation_sizes
        for dtype in RATES:
            for form in ("own", "library", "mixed"):
                found = list(launches(form, (batch, rows, width), dtype))
                parts = ", ".join(f"{each.name} {each.seconds(dtype) * 1e6:.0f}" for each in found)
                total = sum(each.seconds(dtype) for each in found)
                print(f"{(batch, rows, width)} {NAMES[dtype]} {form}: {total * 1e6:.0f} us ({parts})")
    for distance in ("mse", "kl"):
        for width in (900, 3600):
            for kind in ("normal", "positive", "near"):
                found_errors = errors(kind, args.rows, width, distance)
                parts = "; ".join(f"{name} {value:.1f}" for name, value in found_errors.items())
                print(f"{distance}, {width} columns, {kind}: {parts}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

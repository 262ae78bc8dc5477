"""Plan of a ``relation`` call: block shapes, statistics per row, and launches that fit the workspace.

This module does not import Triton, so that ``fastkd.ops`` can query shapes without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from fastkd._integers import ceil_div

FIXED_SHIFT_TEMPERATURE = 0.04
"""At or above it, the constant 1 replaces each row's maximum: e^{(E − 1)/τ} ≥ e^−50 for E in [−1, 1]."""

PLANES = {"kl": 3, "kl maxima": 5, "mse": 1, "row_cosine": 5}
"""Statistics per row: z_S, z_T, a; or m_S, z_S, m_T, z_T, a; or Σd²; or Σe_S², Σe_T², Σd², Σd(e_S + e_T), Σe_S e_T."""

MIN_PROGRAMS = 264
"""Two programs for each of 132 multiprocessors (H100); if there would be fewer, smaller tiles are used."""


class Blocks(NamedTuple):
    """Block shape of a kernel's matrix products: BLOCK_M = ``rows``, BLOCK_N = ``cols``, BLOCK_K = ``depth``."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None
    """Register limit per thread, set where the default of ptxas spills (``launch.MAX_REGISTERS``)."""

    def constants(self) -> dict[str, Any]:
        """Return the block shape as constants of a kernel."""
        return {"ROWS": self.rows, "COLS": self.cols, "DEPTH": self.depth}

    def launch(self, fused: bool = True) -> dict[str, Any]:
        """Return the options of a launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": fused, **limit}


class Regime(NamedTuple):
    """One tile size: blocks of the relation tiles and, with the same rows, of the backward's product."""

    tiles: Blocks
    product: Blocks
    heavy_stages: int = 3
    """Stages of the backward's tiles and of the forward's with maxima, which need more registers at the same shape."""

    wide: Blocks | None = None
    """Blocks of the forward's tiles for ``WIDE_METHODS``, if no tile is stored."""

    @property
    def heavy(self) -> Blocks:
        """Return the blocks of kernels with high register pressure."""
        return self.tiles._replace(stages=self.heavy_stages)


REGIMES: dict[str, tuple[Regime, ...]] = {
    "bf16": (
        Regime(Blocks(128, 64, 64, 8, 3), Blocks(128, 64, 64, 8, 3, registers=255), wide=Blocks(128, 128, 64, 8, 3)),
        Regime(Blocks(64, 64, 64, 8, 3), Blocks(64, 64, 64, 8, 3)),
    ),
    "fp16": (
        Regime(Blocks(128, 64, 64, 8, 3), Blocks(128, 64, 16, 8, 3), wide=Blocks(128, 128, 64, 8, 3)),
        Regime(Blocks(64, 64, 64, 8, 3), Blocks(64, 64, 16, 8, 3, registers=255)),
    ),
    "fp32": (Regime(Blocks(64, 32, 16, 8, 3), Blocks(64, 32, 16, 4, 3), heavy_stages=2),),
}
"""Tile sizes by dtype, the largest first. Chosen by ahead-of-time compilation (benchmarks/aot), not yet measured."""

WIDE_METHODS = ("kl", "mse")
"""Methods with few sums per tile, whose forward can use wider tiles."""

NARROW_CAPABILITIES = (8, 10, 12)
"""Major compute capabilities on which wide blocks spill registers (on 8.0 only under Triton 3.6)."""

SMALL_BACKWARD: dict[str, tuple[int, ...]] = {"bf16": (10, 12), "fp16": (10, 12)}
"""Major compute capabilities on which a backward that recomputes tiles uses the smallest: larger ones spill under
Triton 3.6 to 3.9."""


def method_of(similarity: str, distance: str, temperature: float) -> str:
    """Return the distance, or "kl maxima" if each row needs its own maximum."""
    fixed = similarity == "cosine" and temperature >= FIXED_SHIFT_TEMPERATURE
    return "kl maxima" if distance == "kl" and not fixed else distance


def statistics_planes(similarity: str, distance: str, temperature: float, others: int) -> int:
    """Return the number of statistics per row: the method's for each of ``others`` samples, and two scales."""
    return PLANES[method_of(similarity, distance, temperature)] * others + 2


def stored_elements(batch: int, rows: int) -> int:
    """Return the number of elements that both networks' tiles I ≤ J take, in any regime."""
    side = 64 if rows <= 64 else 128
    blocks = ceil_div(rows, side)
    return batch * blocks * (blocks + 1) * side * side


class Launch(NamedTuple):
    """A range of problems, and the row blocks [first, last) of each, for one launch."""

    first_problem: int
    problems: int
    first: int
    last: int

    @property
    def band(self) -> int:
        """Return the number of row blocks per problem."""
        return self.last - self.first


class Grid:
    """Tiles of one shape covering ``problems`` relation matrices of ``samples`` × ``rows`` rows each."""

    def __init__(self, problems: int, samples: int, rows: int, shape: Blocks) -> None:
        self.problems, self.samples, self.shape = problems, samples, shape
        self.q = shape.rows // shape.cols
        self.row_blocks = ceil_div(rows, shape.rows)  # of a sample
        self.blocks = samples * self.row_blocks  # of a problem
        self.columns = self.blocks * self.q

    def triangle(self, launch: Launch) -> int:
        """Return the number of tiles I ≤ J in the row blocks of a launch, per problem."""
        return launch.band * self.columns - self.q * launch.band * (launch.first + launch.last - 1) // 2

    @property
    def programs(self) -> int:
        """Return the number of tiles, and thus of programs, of the whole call."""
        return self.problems * self.triangle(Launch(0, self.problems, 0, self.blocks))

    def launches(self, block_bytes: int, limit: int) -> Iterator[Launch]:
        """Yield launches that fit in ``limit`` bytes: of whole problems, or else of some row blocks of one problem."""
        if block_bytes * self.blocks <= limit:
            step = limit // (block_bytes * self.blocks)
            for problem in range(0, self.problems, step):
                yield Launch(problem, min(step, self.problems - problem), 0, self.blocks)
            return
        step = max(1, limit // block_bytes)
        for problem in range(self.problems):
            for first in range(0, self.blocks, step):
                yield Launch(problem, 1, first, min(first + step, self.blocks))


class Plan:
    """The tile grids of a call's forward and backward, and the blocks of its product.

    ``capability`` is the device's major compute capability.
    """

    def __init__(
        self, batch: int, rows: int, cross: bool, method: str, dtype: str, stored: bool, capability: int
    ) -> None:
        self.method, self.dtype, self.capability = method, dtype, capability
        samples, problems = (batch, 1) if cross else (1, batch)
        # With maxima, the exponentials of rows and columns are live at once, too many for the registers of large tiles.
        small = rows <= 64 or method == "kl maxima"
        regimes = REGIMES[dtype][-1:] if small else REGIMES[dtype]
        grid = lambda blocks: Grid(problems, samples, rows, blocks)
        candidates = [regime for regime in regimes if grid(regime.tiles).programs >= MIN_PROGRAMS]
        regime = (candidates or regimes[-1:])[0]
        self.forward = grid(regime.heavy if method == "kl maxima" else regime.tiles)
        if regime.wide is not None and not stored and method in WIDE_METHODS and capability not in NARROW_CAPABILITIES:
            wide = grid(regime.wide)
            if wide.programs >= MIN_PROGRAMS:
                self.forward = wide
        if not stored and capability in SMALL_BACKWARD.get(dtype, ()):
            regime = regimes[-1]
        self.backward = grid(regime.heavy)
        self.product = regime.product

    def blocks_for(self, shape: Blocks, unit: int) -> Blocks:
        """Return the blocks of a kernel that reads rows in units of ``unit`` elements.

        Elements copied one by one take more registers for addresses: the fp32 tiles spilled on 12.0 under the default
        limit, the fp16 backward on 10.0.
        """
        if unit == 1 and self.dtype == "fp32":
            return shape._replace(registers=255)
        if unit == 1 and self.dtype == "fp16" and self.capability == 10:
            return shape._replace(depth=shape.depth // 2)
        return shape

    def min_bytes(self) -> int:
        """Return the minimum workspace: that of one row block, in the larger of forward and backward."""
        return max(self.forward_bytes(), self.backward_bytes())

    def forward_bytes(self) -> int:
        """Return the bytes of the tile sums of one row block of a problem."""
        shape = self.forward.shape
        return 4 * PLANES[self.method] * self.forward.columns * (shape.rows + shape.cols)

    def backward_bytes(self) -> int:
        """Return the bytes of one row block of H and its partial sums of q."""
        shape = self.backward.shape
        size = 2 if self.dtype == "bf16" else 4
        return self.backward.columns * shape.rows * (size * shape.cols + 4)

"""How the relation kernels divide a call: block shapes, what is kept per row, and launches that fit the workspace.

Nothing here needs Triton: ``fastkd.ops`` asks it for shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

FIXED_SHIFT_TEMPERATURE = 0.04
"""Cosines lie in [−1, 1]: from here on e^{(E − 1)/τ} is at least e^−50, and 1 serves all rows as their maximum."""

PLANES = {"kl": 3, "kl maxima": 5, "mse": 1, "row_cosine": 5}
"""Numbers per row: z_S, z_T, a; or m_S, z_S, m_T, z_T, a; or Σd²; or Σe_S², Σe_T², Σd², Σd(e_S + e_T), Σe_S e_T."""

ENOUGH_PROGRAMS = 264
"""Two for each of an H100's 132 processors: with fewer, smaller tiles are taken."""


class Blocks(NamedTuple):
    """How one kernel's products are cut: ``rows`` × ``cols`` to a program, ``depth`` of the sum at a time."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None
    """The most for a thread, where ptxas's own choice spills (``common.MOST_REGISTERS``)."""

    def constants(self) -> dict[str, Any]:
        """Return the block shape as constants of a kernel."""
        return {"ROWS": self.rows, "COLS": self.cols, "DEPTH": self.depth}

    def launch(self, fused: bool = True) -> dict[str, Any]:
        """Return the options of a launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": fused, **limit}


class Regime(NamedTuple):
    """Blocks of one size: tiles of relation matrices, and those of the backward's product, which have as many rows."""

    tiles: Blocks
    product: Blocks
    crowded_warps: int
    """For the backward's tiles and the forward's with maxima, of the same shape: more numbers of a tile are alive."""

    crowded_stages: int = 3
    wide: Blocks | None = None
    """For the forward's tiles instead, where few sums are taken of a tile and none is stored."""

    @property
    def crowded(self) -> Blocks:
        """Return the blocks of a launch with many programs per multiprocessor."""
        return self.tiles._replace(warps=self.crowded_warps, stages=self.crowded_stages, registers=None)


REGIMES: dict[str, tuple[Regime, ...]] = {
    "bf16": (
        Regime(Blocks(128, 64, 64, 8, 3), Blocks(128, 128, 32, 8, 4), 8, wide=Blocks(128, 128, 64, 8, 3)),
        Regime(Blocks(64, 64, 64, 4, 3, registers=255), Blocks(64, 128, 32, 4, 4), 8),
    ),
    "fp16": (
        Regime(Blocks(128, 64, 64, 8, 3), Blocks(128, 64, 32, 8, 2), 8, wide=Blocks(128, 128, 64, 8, 3)),
        Regime(Blocks(64, 64, 64, 4, 3, registers=255), Blocks(64, 64, 32, 4, 2), 8),
    ),
    "fp32": (Regime(Blocks(64, 32, 16, 8, 3), Blocks(64, 32, 16, 4, 3), 8, 2),),
}
"""By dtype, the largest first; chosen by ahead-of-time facts (benchmarks/aot), none by measurement yet."""

WIDE_METHODS = ("kl", "mse")
NARROW_CAPABILITIES = (8, 10, 12)
"""Where wide blocks spill registers, on 8.0 under Triton 3.6 alone."""

SMALL_BACKWARD: dict[str, tuple[int, ...]] = {"bf16": (10,), "fp16": (10, 12)}
"""Where a backward that computes its tiles takes the smallest: Triton 3.6 to 3.8 spill registers in larger ones."""


def cdiv(a: int, b: int) -> int:
    """Return a/b, rounded up."""
    return -(-a // b)


def method_of(similarity: str, distance: str, temperature: float) -> str:
    """The distance, "kl maxima" where rows keep their own maxima."""
    fixed = similarity == "cosine" and temperature >= FIXED_SHIFT_TEMPERATURE
    return "kl maxima" if distance == "kl" and not fixed else distance


def statistics_planes(similarity: str, distance: str, temperature: float, others: int) -> int:
    """Numbers per row: the method's for each other sample, then the scales of both networks."""
    return PLANES[method_of(similarity, distance, temperature)] * others + 2


def stored_elements(batch: int, rows: int) -> int:
    """Room for both networks' tiles I ≤ J, whichever regime is chosen."""
    side = 64 if rows <= 64 else 128
    blocks = (rows + side - 1) // side
    return batch * blocks * (blocks + 1) * side * side


class Launch(NamedTuple):
    """Some problems, and of each the row blocks [first, last)."""

    first_problem: int
    problems: int
    first: int
    last: int

    @property
    def band(self) -> int:
        """Return the number of rows of tiles."""
        return self.last - self.first


class Grid:
    """``problems`` of ``samples`` × ``rows`` each, cut into tiles of one shape."""

    def __init__(self, problems: int, samples: int, rows: int, shape: Blocks) -> None:
        self.problems, self.samples, self.shape = problems, samples, shape
        self.q = shape.rows // shape.cols
        self.row_blocks = cdiv(rows, shape.rows)  # of a sample
        self.blocks = samples * self.row_blocks  # of a problem
        self.columns = self.blocks * self.q

    def triangle(self, launch: Launch) -> int:
        """Tiles I ≤ J of a launch's row blocks, in one problem."""
        return launch.band * self.columns - self.q * launch.band * (launch.first + launch.last - 1) // 2

    @property
    def programs(self) -> int:
        """Return the number of programs of the whole call."""
        return self.problems * self.triangle(Launch(0, self.problems, 0, self.blocks))

    def launches(self, block_bytes: int, limit: int) -> Iterator[Launch]:
        """As many whole problems at a time as fit, else as many row blocks of one problem."""
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
    """The grids of one call's tiles, forward and backward, and the blocks of its product.

    ``chip`` is its major compute capability.
    """

    def __init__(self, batch: int, rows: int, cross: bool, method: str, dtype: str, stored: bool, chip: int) -> None:
        self.method, self.dtype = method, dtype
        samples, problems = (batch, 1) if cross else (1, batch)
        # With maxima a row's and a column's own exponentials are alive at once: too many for large tiles.
        small = rows <= 64 or method == "kl maxima"
        regimes = REGIMES[dtype][-1:] if small else REGIMES[dtype]
        grid = lambda blocks: Grid(problems, samples, rows, blocks)
        enough = [regime for regime in regimes if grid(regime.tiles).programs >= ENOUGH_PROGRAMS]
        regime = (enough or regimes[-1:])[0]
        self.forward = grid(regime.crowded if method == "kl maxima" else regime.tiles)
        if regime.wide is not None and not stored and method in WIDE_METHODS and chip not in NARROW_CAPABILITIES:
            wide = grid(regime.wide)
            if wide.programs >= ENOUGH_PROGRAMS:
                self.forward = wide
        if not stored and chip in SMALL_BACKWARD.get(dtype, ()):
            regime = regimes[-1]
        self.backward = grid(regime.crowded)
        self.product = regime.product

    def least_bytes(self) -> int:
        """What one row block needs; a forward must not promise what its backward cannot hold."""
        return max(self.forward_bytes(), self.backward_bytes())

    def forward_bytes(self) -> int:
        """Sums of the tiles of one row block, in one problem."""
        shape = self.forward.shape
        return 4 * PLANES[self.method] * self.forward.columns * (shape.rows + shape.cols)

    def backward_bytes(self) -> int:
        """A row block of H, 4 bytes a number, and its parts of q."""
        shape = self.backward.shape
        return 4 * self.backward.columns * shape.rows * (shape.cols + 1)

"""How the relation kernels divide a call: block shapes, what is kept per row, and launches that fit the workspace.

Nothing here needs Triton: ``fastkd.ops`` asks it for shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

FIXED_SHIFT_TEMPERATURE = 0.04
"""Cosines lie in [−1, 1]: from here on e^{(E − 1)/τ} is at least e^−50, and 1 serves all rows as their maximum."""

PLANES = {"kl": 3, "kl maxima": 5, "mse": 1, "row_cosine": 4}
"""Numbers per row: z_S, z_T, a; or m_S, z_S, m_T, z_T, a; or Σd²; or Σe_S², Σe_T², Σd², Σd(e_S + e_T)."""

ENOUGH_PROGRAMS = 264
"""Two for each of an H100's 132 processors: with fewer, smaller tiles are taken."""


class Blocks(NamedTuple):
    """How one kernel's products are cut: ``rows`` × ``cols`` to a program, ``depth`` of the sum at a time."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    def constants(self) -> dict[str, Any]:
        return {"ROWS": self.rows, "COLS": self.cols, "DEPTH": self.depth}

    def launch(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


class Regime(NamedTuple):
    """Blocks of the kernels that make tiles of relation matrices, and of the backward's product, which has as many rows."""

    tiles: Blocks
    product: Blocks


REGIMES: dict[str, tuple[Regime, ...]] = {
    "bf16": (
        Regime(Blocks(128, 64, 64, 8, 3), Blocks(128, 128, 32, 8, 4)),
        Regime(Blocks(64, 64, 64, 4, 3), Blocks(64, 128, 32, 4, 4)),
    ),
    "fp16": (
        Regime(Blocks(128, 64, 64, 8, 3), Blocks(128, 64, 32, 8, 2)),
        Regime(Blocks(64, 64, 64, 4, 3), Blocks(64, 64, 32, 4, 2)),
    ),
    "fp32": (Regime(Blocks(64, 64, 32, 4, 2), Blocks(64, 64, 32, 4, 2)),),
}
"""By dtype, the largest first; chosen by ahead-of-time facts (benchmarks/aot.py), none by measurement yet."""


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def method_of(similarity: str, distance: str, temperature: float) -> str:
    """The distance, "kl maxima" where rows keep their own maxima."""
    fixed = similarity == "cosine" and temperature >= FIXED_SHIFT_TEMPERATURE
    return "kl maxima" if distance == "kl" and not fixed else distance


def statistics_planes(similarity: str, distance: str, temperature: float, others: int) -> int:
    """Numbers per row: the method's for each other sample, then the scales of both networks."""
    return PLANES[method_of(similarity, distance, temperature)] * others + 2


def kept_elements(batch: int, rows: int) -> int:
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
        return self.last - self.first


class Plan:
    """One call: (batch, rows) in ``problems`` of ``samples`` each, cut into blocks."""

    def __init__(self, batch: int, rows: int, cross: bool, method: str, dtype: str) -> None:
        self.rows, self.method, self.dtype = rows, method, dtype
        self.samples, self.problems = (batch, 1) if cross else (1, batch)
        regimes = [regime for regime in REGIMES[dtype] if regime.tiles.rows == 64 or rows > 64]
        self.tiles, self.product = next((r for r in regimes if self._programs(r.tiles) >= ENOUGH_PROGRAMS), regimes[-1])
        self.q = self.tiles.rows // self.tiles.cols
        self.row_blocks = cdiv(rows, self.tiles.rows)
        self.blocks = self.samples * self.row_blocks  # of a problem
        self.columns = self.blocks * self.q

    def _programs(self, tiles: Blocks) -> int:
        blocks = self.samples * cdiv(self.rows, tiles.rows)
        return self.problems * (blocks * (blocks + 1) // 2) * (tiles.rows // tiles.cols)

    def triangle(self, launch: Launch) -> int:
        """Tiles I ≤ J of the row blocks of one problem."""
        return launch.band * self.columns - self.q * launch.band * (launch.first + launch.last - 1) // 2

    def forward_bytes(self) -> int:
        """Sums of a row block's tiles, in one problem."""
        return PLANES[self.method] * 4 * self.columns * (self.tiles.rows + self.tiles.cols)

    def backward_bytes(self) -> int:
        """A row block of H, 4 bytes a number, and its parts of q."""
        return 4 * self.columns * self.tiles.rows * (self.tiles.cols + 1)

    def launches(self, block_bytes: int, limit: int) -> Iterator[Launch]:
        """As many whole problems at a time as fit, else as many row blocks of one problem."""
        if block_bytes * self.blocks <= limit:
            step = max(1, limit // (block_bytes * self.blocks))
            for problem in range(0, self.problems, step):
                yield Launch(problem, min(step, self.problems - problem), 0, self.blocks)
            return
        step = max(1, limit // block_bytes)
        for problem in range(self.problems):
            for first in range(0, self.blocks, step):
                yield Launch(problem, 1, first, min(first + step, self.blocks))

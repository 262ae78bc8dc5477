"""Losses and gradient norms of the steps since the last line of the log."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class StepValues:
    """Per-step values, kept on the device until they are read.

    Args:
        names: one name per value of a step.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._pending: list[Tensor] = []  # (len(names),) per step, on the device
        self._window: list[list[float]] = []  # read since the last call of `mean`

    def add(self, values: Tensor) -> None:
        """Append the values (len(names),) of a step without copying them to the host."""
        self._pending.append(values)

    def read(self, step: int) -> tuple[int, dict[str, float]] | None:
        """Copy pending values to the host; return the first step with a NaN or Inf and its values, or None.

        Args:
            step: number of the latest step, counted from 1.
        """
        if not self._pending:
            return None
        rows = torch.stack(self._pending).tolist()
        self._pending.clear()
        for number, row in enumerate(rows, step - len(rows) + 1):
            if not all(map(math.isfinite, row)):
                return number, dict(zip(self.names, row, strict=True))
        self._window.extend(rows)
        return None

    @property
    def window(self) -> list[list[float]]:
        """Values per step since the previous call of `mean`; call `read` first."""
        return self._window

    @window.setter
    def window(self, rows: Sequence[Sequence[float]]) -> None:
        self._window = [list(row) for row in rows]

    def mean(self) -> Tensor:
        """Return the mean (len(names),) of the values read since the previous call, float64 on the CPU."""
        mean = torch.tensor(self._window, dtype=torch.float64, device="cpu").mean(0)
        self._window.clear()
        return mean

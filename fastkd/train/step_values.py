"""Losses and gradient norms of the steps since the last line of the log."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_IGNORED = 2.0


class StepValues:
    """Per-step values, kept on the device until they are read.

    Args:
        names: one name per value of a step.
        terms: those among them that are terms; each row of the window ends with their weighted values.
    """

    def __init__(self, names: Sequence[str], terms: Sequence[str] = ()) -> None:
        self.names, self._terms = tuple(names), [names.index(name) for name in terms]
        self.window: list[list[float]] = []  # of steps not skipped, since the last call of `mean`
        self._pending: list[Tensor] = []  # (len(names) + 1,) per step, on the device
        self._weights: list[list[float]] = []  # (len(terms),) per pending step

    def add(self, values: Tensor, skipped: Tensor, ignored: bool = False, weights: Sequence[float] = ()) -> None:
        """Append the values (len(names),) of a step and whether it was skipped (), without copying them to the host.

        An ``ignored`` step does not count as skipped; its finite values count in the mean. ``weights`` are those of
        the terms in this step.
        """
        self._weights.append(list(weights))
        flag = torch.full_like(values[:1], _IGNORED) if ignored else skipped.to(values).reshape(1)
        self._pending.append(torch.cat([values, flag]))

    def read(self, step: int) -> list[tuple[int, dict[str, float]]]:
        """Copy pending values to the host; return number and values of the steps among them that were skipped.

        Args:
            step: number of the latest step, counted from 1.
        """
        if not self._pending:
            return []
        rows, weights = torch.stack(self._pending).tolist(), self._weights
        self._pending.clear()
        self._weights = []
        skipped = []
        for number, (*values, flag) in enumerate(rows, step - len(rows) + 1):
            if flag == 1:
                skipped.append((number, dict(zip(self.names, values, strict=True))))
            else:
                factors = weights[number - step - 1]
                values += [weight * values[index] for weight, index in zip(factors, self._terms, strict=True)]
                self.window.append([value if math.isfinite(value) else math.nan for value in values])
        return skipped

    def mean(self) -> Tensor:
        """Return the mean (len(names) + len(terms),) of the finite values read since the previous call, NaN if none.

        Float64; the weighted terms come last.
        """
        rows = self.window or [[math.nan] * (len(self.names) + len(self._terms))]
        mean = torch.tensor(rows, dtype=torch.float64, device="cpu").nanmean(0)
        self.window.clear()
        return mean

"""Options of launches, without Triton."""

from __future__ import annotations

from typing import Any

MAX_REGISTERS = {"maxnreg": 255}
"""Launch option of kernels that otherwise spill under some version of Triton. By default ptxas limits registers so that
one more program fits on a multiprocessor, even if the kernel then lacks one or two; with an explicit limit it allocates
as many as the kernel needs."""


def launch_options(grid: tuple[int, ...], constants: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of ``kernel.run`` for a launch over ``grid``, to be kept in a plan.

    ``kernel[grid](...)`` does the same, but creates a function and copies the keyword arguments again at each launch,
    which takes 3.0 instead of 1.8 µs before Triton's own code.
    """
    return {"grid": grid, "warmup": False, **constants}

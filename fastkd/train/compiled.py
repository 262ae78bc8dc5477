"""A student that is compiled where it trains, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastkd.distill.distiller import Distiller


class CompiledStudent:
    """The student of a distiller, compiled by torch.compile at its first use.

    Only training steps call it. Checks and balancing need several backwards through one graph, which compiled code does
    not keep; evaluations and saved files are those of the student itself.

    Args:
        distiller: the distiller whose student to compile.
        model: the module that is trained, which may wrap the distiller.

    Raises:
        ValueError: the model or the student is compiled already.
    """

    def __init__(self, distiller: Distiller, model: nn.Module) -> None:
        if any("_orig_mod" in module._modules for module in model.modules()):
            raise ValueError(
                "compile_student=True, but the model is compiled already: pass the plain model, or set False"
            )
        self._distiller, self._student = distiller, distiller.student
        self._compiled = torch.compile(distiller.student)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the distiller call the compiled student until the end of the block."""
        self._distiller.student = self._compiled  # type: ignore[assignment]
        try:
            yield
        finally:
            self._distiller.student = self._student

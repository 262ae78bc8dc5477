"""Exponential moving average of the student's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastkd._wrappers import unwrapped
from fastkd.train.stop import Termination


class Average:
    """Average of the trainable parameters, a ← d·a + (1 − d)·p after each step, with d = min(decay, (1 + n)/(10 + n)).

    The factor rises over the first n steps, so that the initial weights are forgotten quickly. Buffers are
    not averaged.

    Args:
        student: the model; its parameters are on their device.
        decay: largest factor d, below 1.
        stop: delays signals while parameters are exchanged.
    """

    def __init__(self, student: nn.Module, decay: float, stop: Termination) -> None:
        self.decay, self._stop = decay, stop
        with unwrapped(student) as model:
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [p for _, p in named]
        self.tensors = {name: p.detach().clone() for name, p in named}

    def update(self, step: int) -> None:
        """Average the parameters in after a step, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        values: list[Tensor] = [p.detach() for p in self._parameters]
        get_ema_multi_avg_fn(decay)(list(self.tensors.values()), values, step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the student the averaged parameters until the end of the block."""
        exchanged = False
        try:
            with self._stop.shielded():
                self._exchange()
                exchanged = True
            yield
        finally:
            if exchanged:
                with self._stop.shielded():
                    self._exchange()

    @torch.no_grad()
    def copy_to_student(self) -> None:
        """Overwrite the student's parameters with their averages."""
        for average, parameter in zip(self.tensors.values(), self._parameters, strict=True):
            parameter.copy_(average)

    def _exchange(self) -> None:
        with torch.no_grad():
            for name, parameter in zip(self.tensors, self._parameters, strict=True):
                self.tensors[name], parameter.data = parameter.data, self.tensors[name]

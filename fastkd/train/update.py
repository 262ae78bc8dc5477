"""Apply the gradient of a step, or skip it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastkd.train.config import TrainConfig
from fastkd.train.optim import adamw


class Updater:
    """AdamW with gradient clipping, a loss scale for fp16, and steps that are skipped.

    On a GPU the decision to skip stays on the device: fused AdamW leaves weights and state as they are if its attribute
    ``found_inf`` holds 1. The host waits for the decision (`waits`) on a CPU, with fp16, and where AdamW is not fused.

    Args:
        module: the module to train.
        config: settings of the run.
        device: its device.
        precision: precision in effect.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, device: torch.device, precision: str) -> None:
        self.optimizer = adamw(module, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.waits = device.type == "cpu" or self.scaler.is_enabled() or not self.optimizer.defaults["fused"]
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._largest = config.grad_clip or math.inf

    @property
    def loss_scale(self) -> float | None:
        """The factor of the loss in the backward, with fp16."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    def clip(self) -> Tensor:
        """Undo the loss scale, clip the gradient, and return its norm before clipping, a scalar."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self._parameters, self._largest)

    def is_overflow(self, in_losses: Tensor) -> bool:
        """Return whether a gradient that is not finite only means that the loss scale is too large."""
        return self.scaler.is_enabled() and not in_losses and self.scaler.get_scale() > 1

    def step(self, lr: float, skip: Tensor) -> None:
        """Update the weights unless ``skip``, a bool (), is true; adapt the loss scale."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not self.waits:
            self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not skip:
            self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.update()

    def zero_grad(self) -> None:
        """Discard the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

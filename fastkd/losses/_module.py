"""What the nn.Module twins of the losses share: options kept as attributes, and the train-only channel aligner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses import _checks
from fastkd.reference._numerics import compute_dtype


class LossModule(nn.Module):
    """A loss with its options as attributes of the same names."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)  # follows .to(device)
            else:
                setattr(self, name, value)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return ", ".join(f"{name}={_shown(value)}" for name, value in self._options().items())


def _shown(value: Any) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


class ChannelAligner(nn.Module):
    """A bias-free 1×1 convolution that maps (B, C_S, ...) to (B, C_T, ...).

    It belongs to the loss and is trained with the student, so give its parameters to the optimiser; the student itself
    gains no parameter and nothing of it remains at inference.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(student_channels, teacher_channels, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map the channels, dimension 1, of ``features``."""
        _checks.floating("student", features, (3, 4), "(B, C, H, W) or (B, C, N)")
        weight = self.linear.weight
        _checks.same_device(student=features, aligner=weight)
        if features.shape[1] != self.linear.in_features:
            raise ValueError(
                f"student: expected {self.linear.in_features} channels in dimension 1 (student_channels), "
                f"got shape {tuple(features.shape)}"
            )
        # Autocast, where it is on, has the last word.
        dtype = weight.dtype if features.dtype == weight.dtype else compute_dtype(features, weight)
        return F.linear(features.movedim(1, -1).to(dtype), weight.to(dtype)).movedim(-1, 1)


def make_aligner(student_channels: int | None, teacher_channels: int | None) -> ChannelAligner | None:
    """An aligner where the two widths are given and differ, else None."""
    for name, value in (("student_channels", student_channels), ("teacher_channels", teacher_channels)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name}: expected a positive int or None, got {type(value).__name__}")
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a positive int or None, got {value}")
    if (student_channels is None) != (teacher_channels is None):
        raise ValueError(
            "student_channels and teacher_channels: give both or neither, "
            f"got {student_channels} and {teacher_channels}"
        )
    if student_channels is None or teacher_channels is None or student_channels == teacher_channels:
        return None
    return ChannelAligner(student_channels, teacher_channels)

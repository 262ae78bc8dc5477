"""What the nn.Module twins of the losses share: options kept as attributes, and the train-only channel aligner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses import _checks
from fastkd.ops.numerics import compute_dtype


class LossModule(nn.Module):
    """A loss with its options as attributes of the same names, which may be assigned anything the argument takes.

    An ``nn.Parameter`` is a parameter of the module: optimised, and in its state dict. Another tensor is a buffer that
    follows ``.to(device)`` and is not saved. One that was computed from parameters keeps its graph, so that gradients
    reach them; a copy or a pickle of the module holds its values alone.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__.get("_names", ()) or isinstance(getattr(type(self), name, None), property):
            super().__setattr__(name, value)  # a property: the option is parametrised
            return
        self.__dict__.pop(name, None)
        self._parameters.pop(name, None)
        self._buffers.pop(name, None)
        self._non_persistent_buffers_set.discard(name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value, persistent=False)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[misc]
        return state | {
            "_buffers": {
                name: value.detach() if value is not None and value.grad_fn is not None else value
                for name, value in self._buffers.items()
            }
        }

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
        """Map the channels, dimension 1, of ``features``.

        ``linear`` is called as a module, so that hooks, parametrisations and what replaces or wraps it (LoRA, FSDP)
        count. Its weight is read from outside only to compute in a wider dtype than its own, and only of a plain
        ``nn.Linear``; anything else gets the features in the dtype of its parameters.
        """
        _checks.floating("student", features, (3, 4), "(B, C, H, W) or (B, C, N)")
        width = getattr(self.linear, "in_features", None)
        if isinstance(width, int) and features.shape[1] != width:
            raise ValueError(
                f"student: expected {width} channels in dimension 1 (student_channels), "
                f"got shape {tuple(features.shape)}"
            )
        rows = features.movedim(1, -1)
        if _is_plain(self.linear):
            weight = self.linear.weight
            _checks.same_device(student=features, aligner=weight)
            # Autocast, where it is on, overrides these dtypes.
            dtype = weight.dtype if features.dtype == weight.dtype else compute_dtype(features, weight)
            if dtype != weight.dtype:
                bias = None if self.linear.bias is None else self.linear.bias.to(dtype)
                return F.linear(rows.to(dtype), weight.to(dtype), bias).movedim(-1, 1)
        else:
            own = (p.dtype for p in self.linear.parameters() if p.is_floating_point())
            dtype = next(own, features.dtype)
        return self.linear(rows.to(dtype)).movedim(-1, 1)


def _is_plain(linear: nn.Module) -> bool:
    """Return whether ``linear`` only computes ``F.linear`` with its weight."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not any(hooks)


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

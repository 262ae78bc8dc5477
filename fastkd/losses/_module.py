"""Base class of the losses' module forms, and the train-only channel aligner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.ops import checks
from fastkd.ops.numerics import compute_dtype


class LossModule(nn.Module):
    """A loss with its options as attributes of the same names, which accept the same values as the arguments.

    An ``nn.Parameter`` becomes a parameter of the module, optimised and in its state dict. Any other tensor becomes a
    buffer that follows ``.to(device)`` and is not saved. Those in a pair, such as ``temperature=(τ_S, τ_T)``, are named
    ``temperature_0`` and ``temperature_1``. A tensor computed from parameters keeps its graph, so that they receive
    gradients; a copy or pickle of the module holds only its values.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__.get("_names", ()) or isinstance(getattr(type(self), name, None), property):
            super().__setattr__(name, value)  # torch's parametrize turns the option into a property
            return
        self.__dict__.pop(name, None)
        for each in (name, f"{name}_0", f"{name}_1"):
            self._parameters.pop(each, None)
            self._buffers.pop(each, None)
            self._non_persistent_buffers_set.discard(each)
        if isinstance(value, tuple | list):
            for i, each in enumerate(value):
                if isinstance(each, nn.Parameter):
                    self.register_parameter(f"{name}_{i}", each)
                elif isinstance(each, Tensor):
                    self.register_buffer(f"{name}_{i}", each, persistent=False)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value, persistent=False)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[misc]
        pairs = {name: self._option(name) for name in self._names if isinstance(state.get(name), tuple | list)}
        return state | {
            "_buffers": {name: _without_graph(value) for name, value in self._buffers.items()},
            **{name: tuple(map(_without_graph, pair)) for name, pair in pairs.items()},
        }

    def _options(self) -> dict[str, Any]:
        return {name: self._option(name) for name in self._names}

    def _option(self, name: str) -> Any:
        value = getattr(self, name)
        if isinstance(value, tuple | list):  # .to(device) may have replaced a tensor
            present = self._parameters | self._buffers
            return tuple(present.get(f"{name}_{i}", each) for i, each in enumerate(value))
        return value

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return ", ".join(f"{name}={_shown(value)}" for name, value in self._options().items())


def _without_graph(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.grad_fn is not None else value


def _shown(value: Any) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


class ChannelAligner(nn.Module):
    """A bias-free 1×1 convolution that maps (B, C_S, ...) to (B, C_T, ...).

    It belongs to the loss and is trained with the student, so pass its parameters to the optimiser. The student gains
    no parameter, and inference does not need the aligner.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(student_channels, teacher_channels, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map the channels, dimension 1, of ``features``.

        ``linear`` is called as a module, so that hooks, parametrisations and replacements or wrappers (LoRA, FSDP)
        take effect. Only the weight of a plain ``nn.Linear`` is read directly, to compute in a wider dtype than its
        own; any other module receives the features in the dtype of its parameters.
        """
        checks.floating("student", features, (3, 4), "(B, C, H, W) or (B, C, N)", no_samples=True)  # the loss decides
        width = getattr(self.linear, "in_features", None)
        if isinstance(width, int) and features.shape[1] != width:
            raise ValueError(
                f"student: expected {width} channels in dimension 1 (student_channels), "
                f"got shape {tuple(features.shape)}"
            )
        rows = features.movedim(1, -1)
        if _is_plain(self.linear):
            weight = self.linear.weight
            checks.same_device(student=features, aligner=weight)
            # Autocast overrides these dtypes.
            dtype = weight.dtype if features.dtype == weight.dtype else compute_dtype(features, weight)
            if dtype != weight.dtype:
                bias = None if self.linear.bias is None else self.linear.bias.to(dtype)
                return F.linear(rows.to(dtype), weight.to(dtype), bias).movedim(-1, 1)
        else:
            own = (p.dtype for p in self.linear.parameters() if p.is_floating_point())
            dtype = next(own, features.dtype)
        return self.linear(rows.to(dtype)).movedim(-1, 1)


def _is_plain(linear: nn.Module) -> bool:
    """Return whether ``linear`` is an ``nn.Linear`` without hooks or parametrisations."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not any(hooks)


def check_widths(student_channels: int | None, teacher_channels: int | None) -> None:
    """Raise unless both widths are positive, or both None.

    Raises:
        TypeError, ValueError: a width that is not a positive int, or only one width given.
    """
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


def make_aligner(student_channels: int | None, teacher_channels: int | None) -> ChannelAligner | None:
    """Return an aligner if both widths are given and differ, else None; errors as in :func:`check_widths`."""
    check_widths(student_channels, teacher_channels)
    if student_channels is None or teacher_channels is None or student_channels == teacher_channels:
        return None
    return ChannelAligner(student_channels, teacher_channels)

"""A student whose training steps round weights and activations to int8, as an exported network will."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST = 1e-12  # of a scale: a tensor of zeros has none
_LARGEST_WEIGHT = 64  # as `fastkd.models.reduced_onnx.to_int8` writes


class FakeInt8:
    """Round the weights of a student's convolutions and linear layers, and their inputs, in training steps.

    With scale s, zero point z and codes from q₀ to q₁, x becomes s·(clamp(round(x/s) + z, q₀, q₁) − z). Weights have
    one s per output channel, max|w|/64, and z = 0, as in an exported file; inputs have one s and z, so that the codes 0
    to 255 cover the range of the batch and 0. The gradient is that of the identity where no value is clamped, 0
    elsewhere. The parameters keep their full precision and their names; nothing else is stored.

    Reference: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018.

    Args:
        student: the student; its products of two activations (attention) are not rounded.
    """

    def __init__(self, student: nn.Module) -> None:
        self._layers = [m for m in student.modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Round until the end of the block."""
        with ExitStack() as opened:
            for layer in self._layers:
                opened.callback(layer.register_forward_pre_hook(_round).remove)
                opened.callback(layer.register_forward_hook(_restore, always_call=True).remove)
            yield


def _round(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    weight = layer._parameters["weight"]
    assert weight is not None
    layer.__dict__["weight"] = rounded_weight(weight)  # found before the parameter, which stays registered
    return (rounded_input(args[0]), *args[1:])


def _restore(layer: nn.Module, args: Any, output: Any) -> None:
    layer.__dict__.pop("weight", None)


def rounded_weight(weight: Tensor) -> Tensor:
    """Return a weight (C_out, …) rounded to int8 with a scale per output channel."""
    scale = (weight.detach().abs().flatten(1).amax(1) / _LARGEST_WEIGHT).clamp_min(_SMALLEST).float()  # (C_out,)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -_LARGEST_WEIGHT, _LARGEST_WEIGHT)


def rounded_input(x: Tensor) -> Tensor:
    """Return a tensor rounded to uint8 in its own range."""
    values = x.float()  # half precision under autocast
    low, high = values.detach().aminmax()
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / 255).clamp_min(_SMALLEST)
    zero = (-low / scale).round().to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, 255).to(x.dtype)

"""Run a model in the dtype of its weights, on images normalised the way it expects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastkd._wrappers import unwrap

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of red, green and blue, in [0, 1]."""


def run_model(model: nn.Module, *args: Any, **inputs: Any) -> Any:
    """Call a model; if its weights are not float32, compute in their dtype and ignore the caller's autocast.

    Floating-point inputs are cast to that dtype, unless the model sets ``casts_inputs``: its forward then takes float32
    images and casts them itself.
    """
    dtype = parameter_dtype(model)
    if dtype is None:
        return model(*args, **inputs)
    if not getattr(unwrap(model), "casts_inputs", False):
        args = tuple(_cast(value, dtype) for value in args)
        inputs = {name: _cast(value, dtype) for name, value in inputs.items()}
    # Not the weights' device: those of an offloaded teacher wait on the CPU.
    tensors = (value for value in (*args, *inputs.values()) if isinstance(value, Tensor))
    device = next(tensors, next(model.parameters())).device
    with torch.autocast(device.type, enabled=False):
        return model(*args, **inputs)


def parameter_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype shared by all floating-point parameters, or None if it is float32 or they differ."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    first = next(dtypes, torch.float32)
    return None if first == torch.float32 or any(dtype != first for dtype in dtypes) else first


def normalisation(model: nn.Module) -> Normalisation | None:
    """Return the mean and standard deviation that a model expects of its images, or None if it declares none.

    They are its ``image_normalisation``, or its configuration's ``image_mean`` and ``image_std``.
    """
    model = unwrap(model)
    declared = getattr(model, "image_normalisation", None)
    if declared is None:
        config = getattr(model, "config", None)
        declared = getattr(config, "image_mean", None), getattr(config, "image_std", None)
    mean, std = declared
    return None if mean is None or std is None else (tuple(mean), tuple(std))


def renormalise(image: Tensor, source: Normalisation, target: Normalisation) -> Tensor:
    """Return images (B, 3, H, W) converted from one normalisation to another; anything else unchanged."""
    if image.ndim != 4 or image.shape[1] != 3 or same_normalisation(source, target):
        return image
    (source_mean, source_std), (target_mean, target_std) = source, target
    scale = [a / b for a, b in zip(source_std, target_std, strict=True)]
    shift = [(a - b) / std for a, b, std in zip(source_mean, target_mean, target_std, strict=True)]
    # Python floats: copying a tensor of them to the GPU would synchronise.
    channels = [image[:, c] * scale[c] + shift[c] for c in range(3)]
    last = image.is_contiguous(memory_format=torch.channels_last)
    return torch.stack(channels, 1).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def same_normalisation(a: Any, b: Any) -> bool:
    """Return whether two (mean, standard deviation) pairs agree to 1e-6."""
    return all(
        len(ours) == len(theirs) and all(abs(x - y) < 1e-6 for x, y in zip(ours, theirs, strict=True))
        for ours, theirs in zip(a, b, strict=True)
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

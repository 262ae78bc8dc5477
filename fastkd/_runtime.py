"""Device, precision and memory format for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def pick_device(name: str | torch.device | None) -> torch.device:
    """Return the named device; for ``"auto"`` or None the current GPU if there is one, else the CPU.

    Raises:
        ValueError: an unknown device, or a GPU where torch sees none.
    """
    if name is None or name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:0', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was requested, but torch sees no GPU; use device='cpu' or 'auto'")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; the CPU for a model without parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Return every module to its own train or eval mode when the block ends: a part may be frozen in eval mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def pick_precision(name: str, device: torch.device) -> str:
    """Return "fp32", "bf16" or "fp16"; ``"auto"`` is "bf16" on a GPU with bf16 arithmetic (not emulated), else "fp32".

    Raises:
        ValueError: an unknown precision.
    """
    if name not in ("auto", "fp32", "bf16", "fp16"):
        raise ValueError(f"precision must be 'auto', 'fp32', 'bf16' or 'fp16', got {name!r}")
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and _has_bf16(device) else "fp32"


def _has_bf16(device: torch.device) -> bool:
    """Return whether a GPU has bf16 arithmetic; torch's own check covers only the current GPU."""
    if torch.cuda.device_count() > 1 and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the autocast context of a precision (see `pick_precision`); it overrides an outer one."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(pick_precision(precision, device))
    if dtype is None and not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def to_device(batch: Mapping[str, Any], device: torch.device, channels_last: bool = False) -> dict[str, Any]:
    """Return the batch with its tensors on the device; other values stay as they are."""
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    if channels_last and isinstance(moved.get("image"), Tensor):
        moved["image"] = moved["image"].contiguous(memory_format=torch.channels_last)
    return moved

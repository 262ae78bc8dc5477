"""Where and in what precision a run computes, and how its time is counted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def pick_device(name: str | torch.device | None) -> torch.device:
    """``"auto"`` (or None) is the current GPU where there is one, else the CPU."""
    if name is None or name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:0', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} asked for, but torch sees no GPU; use device='cpu' or 'auto'")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """``"auto"`` is "bf16" on a GPU with bf16 arithmetic, and "fp32" elsewhere, as where bf16 is only emulated."""
    if name not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be 'auto', 'fp32' or 'bf16', got {name!r}")
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and _has_bf16(device) else "fp32"


def _has_bf16(device: torch.device) -> bool:
    """Return whether a GPU has bf16 arithmetic; torch asks the current one, which may be another."""
    if torch.cuda.device_count() > 1 and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context that networks run in: "fp32", "bf16" or "auto", see `pick_precision`; an outer autocast is off."""
    bf16 = pick_precision(precision, device) == "bf16"
    if not bf16 and not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def to_device(batch: Mapping[str, Any], device: torch.device, channels_last: bool = False) -> dict[str, Any]:
    """The batch with its tensors moved; lists of names stay as they are."""
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    if channels_last and isinstance(moved.get("image"), Tensor):
        moved["image"] = moved["image"].contiguous(memory_format=torch.channels_last)
    return moved


class Clock:
    """Wall-clock seconds that can be stopped while something else is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._past = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds it ran so far."""
        return self._past + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        """Run."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Pause, once the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._past, self._since = self.seconds, None

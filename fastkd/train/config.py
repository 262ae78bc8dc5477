"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class TrainConfig:
    """Settings of `fastkd.train.train`. The defaults train a small student; every field has a meaning of its own.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 16
    """Samples per optimiser step, over all micro-batches and all processes."""
    accumulate: int = 1
    """Micro-batches that a step's batch is split into. The result is that of the whole batch, in less memory, unless
    something mixes samples: BatchNorm, or a term with ``across_batch`` or ``cross_image``, of which a warning tells."""
    lr: float = 5e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 1e-2
    """Decoupled weight decay; never on norms, biases and embedding tables."""
    warmup: int = 0
    """Steps of linear warm-up before the polynomial decay."""
    power: float = 0.9
    """Exponent of the polynomial decay lr·(1 − progress)^power; 0 keeps lr constant."""
    grad_clip: float | None = 1.0
    """Largest gradient norm, or None for no clipping."""
    seed: int = 0
    """Data order and dropout. Whoever makes the model seeds its weights; a dataset has a seed of its own."""
    device: str = "auto"
    """"auto" (the GPU if there is one; the CPU under ``accelerate launch --cpu``), "cpu", "cuda", "cuda:1"."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks: "auto" is bf16 on a GPU that has it (compute capability 8.0), or where ``accelerate
    launch`` asks for it, and fp32 elsewhere. Weights stay in fp32."""
    channels_last: bool = False
    """Keep images and convolution weights channels-last: faster convolutions on most devices."""
    workers: int = 0
    """Processes that load data; 0 loads in the training process."""
    threads: int | None = None
    """CPU threads of torch during the run; None leaves them as they are."""
    eval_every: int | None = None
    """Steps between evaluations on the validation set; None evaluates at the end alone."""
    eval_batch_size: int = 32
    """Samples per evaluation batch."""
    log_every: int = 20
    """Steps between lines of the log."""
    max_seconds: float | None = None
    """Stop after this much training (evaluation not counted), the learning rate decaying to zero by then."""
    find_unused_parameters: bool = False
    """With several processes: look at every step for parameters without a gradient. Needed where it depends on the
    batch which parameters take part; on by itself where the first batch leaves some out."""
    check: bool = True
    """Run the distiller's checks on the first batch before training."""

    def __post_init__(self) -> None:
        whole = {"steps": 1, "batch_size": 1, "accumulate": 1, "warmup": 0, "workers": 0, "eval_batch_size": 1}
        for name, least in {**whole, "log_every": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
        for name in ("threads", "eval_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number >= 1 or None, got {value!r}")
        for name in ("lr", "grad_clip", "max_seconds"):
            value, optional = getattr(self, name), name != "lr"
            if not (optional and value is None) and not (_finite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0{' or None' if optional else ''}, got {value!r}")
        for name in ("weight_decay", "power"):
            value = getattr(self, name)
            if not (_finite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision must be 'auto', 'fp32' or 'bf16', got {self.precision!r}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate, got batch_size={self.batch_size} "
                f"and accumulate={self.accumulate}"
            )


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""Settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["auto", "fp32", "bf16", "fp16"]  # as `fastkd._runtime.pick_precision`, which imports torch


@dataclass(kw_only=True)
class TrainConfig:
    """Settings of `fastkd.train.train`; the defaults suit a small student.

    Raises:
        ValueError: a field has the wrong type or is out of range; the message names it.
    """

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 16
    """Samples per optimiser step, over all micro-batches and all processes."""
    accumulate: int = 1
    """Micro-batches per step, to save memory. The result is that of the whole batch, unless something mixes samples
    (BatchNorm, or a term with ``across_batch`` or ``cross_image``), which causes a warning."""
    lr: float = 5e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 1e-2
    """Decoupled weight decay; not applied to norms, biases and embedding tables."""
    warmup: int = 0
    """Steps of a linear warm-up, which multiplies the polynomial decay, so the peak is a little below lr."""
    power: float = 0.9
    """Exponent of the polynomial decay lr·(1 − progress)^power; 0 keeps lr constant."""
    grad_clip: float | None = 1.0
    """Maximum gradient norm, or None for no clipping."""
    seed: int = 0
    """Seed of data order and dropout. Seed the initial weights where the model is built; a dataset has its own seed."""
    device: str = "auto"
    """"auto" (the GPU if there is one; the CPU under ``accelerate launch --cpu``), "cpu", "cuda" or "cuda:1"."""
    precision: Precision = "auto"
    """Precision of the networks: "auto" is what ``accelerate launch`` requests, else bf16 on a GPU that supports it
    (compute capability 8.0 or higher), else fp32. Weights stay in fp32; fp16 scales the loss."""
    channels_last: bool = False
    """Store images and convolution weights channels-last, which speeds up convolutions on most devices."""
    compile_student: bool = False
    """Compile the student with ``torch.compile`` for the training steps; evaluations and saved files are those of the
    student itself. Dropout may draw other numbers than without it."""
    fake_int8: bool = False
    """Round weights and inputs of the student's convolutions and linear layers to int8 in training steps (quantisation-
    aware training), for a student to be exported with ``--dtype int8``. Evaluations and saved files are in full
    precision."""
    workers: int = 0
    """Data-loading processes; 0 loads in the training process."""
    threads: int | None = None
    """torch's CPU threads during the run; None keeps the current number."""
    skip_bad_samples: bool = False
    """Replace a training sample that cannot be read by the next one, and list it, rather than raise an error."""
    eval_every: int | None = None
    """Steps between evaluations on the validation set; None evaluates only at the end."""
    eval_batch_size: int = 32
    """Samples per evaluation batch."""
    checkpoint_every: int | None = None
    """Steps between checkpoints to resume from; None writes one only when the run ends, for whatever reason."""
    keep_checkpoints: int = 2
    """Latest checkpoints to keep, in addition to the one with the best validation mIoU; 0 writes none."""
    ema: float | None = None
    """Decay of an exponential moving average of the student's parameters (0.999 is common), which is then evaluated and
    saved in place of them; None for no average."""
    log_every: int = 20
    """Steps between lines of the log."""
    gradients_every: int | None = None
    """Steps between lines of the log with the gradient norm of each term, which costs a backward per term; None logs
    only that of their sum."""
    tracker: tuple[str, ...] = ()
    """Trackers that also get the log's numbers, through accelerate: "tensorboard" (in the run's folder), "wandb",
    "trackio" or "mlflow"."""
    max_seconds: float | None = None
    """Stop after this many seconds of training (evaluation excluded); the learning rate decays to zero by then."""
    sync_batchnorm: bool = False
    """With several processes, let the student's BatchNorm layers normalise over the samples of all of them."""
    shard_teacher: bool = False
    """With several processes, divide the teacher's weights between them (FSDP2), for one too large for one GPU."""
    offload_teacher: bool = False
    """Keep the shards of ``shard_teacher`` in host memory and copy each block to the GPU when it runs."""
    find_unused_parameters: bool = False
    """With several processes, look for parameters without a gradient at every step. Needed if the parameters in use
    depend on the batch; enabled automatically if the first batch leaves some without a gradient."""
    check: bool = True
    """Before training, run the checks on the first batch and print the table of its terms and costs."""
    allow_untrained_teacher: bool = False
    """Accept a teacher whose normalisation layers hold their initial values, as if its weights had not been loaded."""

    def __post_init__(self) -> None:
        counts = {"steps": 1, "batch_size": 1, "accumulate": 1, "warmup": 0, "workers": 0, "eval_batch_size": 1}
        for name, minimum in {**counts, "log_every": 1, "keep_checkpoints": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
        for name in ("threads", "eval_every", "checkpoint_every", "gradients_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be an integer >= 1 or None, got {value!r}")
        for name in ("lr", "grad_clip", "max_seconds"):
            value, optional = getattr(self, name), name != "lr"
            if not (optional and value is None) and not (_finite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0{' or None' if optional else ''}, got {value!r}")
        for name in ("weight_decay", "power"):
            value = getattr(self, name)
            if not (_finite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        if self.ema is not None and not (_finite(self.ema) and 0 < self.ema < 1):
            raise ValueError(f"ema must be a number between 0 and 1 (such as 0.999) or None, got {self.ema!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be 'auto', 'fp32', 'bf16' or 'fp16', got {self.precision!r}")
        if self.fake_int8 and self.compile_student:
            raise ValueError("fake_int8=True and compile_student=True exclude each other: set one of them to False")
        if self.offload_teacher and not self.shard_teacher:
            raise ValueError("offload_teacher=True needs shard_teacher=True: it is the shards that wait in host memory")
        if isinstance(self.tracker, str):
            raise ValueError(f"tracker must be a tuple of names, got the string {self.tracker!r}: ({self.tracker!r},)")
        self.tracker = tuple(self.tracker)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate, got batch_size={self.batch_size} "
                f"and accumulate={self.accumulate}"
            )


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""Optimiser, learning-rate schedule and order of samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastkd.train.config import TrainConfig

_POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed", "pos_embed", "position_embedding")


def adamw(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; norms, biases and embedding tables are not decayed."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decayed: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_table = id(parameter) in tables or name.rpartition(".")[2] in _POSITION_TABLES
        (others if parameter.ndim <= 1 or is_table else decayed).append((name, parameter))
    if not decayed and not others:
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to train")
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = {p.device.type for _, p in (*decayed, *others)} <= {"cpu", "cuda"}
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, fused=fused)


def lr_factor(step: int, progress: float, config: TrainConfig) -> float:
    """Return the learning rate relative to its peak: linear warm-up times (1 − progress)^power."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    return warm * max(0.0, 1.0 - progress) ** config.power


def check_batch_size(samples: int, config: TrainConfig, ranks: int) -> None:
    """Raise ``ValueError`` for a batch that cannot be divided, or that the training set cannot fill."""
    if config.batch_size % (config.accumulate * ranks):
        raise ValueError(
            f"batch_size must be a multiple of accumulate times processes, got batch_size={config.batch_size}, "
            f"accumulate={config.accumulate} and {ranks} processes"
        )
    if samples < config.batch_size:
        raise ValueError(
            f"the training set has {samples} samples, fewer than one batch of {config.batch_size}: "
            "lower batch_size or use more data"
        )


class BatchOrder:
    """Batch sampler: sample indices of each micro-batch of one process in the current epoch.

    The order depends only on the seed and the epoch, not on the model or the number of micro-batches, processes and
    loading workers. The incomplete last batch of an epoch is dropped.

    Attributes:
        epoch: the epoch to iterate over.
        skip: number of steps at its start to skip.
    """

    def __init__(self, samples: int, config: TrainConfig, rank: int = 0, ranks: int = 1) -> None:
        check_batch_size(samples, config, ranks)
        self.samples, self.config, self.rank, self.ranks = samples, config, rank, ranks
        self.epoch = self.skip = 0

    def settings(self) -> dict[str, Any]:
        """Return what determines the order in addition to the configuration, for the settings of a run."""
        return {}

    def position(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, counted from 0, and the number of steps before it in that epoch."""
        return divmod(step, self.samples // self.config.batch_size)

    def move_to(self, step: int) -> None:
        """Set epoch and position to the batch of a step, counted from 0."""
        self.epoch, self.skip = self.position(step)

    def indices(self, step: int) -> list[list[int]]:
        """Return the sample indices of each micro-batch of a step, counted from 0."""
        order = BatchOrder(self.samples, self.config, self.rank, self.ranks)
        order.move_to(step)
        return list(itertools.islice(order, self.config.accumulate))

    def __len__(self) -> int:
        return (self.samples // self.config.batch_size - self.skip) * self.config.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.samples, generator=generator, device="cpu").tolist()
        size, parts = self.config.batch_size, self.config.accumulate * self.ranks
        part = size // parts
        for start in range(self.skip * size, len(order) - size + 1, size):
            for micro in range(self.config.accumulate):
                first = start + (micro * self.ranks + self.rank) * part
                yield order[first : first + part]

"""Batches of a run on its device, from any step on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fastkd._runtime import to_device
from fastkd.data._loading import batches
from fastkd.data._nested import set_epoch
from fastkd.distill.distiller import Distiller
from fastkd.train.config import TrainConfig
from fastkd.train.host import check_batch
from fastkd.train.optim import BatchOrder
from fastkd.train.seeding import SeededSamples


def endless_batches(
    dataset: Dataset[Any],
    order: BatchOrder,
    step: int,
    config: TrainConfig,
    collate: Callable[[list[Any]], dict[str, Any]],
    distiller: Distiller,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Yield micro-batches on the device, epoch after epoch, beginning with those of a step, counted from 0.

    Loading processes run ahead of training, so the position is not read from them: it follows from the step.
    """
    samples = SeededSamples(dataset, config.seed)
    loader = DataLoader(
        samples,
        batch_sampler=order,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(config.seed),  # the global generator belongs to the model
    )
    order.move_to(step)
    while True:
        samples.epoch = order.epoch
        set_epoch(dataset, order.epoch)
        for batch in batches(loader):
            check_batch(distiller, batch)
            yield to_device(batch, device, config.channels_last)
        order.epoch, order.skip = order.epoch + 1, 0

"""Batches of a run on its device, from any step on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fastkd.data._loading import batches
from fastkd.data._nested import set_epoch
from fastkd.data._pixels import batch_to_device
from fastkd.distill.distiller import Distiller
from fastkd.train.config import TrainConfig
from fastkd.train.host import check_batch
from fastkd.train.optim import BatchOrder
from fastkd.train.samples import BAD, BadSample, CollateGood, TrainingSamples
from fastkd.train.teacher_cache.reader import collate_for


class Feed:
    """Load the micro-batches of one process.

    Loading processes run ahead of training, so the position is not read from them: it follows from the step.

    Attributes:
        bad: samples that were replaced since they could not be read, index to error.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        order: BatchOrder,
        config: TrainConfig,
        collate: Callable[[list[Any]], dict[str, Any]],
        distiller: Distiller,
        device: torch.device,
    ) -> None:
        self.order, self.config, self.distiller, self.device = order, config, distiller, device
        self.samples = TrainingSamples(dataset, config.seed, config.skip_bad_samples)
        collate = collate_for(distiller, collate)
        self._collate = CollateGood(collate) if config.skip_bad_samples else collate
        self.bad: dict[int, str] = {}

    def start(self, step: int) -> Iterator[dict[str, Any]]:
        """Yield micro-batches, epoch after epoch, beginning with those of a step, counted from 0."""
        loader = DataLoader(
            self.samples,
            batch_sampler=self.order,  # type: ignore[arg-type]
            collate_fn=self._collate,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.config.seed),  # the global generator belongs to the model
        )
        self.order.move_to(step)
        while True:
            self._set_epoch(self.order.epoch)
            for batch in batches(loader):
                yield self._ready(batch)
            self.order.epoch, self.order.skip = self.order.epoch + 1, 0

    def reload(self, step: int, micro: int) -> dict[str, Any]:
        """Return a micro-batch of an earlier step, counted from 0; changes the epoch of the dataset."""
        self._set_epoch(self.order.position(step)[0])
        loader = DataLoader(self.samples, batch_sampler=[self.order.indices(step)[micro]], collate_fn=self._collate)
        [batch] = batches(loader)
        return self._ready(batch)

    def _ready(self, batch: dict[str, Any]) -> dict[str, Any]:
        bad: list[BadSample] = batch.pop(BAD, []) if self.config.skip_bad_samples else []
        self.bad |= dict(bad)
        check_batch(self.distiller, batch)
        return batch_to_device(batch, self.device, self.config.channels_last)

    def _set_epoch(self, epoch: int) -> None:
        self.samples.epoch = epoch
        set_epoch(self.samples.dataset, epoch)

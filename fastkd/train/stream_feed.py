"""Batches of a dataset that is read in sequence: a `ShardDataset` instead of one with random access."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from fastkd.data._loading import batches
from fastkd.data._pixels import with_pixels
from fastkd.data.stream import ShardDataset
from fastkd.distill.distiller import Distiller
from fastkd.train.config import TrainConfig
from fastkd.train.feed import Feed
from fastkd.train.optim import BatchOrder, check_batch_size
from fastkd.train.samples import BadSample

Collate = Callable[[list[Any]], dict[str, Any]]


def feed_for(
    dataset: Dataset[Any],
    config: TrainConfig,
    collate: Collate,
    distiller: Distiller,
    device: torch.device,
    rank: int,
    ranks: int,
) -> Feed:
    """Return the feed of one of several processes.

    Raises:
        ValueError: the dataset or its size does not fit the configuration.
    """
    dataset = with_pixels(dataset, collate)
    if isinstance(dataset, ShardDataset):
        stream = StreamOrder(dataset, config, rank, ranks)
        return StreamFeed(dataset, stream, config, collate, distiller, device)
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"train_dataset is a {type(dataset).__name__}, an IterableDataset, whose position cannot be resumed or "
            "divided between processes: pass a dataset with random access, or a fastkd.data.ShardDataset"
        )
    order = BatchOrder(len(dataset), config, rank, ranks)  # type: ignore[arg-type]
    return Feed(dataset, order, config, collate, distiller, device)


def first_samples(dataset: Dataset[Any], count: int) -> list[Any]:
    """Return the first samples of a dataset of either kind."""
    if isinstance(dataset, ShardDataset):
        return list(islice(dataset.read(0, 1), count))
    return [dataset[index] for index in range(count)]


class StreamOrder(BatchOrder):
    """Samples of each micro-batch of one process, which its loading processes (readers) serve in turn."""

    def __init__(self, dataset: ShardDataset, config: TrainConfig, rank: int = 0, ranks: int = 1) -> None:
        check_batch_size(len(dataset), config, ranks)
        self.dataset, self.config, self.rank, self.ranks = dataset, config, rank, ranks
        self.samples, self.workers = len(dataset), max(1, config.workers)
        dataset.check_readers(self.readers)

    @property
    def readers(self) -> int:
        """Loading processes of all ranks."""
        return self.ranks * self.workers

    @property
    def size(self) -> int:
        """Samples of a micro-batch."""
        return self.config.batch_size // (self.config.accumulate * self.ranks)

    def settings(self) -> dict[str, Any]:
        """Return the dataset's settings and the number of readers."""
        settings = {**self.dataset.settings(), "readers": self.readers}
        return {f"stream.{name}": value for name, value in settings.items()}

    def start(self, batch: int) -> tuple[int, int]:
        """Return the reader of this process's micro-batch, counted from 0, and the samples that it serves before."""
        turn, worker = divmod(batch, self.workers)
        return self.rank * self.workers + worker, turn * self.size

    def serve(self, reader: int, start: int) -> Iterator[Any]:
        """Return the samples of a reader from a position on; see `ShardDataset.serve`."""
        return self.dataset.serve(reader, self.readers, start, self.config.skip_bad_samples)

    def position(self, step: int) -> tuple[int, int]:
        """Return the pass in which a step begins, and 0."""
        reader, start = self.start(step * self.config.accumulate)
        return next(self.dataset.order(reader, self.readers, start))[0], 0

    def indices(self, step: int) -> list[list[int]]:
        """Return the numbers of the samples of each micro-batch of a step, counted from 0."""
        found = []
        for micro in range(self.config.accumulate):
            reader, start = self.start(step * self.config.accumulate + micro)
            found.append([number for _, number in islice(self.dataset.order(reader, self.readers, start), self.size)])
        return found


class StreamFeed(Feed):
    """Load the micro-batches of one process from shards."""

    order: StreamOrder

    def __init__(self, dataset: ShardDataset, *rest: Any) -> None:
        super().__init__(dataset, *rest)
        self.samples: Any = dataset

    def start(self, step: int) -> Iterator[dict[str, Any]]:
        """Yield micro-batches, pass after pass, beginning with those of a step, counted from 0."""
        loader = DataLoader(
            _Readers(self.order, step * self.config.accumulate),
            batch_size=self.order.size,
            collate_fn=_Collate(self._collate),
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.config.seed),
        )
        for batch in batches(loader):
            yield self._ready(batch)

    def reload(self, step: int, micro: int) -> dict[str, Any]:
        """Return a micro-batch of an earlier step, counted from 0."""
        reader, start = self.order.start(step * self.config.accumulate + micro)
        served = self.order.serve(reader, start)
        return self._ready(_Collate(self._collate)(list(islice(served, self.order.size))))


class _Collate:
    """Collate what `ShardDataset.serve` yields: samples, followed by a `BadSample` for each one that was replaced."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, served: list[Any]) -> dict[str, Any]:
        """Return the batch."""
        return self.collate([sample for sample, _ in served] + [BadSample(*each) for _, each in served if each])


class _Readers(IterableDataset[Any]):
    """The readers of one process; a loader takes a micro-batch of each in turn, the first one from worker 0."""

    def __init__(self, order: StreamOrder, batch: int) -> None:
        self.order, self.batch = order, batch

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        return self.order.serve(*self.order.start(self.batch + (0 if worker is None else worker.id)))

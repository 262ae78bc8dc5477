"""Mix several datasets in one run, each with its own number of samples per epoch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch.utils.data import Dataset

from fastkd.data._nested import set_epoch


class MixedDataset(Dataset[dict[str, Any]]):
    """Several map-style datasets in one; an epoch takes a given number of samples of each.

    Each dataset is read in its own seeded order, pass after pass, and every epoch continues where the last one ended:
    whatever its number of samples per epoch, each sample is read once before any is read again. Order and position
    follow from seed and epoch, so a resumed run reads the same samples. A sample is the dataset's, with the dataset's
    name under the key ``dataset``.

    Args:
        datasets: Name to dataset. All must give samples with the same keys, sizes and tokenizer.
        weights: Name to passes over the dataset per epoch, such as 2 or 0.25; default: 1.
        sizes: Name to samples per epoch; overrides ``weights``.
        seed: Seed of the orders.

    Raises:
        ValueError: There are no datasets, a name in weights or sizes is unknown, or a number is not positive.

    Example::

        train_set = MixedDataset({"refcoco": refcoco, "cups": cups}, weights={"cups": 4})
        train(model, train_set, TrainConfig(steps=1000))
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset[dict[str, Any]]],
        *,
        weights: Mapping[str, float] | None = None,
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        if not datasets:
            raise ValueError("MixedDataset needs at least one dataset, got none")
        for argument, given in (("weights", weights or {}), ("sizes", sizes or {})):
            for name, number in given.items():
                if name not in datasets:
                    known = ", ".join(map(repr, datasets))
                    raise ValueError(f"{argument} names {name!r}, which is not among the datasets: {known}")
                if (
                    isinstance(number, bool)
                    or not 0 < number < float("inf")
                    or (given is sizes and number != int(number))
                ):
                    kind = "a positive integer" if given is sizes else "a positive number"
                    raise ValueError(f"{argument} of {name!r} must be {kind}, got {number!r}")
        self.datasets, self.seed = dict(datasets), seed
        # In shared memory, so that persistent workers see set_epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.lengths: dict[str, int] = {name: len(part) for name, part in datasets.items()}  # type: ignore[arg-type]
        if empty := [name for name, length in self.lengths.items() if not length]:
            raise ValueError(f"dataset {empty[0]!r} is empty")
        by_weight = {name: round((weights or {}).get(name, 1) * length) for name, length in self.lengths.items()}
        self.sizes = {name: max(1, int((sizes or {}).get(name, by_weight[name]))) for name in datasets}
        self._ends = list(accumulate(self.sizes.values()))
        self._orders: dict[tuple[str, int], list[int]] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:
        return f"MixedDataset({self.summary()})"

    def summary(self) -> str:
        """Return the names of the datasets, with samples per epoch of those there are."""
        return ", ".join(f"{name} {size} of {self.lengths[name]}" for name, size in self.sizes.items())

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the mixture and of each dataset."""
        self._epoch.fill_(epoch)
        for part in self.datasets.values():
            set_epoch(part, epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, inner = self._locate(index)
        return {**self.datasets[name][inner], "dataset": name}

    def describe(self, index: int) -> str:
        """Return the dataset and ids of a sample, for messages."""
        name, inner = self._locate(index)
        describe = getattr(self.datasets[name], "describe", None)
        return f"{name}, " + (describe(inner) if describe is not None else f"sample {inner}")

    def _locate(self, index: int) -> tuple[str, int]:
        """Return the dataset of a sample of this epoch, and its index there."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range: the mixture has {len(self)} samples per epoch")
        index %= len(self)
        number = bisect_right(self._ends, index)
        name = list(self.datasets)[number]
        size, length = self.sizes[name], self.lengths[name]
        position = int(self._epoch) * size + index - (self._ends[number] - size)
        return name, self._order(name, position // length)[position % length]

    def _order(self, name: str, number: int) -> list[int]:
        """Return the order of a dataset in its ``number``-th pass."""
        if (name, number) not in self._orders:
            order = list(range(self.lengths[name]))
            Random(f"{self.seed}/{name}/{number}").shuffle(order)
            kept = [key for key in self._orders if key[0] == name][-1:]  # an epoch may cross from one pass to the next
            self._orders = {key: self._orders[key] for key in self._orders if key[0] != name or key in kept}
            self._orders[name, number] = order
        return self._orders[name, number]

"""Random augmentation in a fixed number of views, so that the teacher's output can be cached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from fastkd.data._nested import leaves, set_epoch
from fastkd.train.seeding import kept_generators, seed_sample


class AugmentedViews(Dataset[Any]):
    """A dataset whose samples are augmented in V views, the same ones in any run: in epoch e, view e mod V.

    Each view of a sample is drawn once: ``augment`` runs with the CPU generators of Python, numpy and torch seeded by
    (seed, view, sample). A sample is identified by its "ref_id", if it is a dict that has one, else by its index; all
    sentences of a ref are then augmented alike. A `TeacherCache` of `all` has every view.

    Args:
        dataset: samples by index, without random augmentation.
        augment: sample → augmented sample, which must not change the sample that it receives. Images and masks have to
            be transformed together; a flip changes what "left" in a sentence means.
        views: V, at least 1. A cache takes V times the space.
        seed: another seed draws other views.

    Raises:
        ValueError: fewer than one view, or a dataset that is read in sequence.

    Example:
        >>> def brighter(sample):
        ...     return {**sample, "image": sample["image"] * (0.8 + 0.4 * torch.rand(()))}
        >>> every = AugmentedViews(every_sentence, brighter, views=4)
        >>> TeacherCache.build("cache", distiller, every.all(), batch_size=16)
        >>> train(cached, AugmentedViews(one_per_ref, brighter, views=4), config)
    """

    def __init__(self, dataset: Dataset[Any], augment: Callable[[Any], Any], *, views: int, seed: int = 0) -> None:
        if type(views) is not int or views < 1:
            raise ValueError(f"views must be an integer of at least 1, got {views!r}")
        if isinstance(dataset, IterableDataset):
            raise ValueError(f"dataset is a {type(dataset).__name__}, read in sequence: views need samples by index")
        self.dataset, self.augment, self.views, self.seed = dataset, augment, views, seed
        # In shared memory, so that persistent workers see set_epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @property
    def epoch(self) -> int:
        """Return the epoch, which determines the view."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, also of the dataset inside; call it before iterating over the loader."""
        self._epoch.fill_(epoch)
        set_epoch(self.dataset, epoch)

    def __getitem__(self, index: int) -> Any:
        return self.sample(index, self.epoch % self.views)

    def sample(self, index: int, view: int) -> Any:
        """Return a sample in a view."""
        sample = self.dataset[index]
        key = sample["ref_id"] if isinstance(sample, dict) and "ref_id" in sample else index % len(self)
        with kept_generators():
            seed_sample(self.seed, view, key)
            return self.augment(sample)

    def describe(self, index: int) -> str:
        """Return the ids of a sample, for messages."""
        return self.described(index, self.epoch % self.views)

    def described(self, index: int, view: int) -> str:
        """Return view and ids of a sample."""
        describe = getattr(self.dataset, "describe", None)
        return f"view {view}" + ("" if describe is None else f" of {describe(index)}")

    def all(self) -> Dataset[Any]:
        """Return a dataset of all views of all samples, for `TeacherCache.build`."""
        return _All(self)


class _All(Dataset[Any]):
    """All views of all samples, view by view."""

    views = 1  # of a sample of this dataset

    def __init__(self, augmented: AugmentedViews) -> None:
        self.augmented = augmented

    def __len__(self) -> int:
        return self.augmented.views * len(self.augmented)

    def __getitem__(self, index: int) -> Any:
        view, sample = divmod(index, len(self.augmented))
        return self.augmented.sample(sample, view)

    def describe(self, index: int) -> str:
        view, sample = divmod(index, len(self.augmented))
        return self.augmented.described(sample, view)


def augmented_in(dataset: Any) -> list[AugmentedViews]:
    """Return the datasets in a dataset that change from view to view."""
    return [part for part in leaves(dataset, "views") if isinstance(part, AugmentedViews) and part.views > 1]

"""Samples of a training set: seeded, named in errors, and replaced if they cannot be read and that is allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset, Subset

from fastkd._messages import shortened
from fastkd.train.seeding import kept_generators, seed_sample

BAD = "bad_samples"  # key of a batch that lists the samples it replaced
_TRIES = 10  # if so many samples in a row cannot be read, the dataset is at fault


class BadSample(NamedTuple):
    """A sample that could not be read."""

    number: int
    error: str


class TrainingSamples(Dataset[Any]):
    """A dataset whose samples draw random numbers (augmentations) determined by seed, epoch and index.

    Samples are then the same with any number of loading processes, and after resuming inside an epoch, when a new
    loading process serves what another one would have. The process's own generators are left unchanged.

    Args:
        dataset: the training set; if it has ``describe(index)``, errors quote it.
        seed: seed of the run.
        skip_bad: replace a sample that raises an error by the next one that does not.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, skip_bad: bool = False) -> None:
        self.dataset, self.seed, self.skip_bad, self.epoch = dataset, seed, skip_bad, 0

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the samples of a batch, followed by a `BadSample` for each one that was replaced.

        torch's loader calls it.
        """
        bad: list[BadSample] = []
        with kept_generators():
            if _reads_batches(self.dataset) and not self.skip_bad:
                seed_sample(self.seed, self.epoch, indices[0])
                try:
                    return list(self.dataset.__getitems__(indices))  # type: ignore[attr-defined]
                except Exception as error:
                    error.add_note(f"This batch has samples {shortened([*map(str, indices)])} of the training set.")
                    raise
            samples = [self._sample(index, bad) for index in indices]
        return [*samples, *bad]

    def _sample(self, index: int, bad: list[BadSample]) -> Any:
        for shift in range(_TRIES):
            chosen = (index + shift) % len(self)
            seed_sample(self.seed, self.epoch, chosen)
            try:
                return self.dataset[chosen]
            except MemoryError:
                raise
            except Exception as error:
                named = self._describe(chosen)
                if not self.skip_bad or shift == _TRIES - 1:
                    error.add_note(f"This is {named} of the training set.")
                    if self.skip_bad:
                        error.add_note(f"{_TRIES} samples in a row cannot be read, so none is skipped.")
                    raise
                bad.append(BadSample(chosen, f"{named}: {type(error).__name__}: {error}"))
        raise AssertionError

    def _describe(self, index: int) -> str:
        describe = getattr(self.dataset, "describe", None)
        return f"sample {index}" + (f" ({describe(index)})" if describe is not None else "")


def _reads_batches(dataset: Any) -> bool:
    """Return whether a dataset reads several samples at once, not one by one as torch's `Subset` does by itself."""
    read = getattr(dataset, "__getitems__", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return read is not None and hasattr(dataset, "__getitems__")


class CollateGood:
    """Collate the samples and list the replaced ones under `BAD`."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        """Return the batch."""
        bad = [item for item in items if isinstance(item, BadSample)]
        batch = self.collate([item for item in items if not isinstance(item, BadSample)])
        return {**batch, BAD: bad} if bad else batch

"""Random numbers as a function of seed, step and sample, so that a resumed run draws the same ones.

Nothing of the generators' state has to be kept: every step and every sample is seeded.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info


def derived_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators of Python, numpy and torch (all devices) for a step of one process."""
    value = derived_seed("step", seed, step, rank)
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 (what users' modules draw from)


class SeededSamples(Dataset[Any]):
    """A dataset whose samples draw random numbers (augmentations) determined by seed, epoch and index.

    Samples are then the same with any number of loading processes, and after resuming inside an epoch, when a new
    loading process serves what another one would have. The process's own generators are left unchanged.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        with kept_generators():
            return self._sample(index)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the samples of a batch; called by torch's loader."""
        with kept_generators():
            several = getattr(self.dataset, "__getitems__", None)
            if several is not None:
                self._seed(indices[0])
                return list(several(indices))
            return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> Any:
        self._seed(index)
        return self.dataset[index]

    def _seed(self, index: int) -> None:
        value = derived_seed("sample", self.seed, self.epoch, index)
        torch.default_generator.manual_seed(value)  # torch.manual_seed would queue work for GPUs at each call
        random.seed(value)
        np.random.seed(value % 2**32)  # noqa: NPY002


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the CPU generators of Python, numpy and torch at the end of the block, except in a loading process."""
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])

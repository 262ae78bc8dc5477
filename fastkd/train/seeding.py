"""Random numbers as a function of seed, step and sample, so that a resumed run draws the same ones.

Nothing of the generators' state has to be kept: every step and every sample is seeded.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import get_worker_info


def derived_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed the generators of Python, numpy and torch (all devices) for a micro-batch of a step in one process."""
    value = derived_seed("step", seed, step, micro, rank)
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 (what users' modules draw from)


def seed_sample(seed: int, epoch: int, index: int | str) -> None:
    """Seed the CPU generators of Python, numpy and torch for a sample."""
    value = derived_seed("sample", seed, epoch, index)
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

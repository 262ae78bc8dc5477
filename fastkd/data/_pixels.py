"""Keep images as uint8 from the loading processes to the device: a quarter of the bytes, normalised batch by batch.

Numbers and keys of the batches that models receive are the same as with images normalised sample by sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from fastkd._runtime import to_device
from fastkd.data._prepare import Prepared, with_images
from fastkd.data.dataset import ReferDataset, collate
from fastkd.data.labels import PartlyLabelled
from fastkd.data.mixed import MixedDataset
from fastkd.data.stream import ShardDataset

# Exact types: subclasses and other wrappers may change the images of a sample.
_SOURCES = (ReferDataset, ShardDataset)
_WRAPPERS = {Subset: "dataset", ConcatDataset: "datasets", MixedDataset: "datasets", PartlyLabelled: "dataset"}


def with_pixels(dataset: Dataset[Any], collated_by: Callable[[list[Any]], dict[str, Any]]) -> Dataset[Any]:
    """Return a copy of a dataset whose samples have their images as uint8, for `batch_to_device`.

    The copy shares the epoch and caches of the dataset. Where code of the user would receive those samples (another
    collate function, a dataset or wrapper of another type), and where the images have several normalisations, the
    dataset itself is returned.
    """
    if collated_by is not collate:
        return dataset
    sources: list[Prepared] = []
    found = _copied(dataset, sources)
    statistics = {(source.image_mean, source.image_std) for source in sources}
    return found if found is not None and len(statistics) == 1 else dataset


def _copied(dataset: Any, sources: list[Prepared]) -> Any:
    """Return a copy that serves uint8, or None; add the innermost datasets to ``sources``."""
    kind = type(dataset)
    if kind in _SOURCES:
        found = copy.copy(dataset)
        found.normalised = False
        sources.append(found)
        return found
    if kind not in _WRAPPERS:
        return None
    name = _WRAPPERS[kind]
    inside = getattr(dataset, name)
    parts = list(inside.values()) if isinstance(inside, Mapping) else inside if isinstance(inside, list) else [inside]
    copies = [_copied(part, sources) for part in parts]
    if any(part is None for part in copies):
        return None
    found = copy.copy(dataset)
    if isinstance(inside, Mapping):
        setattr(found, name, dict(zip(inside, copies, strict=True)))
    else:
        setattr(found, name, copies if isinstance(inside, list) else copies[0])
    return found


def batch_to_device(batch: Mapping[str, Any], device: torch.device, channels_last: bool = False) -> dict[str, Any]:
    """Return the batch with its tensors on the device and its images normalised."""
    return to_device(with_images(to_device(batch, device), channels_last), device, channels_last)

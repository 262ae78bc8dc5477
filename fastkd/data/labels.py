"""Training sets of which only a part of the images keep their masks."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.utils.data import Dataset

from fastkd.data.dataset import ReferDataset, Sample


class PartlyLabelled(Dataset[Sample]):
    """A training set of which a share of the images is labelled, the same images in every run.

    An image is labelled depending on its id alone, so a smaller share is a part of a larger one. Samples get
    ``label_weight``, float32 (): 0 for an unlabelled one, whose mask is empty, and samples / labelled samples for the
    others, so that `fastkd.train.segmentation_loss` stays, on average over batches, the mean over labelled samples.

    Args:
        dataset: The training set, with ``sentences="random"``.
        share: Share of the images to keep the masks of, above 0 and at most 1.
        only: Serve labelled samples only, for a student without a teacher.

    Raises:
        ValueError: The dataset or the share cannot be used, or no image is labelled.

    Example::

        train(distiller, PartlyLabelled(dataset, 0.1), config)  # a tenth of the masks, distillation on all images
    """

    def __init__(self, dataset: ReferDataset, share: float, *, only: bool = False) -> None:
        if not isinstance(dataset, ReferDataset) or dataset.sentences != "random":
            raise ValueError(
                f"labels: a share of the masks needs one ReferDataset with sentences='random', got "
                f"{type(dataset).__name__}: train on one set without shards"
            )
        if not 0 < share <= 1:
            raise ValueError(f"labels must be above 0 and at most 1 (such as 0.25), got {share!r}")
        self.dataset, self.share = dataset, share
        refs = dataset.refcoco.refs
        self._labelled = [_place(ref.image_id) < share for ref in refs]
        if not any(self._labelled):
            raise ValueError(
                f"labels={share:g} leaves none of {len(refs)} refs with a mask: raise it, or use more data"
            )
        self._indices = [n for n, labelled in enumerate(self._labelled) if labelled or not only]
        self._weight = len(self._indices) / sum(self._labelled)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        inner = self._indices[index]
        sample: dict[str, Any] = dict(self.dataset[inner])
        if not self._labelled[inner]:
            return sample | {"mask": torch.zeros_like(sample["mask"]), "label_weight": torch.tensor(0.0)}
        return sample | {"label_weight": torch.tensor(self._weight)}

    def describe(self, index: int) -> str:
        """Return the ids of a sample, for messages."""
        return self.dataset.describe(self._indices[index])


def _place(image_id: int) -> float:
    """Return a number in [0, 1) that depends on an image's id alone."""
    digest = hashlib.blake2b(str(image_id).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64

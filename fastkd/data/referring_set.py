"""The base class of sets of referring expressions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from fastkd.data._records import Ref


class ReferringSet(ABC):
    """One split of a set: refs with sentences, and the images and masks that they refer to.

    `ReferDataset` serves the samples of any subclass. The constructor of a subclass sets the attributes.

    Attributes:
        name: Name of the set, as stated in logs and results.
        split: The split.
        refs: Its refs.
        skipped: Number of refs and sentences that were skipped, by reason.
    """

    name: str
    split: str
    refs: list[Ref]
    skipped: dict[str, int]

    @abstractmethod
    def image(self, image_id: int) -> np.ndarray:
        """Return an image, (H, W, 3) uint8 RGB."""

    @abstractmethod
    def mask(self, ref_id: int | str) -> np.ndarray:
        """Return the mask of a ref at the image's original size, (H, W) bool; all False without a target."""

    @abstractmethod
    def image_bytes(self, image_id: int) -> bytes:
        """Return the encoded image as stored."""

    @abstractmethod
    def image_name(self, image_id: int) -> str:
        """Return the name of an image in the set."""

    def __len__(self) -> int:
        return len(self.refs)

    def __iter__(self) -> Iterator[Ref]:
        return iter(self.refs)

    def __repr__(self) -> str:
        images = len({ref.image_id for ref in self.refs})
        return (
            f"{type(self).__name__}({self._origin()}: {len(self.refs)} refs, {self.sentence_count} sentences, "
            f"{images} images)"
        )

    def _origin(self) -> str:
        """Return the arguments that identify the split, for ``repr``."""
        return f"{self.name!r}, {self.split!r}"

    @property
    def sentence_count(self) -> int:
        """Return the total number of sentences."""
        return sum(len(ref.sentences) for ref in self.refs)

    def ref(self, ref_id: int | str) -> Ref:
        """Return a ref by its id."""
        if not hasattr(self, "_by_id"):
            self._by_id = {ref.ref_id: ref for ref in self.refs}
        try:
            return self._by_id[ref_id]
        except KeyError:
            raise KeyError(f"ref_id {ref_id!r} is not in split {self.split!r} of {self.name}") from None

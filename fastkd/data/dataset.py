"""A torch dataset of images, sentences and masks, and its collate function."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from fastkd.data._prepare import Prepared
from fastkd.data._records import Ref, Sentence
from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fastkd.data.images import to_square
from fastkd.data.referring_set import ReferringSet
from fastkd.data.tokenizer import Tokenizer

Sample = dict[str, Any]


class ReferDataset(Prepared, Dataset[Sample]):
    """Samples of a `RefCOCO` split or another `ReferringSet`, resized to a square regardless of the aspect ratio.

    Images are resized bilinearly and normalised by ``image_mean`` and ``image_std``; masks are resized by nearest
    neighbour. A sample is a dict, with S = ``image_size`` and T = ``max_words``:

    - ``image`` float32 (3, S, S);
    - ``input_ids`` int64 (T,) and ``word_mask`` bool (T,), True at ``[CLS]``, word pieces and ``[SEP]``;
    - ``mask`` bool (S, S), True at the referred object;
    - ``ref_id``, ``sent_id``, ``image_id`` int, and ``sentence`` str;
    - ``no_target`` bool: the sentence refers to nothing in the image, so that the mask is empty;
    - with ``teacher_tokenizer`` also ``teacher_input_ids`` int64 and ``teacher_word_mask`` bool, both
      (``teacher_max_words``,).

    Args:
        refcoco: The split to serve: a `RefCOCO`, `ReferFolder` or other `ReferringSet`.
        tokenizer: The student's tokenizer, from `load_tokenizer`.
        image_size: Side of the square in pixels.
        max_words: Length of ``input_ids``, including ``[CLS]`` and ``[SEP]``.
        sentences: ``"random"``: one sample per ref, its sentence determined by (seed, epoch, index) in any run or
            worker; ``"all"``: one sample per sentence, for evaluation.
        seed: Seed of the sentence draw.
        teacher_tokenizer: The tokenizer of a teacher that does not use the student's; a `Distiller` passes its ids to
            the teacher.
        teacher_max_words: Length of ``teacher_input_ids``; default: ``max_words``.
        cache: Keep decoded and resized images and masks in memory, (S, S, 3) + (S, S) bytes per sample, once they are
            read; each DataLoader worker keeps its own copy unless `fill_cache` ran first.
        image_mean: Mean of red, green and blue, in [0, 1], to normalise images; use the model's ``config.image_mean``.
        image_std: Their standard deviations.

    Example::

        dataset = ReferDataset(RefCOCO("data/shapes"), load_tokenizer("shapes"), image_size=64)
        loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True, collate_fn=collate)
        for epoch in range(epochs):
            dataset.set_epoch(epoch)
            for batch in loader: ...
    """

    def __init__(
        self,
        refcoco: ReferringSet,
        tokenizer: Tokenizer,
        image_size: int = 480,
        max_words: int = 20,
        sentences: str = "random",
        seed: int = 0,
        cache: bool = False,
        teacher_tokenizer: Tokenizer | None = None,
        teacher_max_words: int | None = None,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if not isinstance(refcoco, ReferringSet):
            raise TypeError(
                f"refcoco must be a RefCOCO or another ReferringSet, got {type(refcoco).__name__}: pass RefCOCO(root, "
                "split=...)"
            )
        if sentences not in ("random", "all"):
            raise ValueError(f"sentences must be 'random' (one per ref and epoch) or 'all', got {sentences!r}")
        self._set_transform(
            tokenizer, image_size, max_words, teacher_tokenizer, teacher_max_words, image_mean, image_std
        )
        self.refcoco, self.sentences, self.seed = refcoco, sentences, seed
        self._pairs = [(ref, sentence) for ref in refcoco for sentence in ref.sentences]
        self._images: dict[int, np.ndarray] | None = {} if cache else None
        self._masks: dict[int | str, np.ndarray] | None = {} if cache else None
        self._ids: dict[str, dict[str, torch.Tensor]] = {}
        # In shared memory, so that persistent workers see set_epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self._pairs) if self.sentences == "all" else len(self.refcoco)

    @property
    def epoch(self) -> int:
        """Return the epoch, which determines the sentence drawn from each ref."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; call it before iterating over the loader."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range: the dataset has {len(self)} samples")
        ref, sentence = self._select(index % len(self))
        return {
            **self._image_entries(self._image(ref.image_id)),
            **self._tokens(sentence.text),
            "mask": torch.from_numpy(self._mask(ref.ref_id).copy()),  # not a view of the cache
            "ref_id": ref.ref_id,
            "sent_id": sentence.sent_id,
            "image_id": ref.image_id,
            "no_target": not ref.targets,
            "sentence": sentence.text,
        }

    def describe(self, index: int) -> str:
        """Return the ids of a sample, for messages."""
        ref, sentence = self._select(index % len(self))
        return f"ref {ref.ref_id}, sentence {sentence.sent_id}, image {ref.image_id}"

    def fill_cache(self) -> None:
        """Read every image and mask (with ``cache=True``), so that workers started later share them."""
        if self._images is None:
            raise ValueError("fill_cache needs a dataset with cache=True")
        for ref in self.refcoco:
            self._image(ref.image_id)
            self._mask(ref.ref_id)

    def _select(self, index: int) -> tuple[Ref, Sentence]:
        if self.sentences == "all":
            return self._pairs[index]
        ref = self.refcoco.refs[index]
        if len(ref.sentences) == 1:
            return ref, ref.sentences[0]
        return ref, Random(f"{self.seed}/{self.epoch}/{index}").choice(ref.sentences)

    def _tokens(self, text: str) -> dict[str, torch.Tensor]:
        if text not in self._ids:
            self._ids[text] = self._tokenise(text)
        return self._ids[text]

    def _image(self, image_id: int) -> np.ndarray:
        if self._images is not None and image_id in self._images:
            return self._images[image_id]
        pixels = to_square(self.refcoco.image(image_id), self.image_size)
        if self._images is not None:
            self._images[image_id] = pixels
        return pixels

    def _mask(self, ref_id: int | str) -> np.ndarray:
        if self._masks is not None and ref_id in self._masks:
            return self._masks[ref_id]
        mask = self._square_mask(self.refcoco.mask(ref_id))
        if self._masks is not None:
            self._masks[ref_id] = mask
        return mask


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Collate samples into a batch: stack tensors, collect ids and sentences in lists.

    Keys: ``image`` float32 (B, 3, S, S), ``input_ids`` int64 (B, T), ``word_mask`` bool (B, T), ``mask`` bool
    (B, S, S); the lists ``ref_id``, ``sent_id``, ``image_id``, ``no_target``, ``sentence``; with a teacher's tokenizer
    also ``teacher_input_ids`` int64 and ``teacher_word_mask`` bool.

    Raises:
        ValueError: There are no samples, or samples differ in their keys or in a tensor's size.

    Example::

        loader = DataLoader(train_set, batch_size=16, collate_fn=collate)
    """
    if len(samples) == 0:
        raise ValueError("collate got an empty batch: pass at least one sample")
    batch: dict[str, Any] = {}
    for key, first in samples[0].items():
        lacking = [_describe(n, sample) for n, sample in enumerate(samples) if key not in sample]
        if lacking:
            raise ValueError(
                f"collate: {lacking[0]} has no {key!r}, but {_describe(0, samples[0])} has: create all datasets with "
                "the same options (such as teacher_tokenizer)"
            )
        values = [sample[key] for sample in samples]
        batch[key] = _stack(key, samples) if isinstance(first, torch.Tensor) else values
    return batch


def _stack(key: str, samples: Sequence[Sample]) -> torch.Tensor:
    """Return the samples' tensors of one key, stacked to (B, ...)."""
    shapes = {tuple(sample[key].shape): _describe(n, sample) for n, sample in reversed(list(enumerate(samples)))}
    if len(shapes) > 1:
        found = " and ".join(f"{shape} in {name}" for shape, name in list(shapes.items())[:3])
        raise ValueError(
            f"collate: a batch needs one size of {key!r}, got {found}: use one image_size and one max_words for all "
            "datasets, or resize and pad in your own collate function"
        )
    values = [sample[key] for sample in samples]
    kinds = {(value.dtype, value.layout, value.requires_grad) for value in values}
    if kinds == {(values[0].dtype, torch.strided, False)}:
        return default_collate(values)  # type: ignore[no-any-return]  # in a worker, directly into shared memory
    return torch.stack(values)


def _describe(number: int, sample: Sample) -> str:
    """Return a description of a sample for an error message."""
    known = [f"{key} {sample[key]}" for key in ("ref_id", "sent_id", "image_id") if key in sample]
    return f"sample {number}" + (f" ({', '.join(known)})" if known else "")

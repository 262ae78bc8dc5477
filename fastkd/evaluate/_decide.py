"""Turn a batch's logits into the masks that a protocol compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fastkd.data._nested import leaves
from fastkd.evaluate._values import check_mask
from fastkd.evaluate.counts import Counts, count_pixels
from fastkd.evaluate.protocols import Protocol

ORIGINAL = "original_mask"  # key of a sample's mask at its image's own size


class WithOriginalMasks(Dataset[dict[str, Any]]):
    """A dataset whose samples have their masks at the image's own size too, under the key ``original_mask``.

    Samples that have none get that of their ref in the dataset's `fastkd.data.ReferringSet`.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        sets = {id(part): getattr(part, "refcoco", None) for part in leaves(dataset, "refcoco")}
        self.source = next(iter(sets.values())) if len(sets) == 1 else None  # refs of several sets share ids
        self.several = len(sets) > 1

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        if ORIGINAL in sample:
            return sample  # type: ignore[no-any-return]
        if self.source is None or "ref_id" not in sample:
            fix = "evaluate one set at a time, or " if self.several else "evaluate a ReferDataset, or "
            raise ValueError(
                f"sample {index} has no mask at its image's own size, which protocol 'cris_orig' compares: {fix}add "
                f"the key {ORIGINAL!r}, (H, W) bool, to the samples"
            )
        return {**sample, ORIGINAL: self.source.mask(sample["ref_id"])}


class CollateOriginalMasks:
    """A collate function that keeps masks of different sizes in a list, and passes the rest to another one."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        masks = [torch.from_numpy(np.array(sample[ORIGINAL])) for sample in samples]
        for mask in masks:
            if mask.ndim != 2 or not mask.numel():
                raise ValueError(f"{ORIGINAL} must be (H, W), got {tuple(mask.shape)}: drop its other dimensions")
        rest = [{key: value for key, value in sample.items() if key != ORIGINAL} for sample in samples]
        return {**self.collate(rest), ORIGINAL: masks}


def count_batch(
    logits: Tensor, batch: dict[str, Any], rules: Protocol, predicted_no_target: Tensor | None, min_pixels: int
) -> tuple[Counts, Tensor, Tensor]:
    """Return the counts of a batch, and the numbers of true and of predicted pixels, (B,) int64 each.

    Args:
        logits: (B, 2, H, W).
        batch: its ``mask`` (B, H, W) or ``original_mask``, and ``no_target`` if the protocol asks.
        rules: the protocol.
        predicted_no_target: (B,) bool, decided by the model's own head; None: by ``min_pixels``.
        min_pixels: predicted masks with fewer pixels mean "no target".
    """
    if rules.probability is not None:
        return _count_original(logits, batch[ORIGINAL], rules.probability)
    prediction = logits[:, 1] > logits[:, 0]  # (B, H, W)
    truth = batch["mask"].bool()
    sizes = [mask.flatten(1).sum(1, dtype=torch.int64) for mask in (truth, prediction)]
    if not rules.no_target:
        return count_pixels(prediction, truth), sizes[0], sizes[1]
    if predicted_no_target is None:
        predicted_no_target = sizes[1] < min_pixels
    no_target = torch.as_tensor(batch["no_target"], dtype=torch.bool, device=logits.device)
    return count_pixels(prediction, truth, no_target, predicted_no_target), sizes[0], sizes[1]


def _count_original(logits: Tensor, masks: list[Tensor], threshold: float) -> tuple[Counts, Tensor, Tensor]:
    """Resize the probabilities of each sample to the size of its mask, then count those above a threshold."""
    probability = torch.sigmoid(logits[:, 1].float() - logits[:, 0].float())  # (B, H, W)
    counts, sizes = [], []
    for row, mask in zip(probability, masks, strict=True):
        check_mask(mask, ORIGINAL)
        truth = mask.to(row.device).bool()[None]  # (1, h, w)
        size = (truth.shape[1], truth.shape[2])
        resized = F.interpolate(row[None, None], size=size, mode="bicubic", align_corners=False)[0]  # (1, h, w)
        prediction = resized > threshold
        counts.append(count_pixels(prediction, truth))
        sizes.append(torch.stack([truth.sum(), prediction.sum()]))
    joined = Counts(torch.cat([c.intersections for c in counts]), torch.cat([c.unions for c in counts]))
    target, predicted = torch.stack(sizes).unbind(1)
    return joined, target, predicted


def head_decision(output: Any, samples: int) -> Tensor | None:
    """Return what a model's no-target head predicts, (B,) bool, from ``no_target_logits`` of its output; or None.

    Raises:
        ValueError: they are not (B, 2), or hold NaN.
    """
    logits = getattr(output, "no_target_logits", None)
    if logits is None:
        return None
    if logits.shape != (samples, 2):
        raise ValueError(
            f"no_target_logits of the model's output must be ({samples}, 2), a target and none, got "
            f"{tuple(logits.shape)}"
        )
    if bool(torch.isnan(logits[:, 1] - logits[:, 0]).any()):
        raise ValueError("no_target_logits of the model's output hold NaN: check the weights of its head")
    return logits[:, 1] > logits[:, 0]

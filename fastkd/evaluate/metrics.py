"""Metrics of referring image segmentation: oIoU, mIoU and precision at IoU thresholds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fastkd.evaluate._values import check_mask
from fastkd.ops.numerics import computes_fp64

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


class RISMetrics(Metric):
    """oIoU, mIoU and P@0.5 … P@0.9 of binary masks, in percent, as protocol "lavt" defines them.

    With I and U the pixels in the intersection and union of prediction and truth of one sample (one sentence),

        oIoU = ΣI / ΣU,    mIoU = mean of I/U,    P@X = share of samples with I/U ≥ X,

    where a sample with U = 0 has IoU 0. I and U are stored per sample as int64: sums are exact, processes merge by
    concatenation, and `sample_iou` is available afterwards. Each sample must be added in one process only,
    without padding.

    Example:
        >>> metrics = RISMetrics()
        >>> metrics.update(logits.argmax(1) == 1, batch["mask"])
        >>> metrics.compute()["mIoU"]
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    intersections: list[Tensor]
    unions: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("intersections", default=[], dist_reduce_fx="cat")
        self.add_state("unions", default=[], dist_reduce_fx="cat")

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Add a batch of masks.

        Args:
            prediction: (B, H, W) bool or 0/1 integers.
            truth: (B, H, W) bool or 0/1.

        Raises:
            ValueError: shapes that differ or are not (B, H, W); masks with values other than 0 and 1.
        """
        if prediction.shape != truth.shape or prediction.ndim != 3:
            raise ValueError(
                f"prediction and truth must both be (B, H, W), got {tuple(prediction.shape)} and {tuple(truth.shape)}"
            )
        ours, theirs = _binary(prediction, "prediction"), _binary(truth, "truth")
        self.intersections.append((ours & theirs).flatten(1).sum(1, dtype=torch.int64))
        self.unions.append((ours | theirs).flatten(1).sum(1, dtype=torch.int64))

    def compute(self) -> dict[str, Tensor]:
        """Return ``{"oIoU": …, "mIoU": …, "P@0.5": …, …, "P@0.9": …}`` in percent, as float64 scalars.

        They are on the CPU if the masks' device has no float64.
        """
        intersection, union = self._counts()
        iou = _iou(intersection, union)
        result = {"oIoU": _iou(intersection.sum(), union.sum()), "mIoU": iou.mean()}
        result |= {f"P@{x}": (iou >= x).double().mean() for x in THRESHOLDS}
        return {name: 100 * value for name, value in result.items()}

    def sample_iou(self) -> Tensor:
        """Return the IoU of every sample added in this process, in order: (samples,) float64 in [0, 1]."""
        return _iou(*self._counts())

    def _counts(self) -> tuple[Tensor, Tensor]:
        # torchmetrics turns the lists into tensors when it synchronises processes.
        states: list[Any] = [self.intersections, self.unions]
        intersection, union = (torch.cat(s) if isinstance(s, list) and s else s for s in states)
        if len(intersection) == 0:
            raise ValueError("RISMetrics has no samples: call update(prediction, truth) first; is the dataset empty?")
        if not computes_fp64(intersection.device):
            return intersection.cpu(), union.cpu()
        return intersection, union


def _binary(mask: Tensor, name: str) -> Tensor:
    if name == "prediction" and mask.is_floating_point():
        raise ValueError(f"{name} must be bool or hold only 0 and 1, got {mask.dtype}; use logits.argmax(1)")
    check_mask(mask, name)
    return mask.bool()


def _iou(intersection: Tensor, union: Tensor) -> Tensor:
    return intersection.double() / union.clamp(min=1).double()  # U = 0 has I = 0

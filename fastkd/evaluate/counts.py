"""Pixel counts of samples, and the scores that follow from them under a protocol."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.evaluate.protocols import THRESHOLDS, Protocol
from fastkd.ops.numerics import computes_fp64


class Counts(NamedTuple):
    """Pixel counts of samples.

    Attributes:
        intersections: (B,) int64.
        unions: (B,) int64.
        no_target: (B,) bool, the sentence has no target; None where the protocol does not ask.
        predicted_no_target: (B,) bool, the model predicts that; None where the protocol does not ask.
    """

    intersections: Tensor
    unions: Tensor
    no_target: Tensor | None = None
    predicted_no_target: Tensor | None = None


def count_pixels(
    prediction: Tensor, truth: Tensor, no_target: Tensor | None = None, predicted_no_target: Tensor | None = None
) -> Counts:
    """Return the counts of masks (B, H, W) bool.

    With no-target flags (B,) bool, a sample that is correctly predicted to have no target has I = U = 0, and one that
    is wrongly predicted to have none has I = 0; its U remains that of the true and the predicted mask.
    """
    intersections = (prediction & truth).flatten(1).sum(1, dtype=torch.int64)
    unions = (prediction | truth).flatten(1).sum(1, dtype=torch.int64)
    if no_target is None or predicted_no_target is None:
        return Counts(intersections, unions)
    intersections = intersections.masked_fill(predicted_no_target, 0)
    unions = unions.masked_fill(no_target & predicted_no_target, 0)
    return Counts(intersections, unions, no_target, predicted_no_target)


def sample_iou(counts: Counts, rules: Protocol) -> Tensor:
    """Return the IoU of every sample, (B,) float64 in [0, 1]; on the CPU if the device has no float64."""
    intersections, unions, no_target, predicted = _with_fp64(counts)
    iou = _ratio(intersections, unions, rules.epsilon)
    if no_target is None or predicted is None:
        return iou
    return torch.where(no_target, predicted.double(), iou)


def reaches(iou: Tensor, threshold: float, rules: Protocol) -> Tensor:
    """Return whether each IoU counts in P@``threshold``."""
    return iou > threshold if rules.strict else iou >= threshold


def scores(counts: Counts, rules: Protocol) -> dict[str, Tensor]:
    """Return oIoU, mIoU and P@X in percent, float64 scalars; with no-target flags also N-acc and T-acc.

    Means over no samples are omitted: P@X and T-acc without samples that have a target, N-acc without others.
    """
    counts = _with_fp64(counts)
    iou = sample_iou(counts, rules)
    result = {"oIoU": _ratio(counts.intersections.sum(), counts.unions.sum()), "mIoU": iou.mean()}
    targeted, flags = iou, {}
    if counts.no_target is not None and counts.predicted_no_target is not None:
        targeted = iou[~counts.no_target]
        flags["N-acc"] = counts.predicted_no_target[counts.no_target].double()
        flags["T-acc"] = (~counts.predicted_no_target[~counts.no_target]).double()
    if len(targeted):
        result |= {f"P@{x}": reaches(targeted, x, rules).double().mean() for x in THRESHOLDS}
    result |= {name: right.mean() for name, right in flags.items() if len(right)}
    return {name: 100 * value for name, value in result.items()}


def _ratio(intersection: Tensor, union: Tensor, epsilon: float = 0.0) -> Tensor:
    return intersection.double() / (union.clamp(min=1).double() + epsilon)  # U = 0 has I = 0


def _with_fp64(counts: Counts) -> Counts:
    """Return the counts on a device that computes in float64."""
    if computes_fp64(counts.intersections.device):
        return counts
    flags = (part if part is None else part.cpu() for part in counts[2:])
    return Counts(counts.intersections.cpu(), counts.unions.cpu(), *flags)

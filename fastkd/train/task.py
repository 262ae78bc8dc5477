"""Task loss of referring image segmentation: cross-entropy and dice of the two-class mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.evaluate._values import check_mask


def segmentation_loss(
    output: Any,
    batch: Mapping[str, Any],
    *,
    class_weights: tuple[float, float] = (0.9, 1.1),
    dice_weight: float = 1.0,
) -> Tensor:
    """Return weighted two-class cross-entropy plus dice, a float32 scalar.

    For each sample, with p the probability of the referred object and y its mask,

        ce   = Σ w_y · (−log p_y) / Σ w_y                         over the pixels
        dice = 1 − (2 Σ p·y + 1) / (Σ p + Σ y + 1)

    and the loss is the mean over samples of ``ce + dice_weight · dice``, each times its ``label_weight`` if the batch
    has weights. Each sample is normalised separately, so the mean over accumulated micro-batches (or over ranks) is
    exactly the loss of the whole batch.

    Args:
        output: model output with ``logits`` (B, 2, H, W), or the logits; channel 1 is the referred object.
        batch: holds ``mask`` (B, H, W), bool or 0/1. Other values are an error on the CPU. On other devices and in a
            traced graph, where reading them would synchronise, they make the loss NaN. ``label_weight`` (B,), from
            `fastkd.data.PartlyLabelled`, is optional.
        class_weights: weights of background and object pixels; (0.9, 1.1) is the usual choice on RefCOCO.
        dice_weight: factor of dice; 0 skips it.

    Raises:
        ValueError: logits that are not (B, 2, H, W), a mask of another size, or one with values other than 0 and 1.

    Example:
        >>> distiller = fastkd.Distiller(student, teacher, segmentation_loss, terms)
    """
    logits = output if isinstance(output, Tensor) else output.logits
    mask = batch["mask"]
    if logits.ndim != 4 or logits.shape[1] != 2:
        raise ValueError(f"segmentation_loss: logits must be (B, 2, H, W), got {tuple(logits.shape)}")
    if mask.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"segmentation_loss: mask {tuple(mask.shape)} does not match logits {tuple(logits.shape)}; "
            f"expected {(logits.shape[0], *logits.shape[2:])}"
        )
    truth = mask.flatten(1).to(torch.float32)  # (B, H·W)
    if mask.dtype != torch.bool:
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            check_mask(mask, "segmentation_loss: mask")
        truth = torch.where((truth == 0) | (truth == 1), truth, torch.nan)
    # Two classes: the softmax of (a, b) is the sigmoid of b − a.
    margin = (logits[:, 1].float() - logits[:, 0].float()).flatten(1)  # (B, H·W)
    background, target = class_weights
    weight = torch.where(truth > 0.5, target, background)
    ce = F.binary_cross_entropy_with_logits(margin, truth, weight, reduction="none").sum(1) / weight.sum(1)  # (B,)
    weights = batch.get("label_weight")  # (B,)
    if not dice_weight:
        return _mean(ce, weights)
    p = margin.sigmoid()  # (B, H·W)
    dice = 1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)
    return _mean(ce + dice_weight * dice, weights)


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean over samples, (B,) losses times weights."""
    return losses.mean() if weights is None else (losses * weights.to(losses)).mean()

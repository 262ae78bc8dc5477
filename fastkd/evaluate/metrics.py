"""Metrics of referring image segmentation: oIoU, mIoU and precision at IoU thresholds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fastkd.evaluate._values import check_mask
from fastkd.evaluate.counts import Counts, count_pixels, sample_iou, scores
from fastkd.evaluate.protocols import protocol as named_protocol

_FLAGS = ("no_target", "predicted_no_target")


class RISMetrics(Metric):
    """oIoU, mIoU and P@0.5 … P@0.9 of binary masks, in percent, under a named protocol.

    With I and U the pixels in the intersection and union of prediction and truth of one sample (one sentence),

        oIoU = ΣI / ΣU,    mIoU = mean of I/U,    P@X = share of samples with I/U ≥ X,

    where a sample with U = 0 has IoU 0. "cris_orig" takes I/(U + 1e-6) and counts what exceeds X. Under "gres" a
    sample without a target has IoU 1 if that was predicted, else 0, P@X is over the samples with one, and two more
    scores state how often the prediction was right: N-acc without a target, T-acc with one.

    I and U are stored per sample as int64: sums are exact, processes merge by concatenation, and `sample_iou` is
    available afterwards. Each sample must be added in one process only, without padding.

    Args:
        protocol: name of the protocol, see `fastkd.evaluate.PROTOCOLS`. The caller decides the masks and their size.
        kwargs: those of `torchmetrics.Metric`.

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
    no_target: list[Tensor]
    predicted_no_target: list[Tensor]

    def __init__(self, protocol: str = "lavt", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rules = named_protocol(protocol)
        for name in ("intersections", "unions", *(_FLAGS if self.rules.no_target else ())):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        prediction: Tensor,
        truth: Tensor,
        *,
        no_target: Tensor | None = None,
        predicted_no_target: Tensor | None = None,
    ) -> None:
        """Add a batch of masks.

        Args:
            prediction: (B, H, W) bool or 0/1 integers.
            truth: (B, H, W) bool or 0/1.
            no_target: (B,) bool, for protocol "gres" only: the sentence has no target.
            predicted_no_target: (B,) bool, for protocol "gres" only: the model predicts that it has none.

        Raises:
            ValueError: shapes that differ or are not (B, H, W); masks with values other than 0 and 1; no-target flags
                that the protocol needs and does not get, or does not have.
        """
        if prediction.shape != truth.shape or prediction.ndim != 3:
            raise ValueError(
                f"prediction and truth must both be (B, H, W), got {tuple(prediction.shape)} and {tuple(truth.shape)}"
            )
        for name, flags in (("no_target", no_target), ("predicted_no_target", predicted_no_target)):
            if (flags is not None) is not self.rules.no_target:
                advice = "pass (B,) bool" if self.rules.no_target else "omit it, or use protocol 'gres'"
                raise ValueError(
                    f"{name}: protocol {self.rules.name!r} {'needs it' if self.rules.no_target else 'has no such rule'}"
                    f": {advice}"
                )
            if flags is not None and (flags.dtype != torch.bool or flags.shape != prediction.shape[:1]):
                raise ValueError(
                    f"{name} must be bool of shape {tuple(prediction.shape[:1])}, got {flags.dtype} of "
                    f"{tuple(flags.shape)}"
                )
        counts = count_pixels(
            _binary(prediction, "prediction"), _binary(truth, "truth"), no_target, predicted_no_target
        )
        for name, values in counts._asdict().items():
            if values is not None:
                getattr(self, name).append(values)

    def compute(self) -> dict[str, Tensor]:
        """Return ``{"oIoU": …, "mIoU": …, "P@0.5": …, …, "P@0.9": …}`` in percent, as float64 scalars.

        They are on the CPU if the masks' device has no float64. Under "gres" there are also N-acc and T-acc; a mean
        over no samples is omitted.
        """
        return scores(self._counts(), self.rules)

    def sample_iou(self) -> Tensor:
        """Return the IoU of every sample added in this process, in order: (samples,) float64 in [0, 1]."""
        return sample_iou(self._counts(), self.rules)

    def _counts(self) -> Counts:
        # torchmetrics turns the lists into tensors when it synchronises processes.
        states: list[Any] = [getattr(self, name) for name in self._defaults]
        joined = [torch.cat(state) if isinstance(state, list) and state else state for state in states]
        if len(joined[0]) == 0:
            raise ValueError("RISMetrics has no samples: call update(prediction, truth) first; is the dataset empty?")
        return Counts(*joined)


def _binary(mask: Tensor, name: str) -> Tensor:
    if name == "prediction" and mask.is_floating_point():
        raise ValueError(f"{name} must be bool or hold only 0 and 1, got {mask.dtype}; use logits.argmax(1)")
    check_mask(mask, name)
    return mask.bool()

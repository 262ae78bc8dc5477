"""Scores of a model, the conditions of the evaluation, and the scores of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class EvalResult:
    """Scores of a model and the conditions of the evaluation.

    Attributes:
        metrics: ``{"oIoU", "mIoU", "P@0.5", …, "P@0.9"}`` in percent; under "gres" also "N-acc" and "T-acc".
        protocol: name of the protocol.
        dataset: name of the dataset, or None if it declares none.
        split: split of the dataset, or None if it declares none.
        sentences: number of sentences evaluated, one per sample.
        refs: number of distinct refs among them, or None if the batches have no ``ref_id``.
        resolution: (H, W) at which masks were compared, or None if each was at its image's own size.
        decision: rule that turned logits into masks, such as "argmax".
        threshold: condition for a sample to count in P@X, "IoU >= X" or "IoU > X".
        precision: arithmetic of the network: "fp32", "bf16", "fp16" or "fp64".
        seconds: wall-clock seconds, loading included.
        sample_iou: (sentences,) float64 IoU in [0, 1], in dataset order.
        ref_ids: ref of each sample, if the batches have ``ref_id``.
        sent_ids: sentence of each sample, if the batches have ``sent_id``.
        split_by: author of the split, or None if the dataset declares none.
        mask_rule: how the parts of an object's true mask were combined, or None if the dataset declares none.
        samples: a record of each sample, in dataset order: "ref_id", "sent_id", "image_id" and "sentence" if the
            batches have them, "iou", and the numbers of pixels "intersection", "union", "target_pixels" and
            "predicted_pixels"; under "gres" also "no_target" and "predicted_no_target". Empty in a trainer's result.
    """

    metrics: dict[str, float]
    protocol: str
    dataset: str | None
    split: str | None
    sentences: int
    refs: int | None
    resolution: tuple[int, int] | None
    decision: str
    threshold: str
    precision: str
    seconds: float
    sample_iou: Tensor = field(repr=False)
    ref_ids: list[Any] = field(default_factory=list, repr=False)
    sent_ids: list[Any] = field(default_factory=list, repr=False)
    split_by: str | None = None
    mask_rule: str | None = None
    samples: Sequence[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def miou(self) -> float:
        """Return the mean IoU in percent."""
        return self.metrics["mIoU"]

    @property
    def oiou(self) -> float:
        """Return the overall IoU in percent."""
        return self.metrics["oIoU"]

    @property
    def size(self) -> str:
        """Return the resolution as text: "480x480", or "original" if each mask was at its image's own size."""
        return "original" if self.resolution is None else "{}x{}".format(*self.resolution)

    @property
    def conditions(self) -> dict[str, str | None]:
        """Return what two evaluations must have in common for their scores to be comparable, and the arithmetic."""
        return {
            "dataset": self.dataset,
            "split_by": self.split_by,
            "split": self.split,
            "protocol": self.protocol,
            "resolution": self.size,
            "decision": self.decision,
            "threshold": self.threshold,
            "mask_rule": self.mask_rule,
            "precision": self.precision,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the per-sample ones, as JSON values."""
        return {
            "metrics": self.metrics,
            "protocol": self.protocol,
            "dataset": self.dataset,
            "split_by": self.split_by,
            "split": self.split,
            "sentences": self.sentences,
            "refs": self.refs,
            "resolution": None if self.resolution is None else list(self.resolution),
            "decision": self.decision,
            "threshold": self.threshold,
            "mask_rule": self.mask_rule,
            "precision": self.precision,
            "eval_seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EvalResult:
        """Return the result that `to_dict` wrote; its per-sample fields are empty."""
        rest = {key: value for key, value in values.items() if key not in ("eval_seconds", "resolution")}
        size = values["resolution"]
        return cls(
            **rest,
            resolution=None if size is None else (size[0], size[1]),
            seconds=values["eval_seconds"],
            sample_iou=torch.empty(0, dtype=torch.float64),
        )

    def __str__(self) -> str:
        scores = "  ".join(f"{name} {value:.2f}" for name, value in self.metrics.items())
        return f"{scores}  [{self.stated}]"

    @property
    def stated(self) -> str:
        """Return protocol, dataset, numbers of sentences and refs, and the other conditions as text."""
        refs = f" of {self.refs} refs" if self.refs is not None else ""
        author = f"({self.split_by})" if self.split_by else None
        where = " ".join(filter(None, (self.dataset, author, self.split)))
        size = "each image's own size" if self.resolution is None else self.size
        masks = f", true masks: {self.mask_rule}" if self.mask_rule else ""
        return (
            f"{self.protocol}: {where + ', ' if where else ''}{self.sentences} sentences{refs}, "
            f"{size}, {self.decision}, {self.threshold}{masks}"
        )

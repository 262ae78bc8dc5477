"""The counts of a process for its share of the samples, and the records of all samples in dataset order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastkd.evaluate._decide import count_batch, head_decision
from fastkd.evaluate.counts import Counts, sample_iou
from fastkd.evaluate.protocols import Protocol

_COLUMNS = ("ref_id", "sent_id", "image_id", "sentence")
_PIXELS = ("intersection", "union", "target_pixels", "predicted_pixels")
_FLAGS = ("no_target", "predicted_no_target")


@dataclass
class Share:
    """The samples of one process.

    Attributes:
        indices: their indices in the dataset.
        failure: description of the sample whose logits hold NaN, or "".
        decision: rule that turned logits into masks, or "" if there were no samples.
        resolutions: the sizes (H, W) of the logits.
        without_target: number of sentences that have no target.
        columns: what the batches state of each sample, by name.
        counts: tensors (B,) of each batch, by name.
    """

    indices: Sequence[int]
    failure: str = ""
    decision: str = ""
    resolutions: set[tuple[int, int]] = field(default_factory=set)
    without_target: int = 0
    columns: dict[str, list[Any]] = field(default_factory=dict)
    counts: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, batch: dict[str, Any], logits: Tensor, output: Any, rules: Protocol, no_target_pixels: int) -> None:
        """Add a batch.

        Args:
            batch: the batch, on the device of the logits.
            logits: (B, 2, H, W), without NaN.
            output: the model's output that they come from.
            rules: the protocol.
            no_target_pixels: as in `fastkd.evaluate.evaluate`.

        Raises:
            ValueError: the protocol needs ``no_target`` of each sample, and the batch has none.
        """
        head = None
        self.decision = rules.decision
        self.resolutions.add((logits.shape[2], logits.shape[3]))
        if rules.no_target:
            if "no_target" not in batch:
                raise ValueError(
                    f"the samples have no key 'no_target', which protocol {rules.name!r} needs: a bool, True for a "
                    "sentence that refers to nothing in the image, as a ReferDataset gives it"
                )
            head = head_decision(output, len(logits))
            rule = "by the model's head" if head is not None else f"below {no_target_pixels} pixels"
            self.decision += f", no target {rule}"
        found, target, predicted = count_batch(logits, batch, rules, head, no_target_pixels)
        values = (found.intersections, found.unions, target, predicted, found.no_target, found.predicted_no_target)
        for name, value in zip(_PIXELS + _FLAGS, values, strict=True):
            if value is not None:
                self.counts.setdefault(name, []).append(value)
        self.without_target += int(torch.as_tensor(batch.get("no_target", 0)).sum())
        for name in _COLUMNS:
            if name in batch:
                column = batch[name]
                self.columns.setdefault(name, []).extend(column.tolist() if isinstance(column, Tensor) else column)

    def records(self) -> list[tuple[int, dict[str, Any]]]:
        """Return the index and the record of each sample.

        Raises:
            ValueError: some samples have a key that others lack.
        """
        columns = {**self.columns, **{name: torch.cat(parts).tolist() for name, parts in self.counts.items()}}
        count = len(columns.get(_PIXELS[0], ()))
        partial = [f"{len(values)} have {name!r}" for name, values in columns.items() if len(values) != count]
        if partial:
            raise ValueError(f"of {count} samples, {', '.join(partial)}: give every sample these keys, or none")
        rows = zip(*columns.values(), strict=True) if columns else ()
        return [(index, dict(zip(columns, row, strict=True))) for index, row in zip(self.indices, rows, strict=False)]


def ranks() -> tuple[int, int]:
    """Return the number of this process and the number of processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@dataclass
class Merged:
    """The samples of all processes.

    Attributes:
        failure: that of the first process that has one, or "".
        decision: rule that turned logits into masks.
        resolution: (H, W) of the logits; None if they have several sizes.
        without_target: number of sentences that have no target.
        samples: the record of each sample, in dataset order.
    """

    failure: str
    decision: str
    resolution: tuple[int, int] | None
    without_target: int
    samples: list[dict[str, Any]]

    def counts(self) -> Counts:
        """Return the counts of all samples, on the CPU."""

        def column(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([sample[name] for sample in self.samples], dtype=dtype, device="cpu")

        pixels = [column(name, torch.int64) for name in _PIXELS[:2]]
        return Counts(*pixels, *(column(name, torch.bool) for name in _FLAGS if name in self.samples[0]))

    def set_iou(self, counts: Counts, rules: Protocol) -> Tensor:
        """Add the IoU to each record, and return all: (samples,) float64."""
        iou = sample_iou(counts, rules)
        for sample, value in zip(self.samples, iou.tolist(), strict=True):
            sample["iou"] = value
        return iou


def merge(share: Share) -> Merged:
    """Return the samples of all processes; a collective call."""
    own = (share.failure, share.decision, share.resolutions, share.without_target, share.records())
    shares = [own] * ranks()[1]
    if len(shares) > 1:
        torch.distributed.all_gather_object(shares, own)
    failures, decisions, resolutions, without, records = zip(*shares, strict=True)
    sizes = set().union(*resolutions)
    return Merged(
        failure=next(filter(None, failures), ""),
        decision=next(filter(None, decisions), ""),  # a process without samples has none
        resolution=sizes.pop() if len(sizes) == 1 else None,
        without_target=sum(without),
        samples=[record for _, record in sorted((pair for part in records for pair in part), key=lambda pair: pair[0])],
    )

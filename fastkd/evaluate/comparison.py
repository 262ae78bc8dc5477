"""Compare two evaluations sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastkd._messages import shortened
from fastkd.evaluate.bootstrap import PairedDifference, paired_bootstrap
from fastkd.evaluate.protocols import THRESHOLDS, protocol
from fastkd.evaluate.result import EvalResult
from fastkd.evaluate.samples import SampleScores, describe_id

_COMPARED = ("dataset", "split_by", "split", "protocol", "resolution", "threshold", "mask_rule")
_OF_THE_SET = ("sentence", "no_target", "target_pixels")  # equal in two evaluations of the same samples


@dataclass(frozen=True)
class Comparison:
    """Difference between two evaluations of the same samples, in percentage points.

    Attributes:
        against: source of the other scores.
        sentences: number of paired sentences.
        unit: what the bootstrap draws: "images" if the samples have image_id, else "refs", else "sentences".
        oiou: difference in oIoU, a ratio of sums, which has no interval here.
        differences: differences in mIoU and P@X (under "gres" also N-acc and T-acc) with their intervals; the
            ``samples`` of each is the number of units drawn.
    """

    against: str
    sentences: int
    unit: str
    oiou: float
    differences: dict[str, PairedDifference]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return {
            "against": self.against,
            "sentences": self.sentences,
            "unit": self.unit,
            "oIoU": self.oiou,
            "differences": {name: asdict(difference) for name, difference in self.differences.items()},
        }

    def __str__(self) -> str:
        mean = self.differences["mIoU"]
        lines = [
            f"difference from {self.against}, {self.sentences} paired sentences, {100 * mean.confidence:g} % intervals "
            f"of a paired bootstrap over {mean.samples} {self.unit}:",
            f"  oIoU   {self.oiou:+.2f} (no interval)",
            *(f"  {name:<5}  {difference}" for name, difference in self.differences.items()),
        ]
        return "\n".join(lines)


def compare(
    ours: EvalResult | SampleScores,
    theirs: EvalResult | SampleScores,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Return how much higher ``ours`` scores than ``theirs``, with intervals of a paired bootstrap over images.

    Samples are matched by ref_id and sent_id. Both evaluations must be of the same set, split, protocol, resolution
    and mask rule, and of the same samples with equal sentences and true masks.

    The sentences of an image are not independent: refs share the image, and sentences the mask of a ref. So
    `paired_bootstrap` draws images.

    Args:
        ours: what `evaluate` or `read_samples` returned.
        theirs: the scores to compare with, likewise.
        resamples: number of resamples.
        confidence: coverage of the intervals, between 0 and 1.
        seed: seed of the resampling.

    Raises:
        ValueError: the evaluations are not of the same samples under the same conditions; the message names the first
            difference.

    Example:
        >>> print(compare(evaluate(student, val_set), read_samples("alone.jsonl")))
    """
    ours, theirs = (one if isinstance(one, SampleScores) else SampleScores.of(one) for one in (ours, theirs))
    check_conditions(ours.conditions, theirs, ours.source)
    _check_samples(ours, theirs)
    pairs = [(sample, theirs.samples[key]) for key, sample in ours.samples.items()]
    rules = protocol(ours.conditions["protocol"])
    unit, owner = units_of([*ours.samples.values()])  # (samples,)
    everywhere = np.ones(len(pairs), dtype=bool)
    iou = _columns(pairs, "iou")  # (2, samples)
    targeted, measures = everywhere, {"mIoU": (iou, everywhere)}
    if rules.no_target:
        targeted = ~_columns(pairs, "no_target")[0].astype(bool)
    measures |= {f"P@{x}": (iou > x if rules.strict else iou >= x, targeted) for x in THRESHOLDS}
    if rules.no_target:
        predicted = _columns(pairs, "predicted_no_target")
        measures |= {"N-acc": (predicted, ~targeted), "T-acc": (1 - predicted, targeted)}
    differences = {}
    for name, (values, chosen) in measures.items():
        if chosen.any():
            mine, other = (100.0 * each[chosen] for each in values)
            differences[name] = paired_bootstrap(
                mine, other, groups=owner[chosen], resamples=resamples, confidence=confidence, seed=seed
            )
    oiou = 100 * (_overall(pairs, 0) - _overall(pairs, 1))
    return Comparison(theirs.source, len(pairs), unit, oiou, differences)


def check_conditions(conditions: Mapping[str, Any], theirs: SampleScores, source: str = "this evaluation") -> None:
    """Raise ``ValueError`` unless the given conditions equal those of other scores."""
    for name in _COMPARED:
        if name in conditions and conditions[name] != theirs.conditions[name]:
            raise ValueError(
                f"{theirs.source} has {name} {theirs.conditions[name]!r}, but {source} {conditions[name]!r}: scores "
                "are comparable only on the same set and split under the same protocol; evaluate both models alike"
            )


def _check_samples(ours: SampleScores, theirs: SampleScores) -> None:
    """Raise ``ValueError`` unless both have the same samples, with the same sentences and numbers of true pixels."""
    for one, other in ((ours, theirs), (theirs, ours)):
        missing = [describe_id(key) for key in one.samples if key not in other.samples]
        if missing:
            raise ValueError(
                f"{other.source} lacks {len(missing)} of the {len(one.samples)} samples of {one.source}: "
                f"{shortened(missing)}; evaluate both models on the same set"
            )
    for key, sample in ours.samples.items():
        other_sample = theirs.samples[key]
        for name in _OF_THE_SET:
            mine, other_value = sample.get(name), other_sample.get(name)
            if mine != other_value and None not in (mine, other_value):
                raise ValueError(
                    f"{describe_id(key)} has {name} {mine!r} in {ours.source}, but {other_value!r} in {theirs.source}: "
                    "these are different sets, or one has changed; evaluate both models on the same set"
                )


def units_of(samples: Sequence[Mapping[str, Any]]) -> tuple[str, np.ndarray]:
    """Return what the bootstrap draws, and the number of the unit of each sample, (samples,).

    Units are numbered from 0 as they first occur.
    """
    for unit, name in (("images", "image_id"), ("refs", "ref_id")):
        if all(sample.get(name) is not None for sample in samples):
            numbers: dict[str, int] = {}
            owner = [numbers.setdefault(str(sample[name]), len(numbers)) for sample in samples]
            return unit, np.array(owner)
    return "sentences", np.arange(len(samples))


def _columns(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], name: str) -> np.ndarray:
    """Return a field of both evaluations, (2, samples) float64."""
    return np.array([[each[name] for each in pair] for pair in pairs], dtype=np.float64).T


def _overall(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], which: int) -> float:
    """Return ΣI / ΣU."""
    return float(
        sum(pair[which]["intersection"] for pair in pairs) / max(sum(pair[which]["union"] for pair in pairs), 1)
    )

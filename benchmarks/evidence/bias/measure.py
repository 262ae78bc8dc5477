"""Bias of a student and the share of the teacher's that a loss hands on, with intervals over seeds and images.

The bias of a model, in percent, is the mean of a score per sentence:

colours   1 if the prediction overlaps the shape of the other colour more than the target, else 0
left      the same with the leftmost shape
blind     IoU of an untouched sentence − IoU of a sentence about a star

Only the mean of the last one matters: sentences of the two splits are paired as they come. Both splits are random
draws of equal size, one sentence per image, so resampling the pairs has the same variance as resampling each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.evidence.bias.scenes import SPLIT_OF_ROLE
from fastkd.cli._grid.records import decode_iou
from fastkd.evaluate import PairedDifference, paired_bootstrap

Array = npt.NDArray[np.float64]
BIASES = ("colours", "left", "blind")
BIASED, CONTROL, TEACHER, ALONE = "biased teacher", "control teacher", "teacher", "alone"

Key = tuple[str, str, float]
"""Setting, row and factor."""


@dataclass(frozen=True)
class Scores:
    """Results of one row with one factor: a record by seed and split."""

    by_seed: Mapping[int, Mapping[str, Mapping[str, Any]]]

    def seeds(self) -> set[int]:
        """Return the seeds with results on all splits."""
        return {seed for seed, found in self.by_seed.items() if set(SPLIT_OF_ROLE.values()) <= set(found)}

    def iou(self, role: str, seeds: Sequence[int]) -> Array:
        """Return the IoU with targets in percent, (seeds, sentences of the role)."""
        return self._decoded("iou", role, seeds)

    def bias(self, name: str, seeds: Sequence[int]) -> Array:
        """Return the score of a bias per sentence in percent, (seeds, sentences)."""
        own = self.iou(name, seeds)
        if name == "blind":
            return self.iou("untouched", seeds) - own
        return 100.0 * (self._decoded("other", name, seeds) > own)

    def _decoded(self, key: str, role: str, seeds: Sequence[int]) -> Array:
        return np.array([100 * decode_iou(self.by_seed[seed][SPLIT_OF_ROLE[role]][key]) for seed in seeds])


def group(records: Sequence[Mapping[str, Any]]) -> dict[Key, Scores]:
    """Return the results by setting, row and factor, of seeds with all splits."""
    found: dict[Key, dict[int, dict[str, Mapping[str, Any]]]] = {}
    for r in records:
        key = (r["setting"], r["row"], r["scale"])
        found.setdefault(key, {}).setdefault(r["seed"], {})[r["split"]] = r
    scores = {key: Scores(by_seed) for key, by_seed in found.items()}
    return {key: one for key, one in scores.items() if one.seeds()}


def gain(scores: Scores, alone: Scores, resamples: int = 10_000) -> PairedDifference | None:
    """Return the gain in mIoU over the student alone on untouched sentences; None without a common seed."""
    seeds = sorted(scores.seeds() & alone.seeds())
    if not seeds:
        return None
    return paired_bootstrap(scores.iou("untouched", seeds), alone.iou("untouched", seeds), resamples=resamples)


def mean_bias(scores: Scores) -> dict[str, float]:
    """Return the mean bias of models, by name."""
    seeds = sorted(scores.seeds())
    return {name: float(scores.bias(name, seeds).mean()) for name in BIASES}


@dataclass(frozen=True)
class Comparison:
    """Students of the biased teacher, and students with the same seeds that cannot have its bias.

    Args:
        students: of the biased teacher.
        reference: of the control teacher with the same loss, or the student alone.
        teacher: mean biases of the biased teacher.
        nothing: mean biases that count as nothing handed on: of the control teacher, or of the student alone.

    Raises:
        ValueError: the teacher has not more of a bias than that, so no share of it is defined.
    """

    students: Scores
    reference: Scores
    teacher: Mapping[str, float]
    nothing: Mapping[str, float]

    def __post_init__(self) -> None:
        for name in BIASES:
            if self.teacher[name] <= self.nothing[name]:
                raise ValueError(
                    f"the biased teacher has no more of the bias {name!r} ({self.teacher[name]:.1f}) than models "
                    f"without it ({self.nothing[name]:.1f}): train it longer on the biased set"
                )

    def seeds(self) -> list[int]:
        """Return the common seeds."""
        return sorted(self.students.seeds() & self.reference.seeds())

    def shares(self, biases: Sequence[str] = BIASES, seeds: Sequence[int] | None = None) -> Array:
        """Return the share of the teacher's bias that students have, in percent, (seeds, sentences).

        It is (student − reference) / (teacher − nothing), averaged over biases.
        """
        seeds = self.seeds() if seeds is None else seeds
        each = [
            (self.students.bias(name, seeds) - self.reference.bias(name, seeds))
            / (self.teacher[name] - self.nothing[name])
            for name in biases
        ]
        return np.asarray(100 * np.mean(each, axis=0))

    def handed_on(self, biases: Sequence[str] = BIASES, resamples: int = 10_000) -> PairedDifference | None:
        """Return the mean share, with an interval over seeds and images of students; None without a common seed."""
        if not self.seeds():
            return None
        shares = self.shares(biases)
        return paired_bootstrap(shares, np.zeros_like(shares), resamples=resamples)


def at_equal_gain(
    first: Sequence[tuple[Array, Array]], second: Sequence[tuple[Array, Array]], resamples: int = 10_000
) -> tuple[float, PairedDifference] | None:
    """Return a gain that two rows share, and how much more of the bias the first hands on there.

    Each row is a list of points, one per factor: gains and shares handed on, (seeds, sentences) each, with the same
    seeds in all. Between points, the share is interpolated linearly; the gain is the middle of the common range, and
    None is returned without one. Resamples draw seeds, then sentences, as `paired_bootstrap`; each interpolates again.
    """
    rng = np.random.default_rng(0)
    seeds, sentences = first[0][0].shape
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    of_sentences = rng.multinomial(sentences, np.full(sentences, 1 / sentences), resamples) / sentences
    weights = [(np.full((1, seeds), 1 / seeds), np.full((1, sentences), 1 / sentences)), (of_seeds, of_sentences)]

    def means(values: Array, drawn: tuple[Array, Array]) -> Array:
        return np.asarray(((drawn[0] @ values) * drawn[1]).sum(1))

    def curve(points: Sequence[tuple[Array, Array]], drawn: tuple[Array, Array]) -> Array:
        return np.array([[means(one, drawn) for one in point] for point in points])  # (points, 2, resamples)

    curves = [[curve(points, drawn) for points in (first, second)] for drawn in weights]
    low = max(float(one[:, 0].min()) for one in curves[0])
    high = min(float(one[:, 0].max()) for one in curves[0])
    if low > high:
        return None
    gain_of_both = (low + high) / 2
    mean, drawn = (_interpolated(gain_of_both, pair[0]) - _interpolated(gain_of_both, pair[1]) for pair in curves)
    edges = np.quantile(drawn, [0.025, 0.975])
    return gain_of_both, PairedDifference(float(mean[0]), float(edges[0]), float(edges[1]), 0.95, seeds, sentences)


def _interpolated(gain_of_both: float, curve: Array) -> Array:
    """Return the share at a gain for every resample, from a (points, 2, resamples) curve; constant beyond its ends."""
    order = np.argsort(curve[:, 0], axis=0)
    gains, shares = (np.take_along_axis(curve[:, k], order, 0) for k in (0, 1))
    return np.array([np.interp(gain_of_both, g, s) for g, s in zip(gains.T, shares.T, strict=True)])

"""The paired bootstrap against a literal loop, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastkd.evaluate import bootstrap, paired_bootstrap


def scores(seeds: int, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((seeds, samples)), rng.random((seeds, samples))


def literal(ours: np.ndarray, theirs: np.ndarray, resamples: int, seed: int) -> list[float]:
    """Draw seeds, then samples, one after the other."""
    seeds, samples = ours.shape
    of_seeds, of_samples = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    found = []
    for _ in range(resamples):
        rows = [int(of_seeds.integers(0, seeds)) for _ in range(seeds)]
        columns = [int(of_samples.integers(0, samples)) for _ in range(samples)]
        total = 0.0
        for row in rows:
            for column in columns:
                total += ours[row, column] - theirs[row, column]
        found.append(total / (seeds * samples))
    return found


@pytest.mark.parametrize(("seeds", "samples"), [(1, 1), (1, 7), (3, 11), (5, 1)])
@pytest.mark.parametrize("values", [1, 40, 1 << 22])  # several chunks, with a shorter last one, and one
def test_equals_a_literal_loop(monkeypatch, seeds, samples, values):
    monkeypatch.setattr(bootstrap, "_VALUES", values)
    ours, theirs = scores(seeds, samples)
    found = paired_bootstrap(ours, theirs, resamples=31, confidence=0.8, seed=4)
    expected = literal(ours, theirs, 31, 4)
    assert found.mean == pytest.approx((ours - theirs).mean(), abs=1e-15)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(expected, [0.1, 0.9])), abs=1e-14)
    assert (found.seeds, found.samples, found.confidence) == (seeds, samples, 0.8)


def test_interval_covers_both_seeds_and_samples():
    rng = np.random.default_rng(1)
    of_seed, of_sample = rng.normal(size=(200, 1)), rng.normal(size=(1, 400))
    found = paired_bootstrap(3 + of_seed + of_sample, np.zeros((200, 400)), resamples=2000)
    width = 2 * 1.96 * np.hypot(of_seed.std() / 200**0.5, of_sample.std() / 400**0.5)
    assert found.high - found.low == pytest.approx(width, rel=0.08)
    alone = paired_bootstrap((3 + of_sample)[0], np.zeros(400), resamples=2000)  # one seed: samples only
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * of_sample.std() / 400**0.5, rel=0.08)


def test_pairs_cancel_what_seeds_and_samples_share():
    shared = np.random.default_rng(2).random((4, 50))
    found = paired_bootstrap(shared + 0.25, shared, resamples=50)
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-14)


def test_seed_determines_the_result_and_tensors_are_accepted():
    ours, theirs = map(torch.tensor, scores(2, 30))
    first, again, other = (paired_bootstrap(ours, theirs, resamples=60, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert paired_bootstrap(ours.float(), theirs.half(), resamples=2).mean == pytest.approx(first.mean, abs=1e-3)
    assert str(paired_bootstrap([1.0, 3.0], [0.0, 0.0], resamples=1, seed=3)).startswith("+2.00 [")


def test_groups_are_drawn_as_the_residuals_of_a_ratio():
    ours, theirs = scores(3, 12)
    names = [*"caabbacbbbda"]  # d has one sample
    found = paired_bootstrap(ours, theirs, groups=names, resamples=31, seed=4)
    difference = ours - theirs
    values = np.empty((3, 4))
    for seed in range(3):
        mean = difference[seed].mean()
        for place, name in enumerate("cabd"):
            own = [d for d, group in zip(difference[seed], names, strict=True) if group == name]
            values[seed, place] = mean + 4 / 12 * (sum(own) - len(own) * mean)
    expected = np.quantile(literal(values, np.zeros_like(values), 31, 4), [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-14)
    assert found.mean == pytest.approx(difference.mean(), abs=1e-15)
    assert (found.seeds, found.samples) == (3, 4)
    each = paired_bootstrap(ours, theirs, groups=range(12), resamples=31)
    plain = paired_bootstrap(ours, theirs, resamples=31)
    assert (each.low, each.high, each.samples) == (pytest.approx(plain.low), pytest.approx(plain.high), 12)


def test_samples_that_agree_within_a_group_count_once():
    of_group = np.random.default_rng(3).normal(size=(1, 100))
    repeated = np.repeat(of_group, 9, 1)  # neither more nor less is known than from one sample each
    found = paired_bootstrap(repeated, np.zeros((1, 900)), groups=np.repeat(range(100), 9), resamples=500)
    once = paired_bootstrap(of_group, np.zeros((1, 100)), resamples=500)
    assert (found.low, found.high) == pytest.approx((once.low, once.high))


@pytest.mark.parametrize(
    ("ours", "theirs", "options", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4)), {}, r"same shape, got \(2, 3\) and \(2, 4\)"),
        (np.zeros((1, 3)), np.zeros((2, 3)), {}, "same shape"),
        (np.zeros((2, 3, 1)), np.zeros((2, 3, 1)), {}, r"ours must be .* got \(2, 3, 1\)"),
        ([], [], {}, "at least one score"),
        ([1.0, 2.0], [1.0, np.nan], {}, "theirs must hold finite scores, got nan at seed 0, sample 1"),
        ([np.inf, 1.0], [1.0, 1.0], {}, "ours must hold finite scores, got inf at seed 0, sample 0"),
        ([1.0, 2.0], [1.0, 2.0], {"groups": [0]}, r"groups must be \(2,\), the group of each sample.* got \(1,\)"),
        (np.zeros((2, 2)), np.zeros((2, 2)), {"groups": np.zeros((2, 2))}, r"groups must be \(2,\).* got \(2, 2\)"),
        ([1.0], [1.0], {"resamples": 0}, "resamples must be an integer >= 1, got 0"),
        ([1.0], [1.0], {"resamples": True}, "resamples must be an integer >= 1, got True"),
        ([1.0], [1.0], {"confidence": 1.0}, "confidence must be between 0 and 1"),
        ([1.0], [1.0], {"confidence": float("nan")}, "confidence must be between 0 and 1"),
    ],
)
def test_bad_input_is_refused(ours, theirs, options, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(ours, theirs, **options)

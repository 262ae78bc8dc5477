"""Mixtures of datasets: samples per epoch, order, epochs, names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from refcoco_files import write_set
from stream_tools import Words
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from fastkd.data import MixedDataset, RefCOCO, ReferDataset
from fastkd.data._nested import named_sets


class Numbers(Dataset[dict[str, Any]]):
    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, -1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"number": index}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def epoch_of(mixed: MixedDataset, epoch: int) -> list[tuple[str, int]]:
    mixed.set_epoch(epoch)
    return [(mixed[n]["dataset"], mixed[n]["number"]) for n in range(len(mixed))]


def test_without_weights_an_epoch_has_every_sample_once() -> None:
    mixed = MixedDataset({"a": Numbers(5), "b": Numbers(3)})
    expected = sorted([("a", n) for n in range(5)] + [("b", n) for n in range(3)])
    assert [sorted(epoch_of(mixed, epoch)) for epoch in range(2)] == [expected, expected]
    assert mixed.summary() == "a 5 of 5, b 3 of 3"


@pytest.mark.parametrize(("size", "epochs"), [(2, 10), (7, 5), (12, 5)])
def test_sizes_read_every_sample_equally_often(size: int, epochs: int) -> None:
    mixed = MixedDataset({"a": Numbers(5), "b": Numbers(3)}, sizes={"a": size})
    read = [sample for epoch in range(epochs) for sample in epoch_of(mixed, epoch)]
    counts = Counter(number for name, number in read if name == "a")
    assert sum(counts.values()) == size * epochs
    assert set(counts.values()) == {size * epochs // 5}
    assert len(mixed) == size + 3


def test_weights_are_passes_per_epoch() -> None:
    mixed = MixedDataset({"a": Numbers(10), "b": Numbers(4)}, weights={"a": 0.25, "b": 2})
    assert mixed.summary() == "a 2 of 10, b 8 of 4"
    assert Counter(number for name, number in epoch_of(mixed, 3) if name == "b") == dict.fromkeys(range(4), 2)


def test_the_order_follows_from_seed_and_epoch() -> None:
    first, second, other = (
        MixedDataset({"a": Numbers(50), "b": Numbers(9)}, sizes={"a": 20}, seed=seed) for seed in (1, 1, 2)
    )
    resumed = epoch_of(second, 4)
    assert [epoch_of(first, epoch) for epoch in range(5)][4] == resumed
    assert epoch_of(other, 4) != resumed


def test_persistent_workers_see_the_epoch() -> None:
    mixed = MixedDataset({"a": Numbers(6)}, sizes={"a": 3})
    loader = DataLoader(mixed, batch_size=3, num_workers=1, persistent_workers=True)
    batches: list[int] = []
    for epoch in range(2):
        mixed.set_epoch(epoch)
        batches += next(iter(loader))["number"].tolist()
    assert sorted(batches) == list(range(6))
    assert mixed.datasets["a"].epoch == 1  # type: ignore[attr-defined]


def test_sets_are_named_for_the_log(tmp_path: Path) -> None:
    refcoco = ReferDataset(RefCOCO(write_set(tmp_path)), Words(), image_size=8)
    assert named_sets(refcoco) == {"refcoco train": 2}
    assert named_sets(MixedDataset({"a": refcoco, "b": Numbers(3)}, sizes={"b": 9})) == {"a": 2, "b": 9}
    parts = ConcatDataset([refcoco, Subset(refcoco, [0]), Numbers(3)])
    assert named_sets(parts) == {"refcoco train": 2, "Numbers": 3}


def test_names_samples_and_rejects_bad_arguments() -> None:
    mixed = MixedDataset({"a": Numbers(1), "b": Numbers(1)})
    assert mixed.describe(1) == "b, sample 0"
    with pytest.raises(IndexError, match="the mixture has 2 samples per epoch"):
        mixed[2]
    with pytest.raises(ValueError, match="needs at least one dataset"):
        MixedDataset({})
    with pytest.raises(ValueError, match="dataset 'a' is empty"):
        MixedDataset({"a": Numbers(0)})
    with pytest.raises(ValueError, match="weights names 'c', which is not among the datasets: 'a'"):
        MixedDataset({"a": Numbers(1)}, weights={"c": 1})
    for options in (
        {"weights": {"a": 0}},
        {"sizes": {"a": 1.5}},
        {"sizes": {"a": True}},
        {"weights": {"a": float("nan")}},
    ):
        with pytest.raises(ValueError, match=r"of 'a' must be a positive (number|integer), got"):
            MixedDataset({"a": Numbers(1)}, **options)  # type: ignore[arg-type]

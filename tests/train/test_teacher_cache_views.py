"""Random augmentation in a fixed number of views, cached."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_cache_tools import build, make
from torch.utils.data import IterableDataset, Subset
from train_tools import Scenes, run, same

from fastkd.train import AugmentedViews, TeacherCache


def noisy(sample: dict[str, Any]) -> dict[str, Any]:
    scale = 0.8 + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002
    return {**sample, "image": sample["image"] * scale + 0.1 * torch.randn(3, 8, 8)}


def views(number: int = 2, seed: int = 0, data: Any = None) -> AugmentedViews:
    return AugmentedViews(data or Scenes(), noisy, views=number, seed=seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("views") / "cache"
    assert len(build(path, data=views().all())) == 64
    return path


def test_training_equals_the_teacher_online_bit_for_bit(folder: Path) -> None:
    """Ten steps of four per epoch: both views, and the first one again."""
    online, cached, plain = make(), make(TeacherCache(folder)), make()
    run(online, views(), steps=10)
    run(cached, views(), steps=10)
    run(plain, steps=10)
    assert same(online.student, cached.student)
    assert not same(online.student, plain.student)


def test_a_view_depends_on_seed_view_and_ref_only() -> None:
    one, other = views(), views(data=Subset(Scenes(), [5, 3]))
    state = torch.get_rng_state(), random.getstate()
    first = one[5]["image"]
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    torch.manual_seed(7)
    assert torch.equal(one[5]["image"], first)
    assert torch.equal(other[0]["image"], first)
    assert torch.equal(one.all()[5]["image"], first)
    one.set_epoch(3)
    assert one.dataset.epochs == [3]
    second = one[5]["image"]
    assert torch.equal(second, one.all()[32 + 5]["image"])
    assert torch.equal(second, one.sample(5, 1)["image"])
    assert not torch.equal(second, first)
    assert not torch.equal(views(seed=1)[5]["image"], first)
    assert one.describe(5) == "view 1"


@pytest.mark.parametrize("data", [lambda: views(3), lambda: views(seed=1), lambda: Subset(views(3), range(32))])
def test_views_that_are_not_cached_are_refused_before_the_first_step(data: Any, folder: Path) -> None:
    student, samples = make(TeacherCache(folder)), data()
    before = copy.deepcopy(student.student)
    with pytest.raises(
        ValueError, match=r"no cached sample has its image: .* in views \(AugmentedViews\) that were not"
    ):
        run(student, samples)
    assert same(before, student.student)
    assert (samples.dataset if isinstance(samples, Subset) else samples).epoch == 0


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda path: build(path, data=views()), r"AugmentedViews, which serves one view per epoch: cache its all\(\)"),
        (lambda path: views(0), "views must be an integer of at least 1, got 0"),
        (lambda path: views(data=Stream()), "dataset is a Stream, read in sequence: views need samples by index"),
    ],
)
def test_refused(action: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        action(tmp_path / "c")

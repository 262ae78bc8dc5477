"""Settings, optimiser groups, learning-rate schedule and order of samples."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="needs the [ris] extra")

from train_tools import Toy

from fastkd.train import TrainConfig
from fastkd.train.optim import BatchOrder, adamw, lr_factor
from fastkd.train.seeding import kept_generators, seed_sample, seed_step


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer >= 1, got 2.5"),
        ({"lr": 0}, "lr must be a finite number > 0, got 0"),
        ({"lr": None}, "lr must be a finite number > 0, got None"),
        ({"grad_clip": -1.0}, "grad_clip must be a finite number > 0 or None"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number >= 0"),
        ({"precision": "fp8"}, "precision must be 'auto', 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        ({"batch_size": 10, "accumulate": 4}, "batch_size must be a multiple of accumulate"),
        ({"lr": "0.1"}, "lr must be a finite number > 0, got '0.1'"),
        ({"weight_decay": None}, "weight_decay must be a finite number >= 0, got None"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"eval_every": 0}, "eval_every must be an integer >= 1 or None"),
    ],
)
def test_rejects_values_out_of_range(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)


def test_learning_rate_schedule() -> None:
    config = TrainConfig(steps=100, warmup=4, power=0.9)
    factors = [lr_factor(step, step / 100, config) for step in range(100)]
    assert factors[:4] == pytest.approx([(s + 1) / 5 * (1 - s / 100) ** 0.9 for s in range(4)])
    assert factors[50] == pytest.approx(0.5**0.9)
    assert 0 < factors[99] < 0.02


def test_norms_biases_and_tables_are_not_decayed() -> None:
    model = Toy()
    decayed, others = adamw(model, TrainConfig(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(model.stem.weight), id(model.head.weight)}
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in others["params"]} == {
        "stem.bias",
        "norm.weight",
        "norm.bias",
        "words.weight",
        "head.bias",
    }


def test_processes_and_micro_batches_split_the_same_order() -> None:
    config = TrainConfig(batch_size=8, seed=3)
    whole = list(BatchOrder(40, config))
    split = TrainConfig(batch_size=8, accumulate=2, seed=3)
    ranks = [list(BatchOrder(40, split, rank, 2)) for rank in range(2)]
    for step, batch in enumerate(whole):
        parts = [ranks[rank][2 * step + micro] for micro in range(2) for rank in range(2)]
        assert [i for part in parts for i in part] == batch
    assert len(BatchOrder(40, split)) == len(ranks[0]) == 10


def test_order_of_large_seeds() -> None:
    seeds = (0, 1, 2**63 - 1, -3)
    orders = [list(BatchOrder(40, TrainConfig(batch_size=8, seed=seed))) for seed in seeds]
    assert len({str(order) for order in orders}) == len(seeds)


@pytest.mark.parametrize(("seed_with", "arguments"), [(seed_step, (0, 1, 2, 3)), (seed_sample, (0, 1, 2))])
def test_random_numbers_depend_on_every_argument(seed_with: Callable[..., None], arguments: tuple[int, ...]) -> None:
    def draws(changed: tuple[int, ...]) -> tuple[float, ...]:
        seed_with(*changed)
        return torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002 (users' modules draw from it)

    neighbours = [(*arguments[:i], arguments[i] + 1, *arguments[i + 1 :]) for i in range(len(arguments))]
    with kept_generators():
        assert draws(arguments) == draws(arguments)
        for drawn in zip(draws(arguments), *map(draws, neighbours), strict=True):
            assert len(set(drawn)) == len(arguments) + 1

"""The examples in the losses' docstrings run and return a loss that trains the student."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import nn

from fastkd import losses

B, H, W, T, N = 4, 6, 6, 5, 36
WIDTHS = {"ChannelDistributionKD": (64, 256), "FeatureKD": (128, 512)}  # stated in the example
NAMES = [name for name in losses.__all__ if name != "DEFAULT_TERMS"]


def names(student_width: int, teacher_width: int) -> dict[str, Any]:
    """Return the names that the examples use."""
    rand = torch.randn
    found = {
        "student": nn.Conv2d(3, 8, 1),
        "teacher": nn.Conv2d(3, 8, 1),
        "aligner": nn.Conv2d(student_width, teacher_width, 1),
        "x": rand(B, 3, H, W),
        "labels": torch.randint(8, (B, H, W)),
        "targets": torch.randint(10, (B, T)),
        "tokens": torch.randint(5, (B, N)),
        "pad": -1,
        "image": rand(B, 3, H, W),
        "words": rand(B, T, 8),
        "word_mask": torch.arange(T) < torch.tensor([[5], [4], [3], [2]]),
        "student_map": rand(B, student_width, H, W),
        "teacher_map": rand(B, teacher_width, H, W),
        "teacher_taps": lambda image, words: (rand(B, N, 8), words),
    }
    for side, width in (("s", 6), ("t", 12)):
        found |= {f"q_{side}": rand(B, 2, N, width), f"k_{side}": rand(B, 2, N, width)}
        found |= {f"v_{side}": rand(B, N, 8), f"l_{side}": rand(B, T, 8), f"m_{side}": rand(B, N, T)}
        found[f"words_{side}"] = rand(B, T, 10)
    for name in ("student_map", "q_s", "v_s", "m_s", "words_s"):
        found[name].requires_grad_()
    return found | {"torch": torch} | {name: getattr(losses, name) for name in losses.__all__}


@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name: str) -> None:
    torch.manual_seed(0)
    given = names(*WIDTHS.get(name, (8, 8)))
    examples = doctest.DocTestParser().get_examples(getattr(losses, name).__doc__)
    assert examples
    for example in examples:
        exec(example.source, given)
        if example.source.startswith("loss ="):
            assert given["loss"].isfinite()
            given["loss"].backward()
    assert "loss" in given

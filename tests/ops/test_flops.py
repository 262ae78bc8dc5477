"""FLOP of the operators, as ``torch.utils.flop_counter`` counts them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_cases import ALL_TERMS, Place
from gpu_kernels import require_backend
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastkd import losses

KERNELS = ["cpu", "triton", "cuda"]
B, C, H, W, N = 2, 6, 5, 8, 40
D, T = 12, 5
MAPS = [(B, C, H, W), (B, C, H, W)]
UNEQUAL = [(B, C, H, W), (B, 10, H, W)]
FEATURES = [(B, N, D), (B, T, D), (B, N, 7), (B, T, 7)]
LOGITS = [(B, N, T), (B, N, T)]


def counts(loss: Callable[..., Tensor], shapes: list[tuple[int, ...]], backend: str, **options: Any) -> tuple[int, int]:
    """Return the FLOP of a forward and of its backward."""
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(shape, generator=generator) for shape in shapes]
    own = [x.requires_grad_() for x in args[: len(args) // 2]]
    with FlopCounterMode(display=False) as forward:
        value = loss(*args, backend=backend, **options)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(value, own)
    return forward.get_total_flops(), backward.get_total_flops()


LOGIT_PRODUCTS = 2 * B * N * T * (D + 7)
GRADIENT_PRODUCTS = 2 * (2 * B * N * T * D)  # of pixels and words
WORDS_SQUARED = 2 * B * N * T * T


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("loss", "shapes", "options", "forward", "backward"),
    [
        (losses.channel_distribution_kd, MAPS, {}, 0, 0),
        (losses.channel_kd, MAPS, {}, 4 * B * C * C * N, 2 * B * C * C * N),  # relations are stored
        (losses.pixel_relation_kd, MAPS, {}, 4 * B * N * N * C, 6 * B * N * N * C),
        (losses.pixel_relation_kd, UNEQUAL, {}, 2 * B * N * N * 16, 2 * B * N * N * 22),
        (losses.pixel_relation_kd, UNEQUAL, {"cross_image": True}, 2 * (B * N) ** 2 * 16, 2 * (B * N) ** 2 * 22),
        (losses.cross_modal_kd, FEATURES, {"terms": ALL_TERMS}, LOGIT_PRODUCTS + 3 * WORDS_SQUARED,
         GRADIENT_PRODUCTS + 2 * WORDS_SQUARED),
        (losses.cross_modal_kd, FEATURES, {"terms": {"pixel_to_word": 1.0}}, LOGIT_PRODUCTS, GRADIENT_PRODUCTS),
        (losses.cross_modal_kd_from_logits, LOGITS, {"terms": {"word_word": 1.0}}, 3 * WORDS_SQUARED, WORDS_SQUARED),
    ],
)  # fmt: skip
def test_every_backend_counts_the_same_products(
    loss: Callable[..., Tensor],
    shapes: list[tuple[int, ...]],
    options: dict[str, Any],
    forward: int,
    backward: int,
    backend: str,
) -> None:
    with require_backend(Place(backend, "cpu")):
        assert counts(loss, shapes, backend, **options) == (forward, backward)


@pytest.mark.parametrize(
    ("loss", "shapes", "options"),
    [
        (losses.channel_kd, MAPS, {}),
        (losses.pixel_relation_kd, UNEQUAL, {}),
        (losses.pixel_relation_kd, UNEQUAL, {"cross_image": True}),
        (losses.cross_modal_kd, FEATURES, {"terms": {"pixel_to_word": 1.0, "word_to_pixel": 1.0}}),
    ],
)
def test_forward_counts_the_products_of_the_plain_formula(
    loss: Callable[..., Tensor], shapes: list[tuple[int, ...]], options: dict[str, Any]
) -> None:
    with require_backend(Place("cpu", "cpu")):
        got, want = (counts(loss, shapes, backend, **options) for backend in ("cpu", "reference"))
    assert got[0] == want[0]
    assert want[1] / 2 <= got[1] <= 2 * want[1]


def test_gram_form_counts_its_own_products() -> None:
    rows, width = 400, 4
    shapes = [(1, width, 20, 20)] * 2
    with require_backend(Place("cpu", "cpu")):
        got = counts(losses.pixel_relation_kd, shapes, "cpu", distance="mse")
    assert got == (4 * rows * (2 * width) ** 2, 2 * rows * width * (2 * width))


def test_unneeded_gradients_are_not_counted() -> None:
    with require_backend(Place("cpu", "cpu")):
        v, w, vt, wt = (torch.randn(shape) for shape in FEATURES)
        loss = losses.cross_modal_kd(v.requires_grad_(), w, vt, wt, terms={"pixel_to_word": 1.0}, backend="cpu")
        with FlopCounterMode(display=False) as counter:
            loss.backward()
    assert counter.get_total_flops() == GRADIENT_PRODUCTS // 2


@pytest.mark.parametrize("kept", [0, 1])
def test_unit_gradients_are_counted_in_the_forward(kept: int) -> None:
    """Maps of both networks, and one gradient: in the forward of a mean, recomputed in the backward of rows."""
    args = [torch.randn(2, 3, rows, d).requires_grad_(i == kept) for i, (rows, d) in
            enumerate([(5, 4), (7, 4), (5, 6), (7, 6)])]  # fmt: skip
    maps, gradient = 2 * (2 * 3 * 5 * 7) * (4 + 6), 2 * (2 * 3 * 5 * 7) * 4
    for reduction, want in (("mean", (maps + gradient, 0)), ("none", (maps, maps + gradient))):
        with require_backend(Place("cpu", "cpu")), FlopCounterMode(display=False) as forward:
            loss = losses.attention_kd(*args, reduction=reduction, backend="cpu")
        with FlopCounterMode(display=False) as backward:
            loss.sum().backward()
        assert (forward.get_total_flops(), backward.get_total_flops()) == want


@pytest.mark.parametrize("first", ["fastkd.losses", "torch.utils.flop_counter"])
def test_formulas_are_registered_in_any_import_order(first: str) -> None:
    script = f"""
import importlib, sys
importlib.import_module({first!r})
import fastkd.losses, torch, torch.utils.flop_counter as counter
names = [n for n in dir(torch.ops.fastkd) if n.endswith("ward")]
assert len(names) == 8, names
assert all(getattr(torch.ops.fastkd, name) in counter.flop_registry for name in names)
assert counter.__spec__.loader.get_source(counter.__name__)
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

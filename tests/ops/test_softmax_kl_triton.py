"""The Triton kernels of ``softmax_kl``: units of rows, and failures while a CUDA graph is captured."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_kernels import DEVICE, MARKS, require_gpu_kernels

import fastkd
from fastkd.losses import channel_distribution_kd, cross_modal_kd, pixel_relation_kd
from fastkd.ops.softmax_kl import softmax_kl

pytestmark = MARKS


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with require_gpu_kernels("triton"):
        yield


def test_unit_divides_lengths_and_strides() -> None:
    from fastkd.kernels.softmax_kl.plan import unit_for

    def unit(cols: int, stride: int, dtype: torch.dtype) -> int:
        return unit_for(cols, (3 * stride, stride, 3 * cols, cols), dtype.itemsize)

    assert [unit(cols, cols, torch.bfloat16) for cols in (900, 3600, 226, 225, 8)] == [4, 8, 2, 1, 8]
    assert [unit(cols, cols, torch.float32) for cols in (900, 3600, 226, 225)] == [4, 4, 2, 1]
    assert unit(8, 8, torch.float64) == 2
    assert unit(8, 12, torch.bfloat16) == 4  # rows within longer rows
    assert unit(8, 9, torch.bfloat16) == 1
    assert unit_for(8, (0, 0, 24, 8), 4) == 4


@pytest.mark.parametrize(("cols", "stride"), [(20, 20), (20, 28), (18, 20), (20, 21), (1040, 1044)])
def test_any_unit_gives_the_losses_and_gradients_of_plain_torch(cols: int, stride: int) -> None:
    wide = torch.randn(2, 2, 3, stride, generator=torch.Generator().manual_seed(0))
    student, teacher = wide.to(DEVICE)[..., :cols]
    results = []
    for backend in ("triton", "reference"):
        leaf = student.detach().requires_grad_()
        rows = softmax_kl(leaf, teacher, temperature=2.0, backend=backend)
        results.append((rows, *torch.autograd.grad(rows.sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


class Unloadable:
    """A kernel whose launch fails as while a CUDA graph is captured."""

    def run(self, *args: Any, **options: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (channel_distribution_kd, ("softmax_kl.forward.forward_kernel", "softmax_kl.backward.backward_kernel")),
        (pixel_relation_kd, ("relation.forward.tiles_kernel", "relation.backward.product_kernel")),
        (cross_modal_kd, ("pixel_word.forward.terms_kernel", "pixel_word.backward.gradient_kernel")),
    ],
    ids=["softmax_kl", "relation", "pixel_word"],
)
def test_kernel_that_cannot_be_loaded_during_a_capture_is_an_error_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, loss: Any, names: tuple[str, str], backward: bool
) -> None:
    from fastkd.kernels import common

    maps, words = torch.ones(1, 4, 3, 3, device=DEVICE), torch.ones(1, 2, 4, device=DEVICE)
    leaf = maps.clone().requires_grad_()
    inputs = (leaf, words, maps, words) if loss is cross_modal_kd else (leaf, maps)
    module, _, name = names[backward].rpartition(".")
    run = lambda: loss(*inputs, backend="triton").backward()
    run()
    monkeypatch.setattr(importlib.import_module(f"fastkd.kernels.{module}"), name, Unloadable())
    with pytest.raises(RuntimeError, match=r"^Triton Error"):  # no capture: Triton's own error
        run()
    monkeypatch.setattr(common, "is_capturing", lambda x: True)
    with pytest.raises(fastkd.BackendUnavailable, match=r"call the loss once on such inputs, .* before the capture"):
        run()

"""int8 codes with scales."""

from __future__ import annotations

import pytest
import torch

from fastkd.distill.int8 import from_int8, scale_shape, to_int8


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((4, 256, 20), (4, 256, 1)),  # pixel–word logits: the words of a pixel
        ((64, 32, 32), (64, 32, 1)),
        ((128, 8, 8), (128, 1, 1)),
        ((256, 10), (1, 10)),  # ten words are too few for a scale
        ((16,), (1,)),
        ((3, 5), None),
        ((), None),
        ((0, 7), None),
    ],
)
def test_groups_are_the_smallest_of_at_least_16_values(sizes: tuple[int, ...], shape: tuple[int, ...] | None) -> None:
    assert scale_shape(sizes) == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_are_within_half_a_step(dtype: torch.dtype) -> None:
    value = torch.randn(5, 6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    value *= torch.tensor([1e-4, 1e-2, 1, 1e2, 1e4, 0])[:, None].to(dtype)  # groups of unlike sizes, one all zeros
    codes, scale = to_int8(value, (6, 1))
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (5, 6, 1))
    step = value.double().abs().amax(2, keepdim=True) / 127
    assert bool(((from_int8(codes, scale).double() - value.double()).abs() <= 0.5001 * step).all())


def test_masked_logits_stay_minus_infinity() -> None:
    value = torch.linspace(-2, 2, 32).reshape(2, 16)
    value[:, 9:], value[1] = -torch.inf, -torch.inf
    again = from_int8(*to_int8(value, (1,)))
    assert torch.equal(again == -torch.inf, value == -torch.inf)
    torch.testing.assert_close(again[0, :9], value[0, :9], atol=0.5 * 2 / 127, rtol=0)

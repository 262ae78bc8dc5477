"""channel_attention_kd and ChannelAttentionKD: formulas, CKA at its edges, γ and temperatures, groups, errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contract_formulas
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import gradcheck

from fastkd.errors import BackendUnavailable
from fastkd.losses import ChannelAttentionKD, channel_attention_kd
from fastkd.ops.cka import _negative_log

DISTANCES = ("cka", "mse", "cosine")


def maps(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape or (5, 3, 2, 4), generator=g, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "mean", "dot"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_definition(distance: str, similarity: str, negate: bool) -> None:
    student, teacher = maps()
    options: dict[str, Any] = {"similarity": similarity, "distance": distance, "negate": negate, "gamma": -0.7}
    for more in ({"temperature": 0.3}, {"temperature": (0.3, 2.0)}, {"debiased": False}):
        want = contract_formulas.channel_attention_kd(student, teacher, **options, **more)
        got = channel_attention_kd(student, teacher, reduction="none", **options, **more)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(channel_attention_kd(student, teacher, **options, **more), want.mean())
    if distance != "cka":
        weight = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        rows = contract_formulas.channel_attention_kd(student, teacher, **options)
        got = channel_attention_kd(student, teacher, weight=weight, **options)
        torch.testing.assert_close(got, (weight * rows).sum() / weight.sum())


def test_cka_takes_any_widths_and_map_sizes() -> None:
    student, teacher = maps(5, 3, 8)[0], maps(5, 7, 4, 3)[1]
    want = contract_formulas.channel_attention_kd(student, teacher)
    torch.testing.assert_close(channel_attention_kd(student, teacher), want[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_networks_have_loss_and_gradient_0(distance: str, dtype: torch.dtype) -> None:
    for debiased in (True, False):
        student, _ = maps(6, 9, 5, 5, dtype=dtype)
        teacher = student.clone()
        loss = channel_attention_kd(student.requires_grad_(), teacher, distance=distance, debiased=debiased)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0
        assert not gradient.any()


def test_only_the_debiased_cka_of_unrelated_networks_is_small() -> None:
    student, teacher = maps(16, 64, 16, 16, dtype=torch.float32)
    cka = lambda debiased: (-channel_attention_kd(student, teacher, gamma=0.0, debiased=debiased)).exp().item()
    assert cka(False) > 0.99
    assert cka(True) < 0.2


def with_negative_cka() -> tuple[Tensor, Tensor]:
    student, teacher = next(
        pair
        for pair in (maps(4, 2, 3, seed=seed) for seed in range(99))
        if contract_formulas.cka(*(x.flatten(1) for x in pair), True) < -0.2
    )
    return student.requires_grad_(), teacher


def test_negative_cka_has_a_finite_loss_of_slope_10() -> None:
    student, teacher = with_negative_cka()
    loss = channel_attention_kd(student, teacher, gamma=0.0)
    cka = contract_formulas.cka(student.flatten(1), teacher.flatten(1), True)
    torch.testing.assert_close(loss, 1 + torch.tensor(10.0).double().log() - 10 * cka)
    (got,), (slope,) = torch.autograd.grad(loss, student), torch.autograd.grad(cka, student)
    torch.testing.assert_close(got, -10 * slope)
    moved = channel_attention_kd(student - 1e-3 * got / got.norm(), teacher, gamma=0.0)
    assert moved < loss


def test_the_tangent_joins_the_logarithm_smoothly() -> None:
    for x in (0.1 - 1e-9, 0.1 + 1e-9):
        distance = torch.tensor(1 - x, dtype=torch.float64, requires_grad=True)
        value = _negative_log(distance, 0.1)
        (slope,) = torch.autograd.grad(value, distance)
        assert value.item() == pytest.approx(2.302585093, abs=2e-8)
        assert slope.item() == pytest.approx(10, abs=1e-6)


@pytest.mark.parametrize("debiased", [True, False])
def test_samples_without_differences_have_no_gradient(debiased: bool) -> None:
    """All equal; and for the debiased estimator all but one equal, whose kernel is 0 up to rounding."""
    student, teacher = maps(6, 3, 7, dtype=torch.float32)
    equal = (100 * student[:1]).expand(6, 3, 7)
    cases = [equal, equal + 0 * student]
    if debiased:
        cases.append(torch.cat([student[:1], equal[1:]]))
    for x in cases:
        for own, other in ((x, teacher), (student, x), (x, x)):
            own = own.detach().clone().requires_grad_()
            loss = channel_attention_kd(own, other, debiased=debiased)
            (gradient,) = torch.autograd.grad(loss, own)
            assert loss.item() == pytest.approx(3.302585 if debiased else 7.907755, rel=1e-6)
            assert not gradient.any()
            assert channel_attention_kd(own, other * float("nan"), debiased=debiased).isnan()


def test_cka_ignores_scale_and_a_common_offset_of_all_samples() -> None:
    student, teacher = maps(6, 4, 9, dtype=torch.float32)
    want = channel_attention_kd(student, teacher, gamma=0.0)
    for other in (1e15 * student, 1e-6 * student, student + 100 * student[:1]):
        torch.testing.assert_close(channel_attention_kd(other, teacher, gamma=0.0), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_of_features_gamma_and_temperatures(distance: str) -> None:
    student, teacher = maps(4, 2, 3)
    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.6, 0.4, 0.8)]

    def loss(x: Tensor, gamma: Tensor, own: Tensor, other: Tensor) -> Tensor:
        return channel_attention_kd(x, teacher, gamma=gamma, temperature=(own, other), distance=distance)

    assert gradcheck(loss, (student.requires_grad_(), *numbers))


def test_gamma_is_a_parameter_of_the_module_for_both_networks() -> None:
    student, teacher = maps(dtype=torch.float32)
    module = ChannelAttentionKD(gamma=nn.Parameter(torch.tensor(0.5)), distance="mse")
    assert list(module.state_dict()) == ["gamma"]
    module(student, teacher).backward()
    assert module.gamma.grad is not None
    got, want = module(student, teacher), channel_attention_kd(student, teacher, gamma=0.5, distance="mse")
    assert torch.equal(got, want)
    assert torch.equal(copy.deepcopy(module)(student, teacher), want)


def test_module_aligns_unequal_widths_and_weighs_rows() -> None:
    torch.manual_seed(0)
    student, teacher = maps(5, 3, 4, dtype=torch.float32)[0], maps(5, 6, 4, dtype=torch.float32)[1]
    module = ChannelAttentionKD(distance="cosine", student_channels=3, teacher_channels=6)
    assert module.aligner is not None
    weight = torch.rand(5, 6)
    want = channel_attention_kd(module.aligner(student), teacher, distance="cosine", weight=weight)
    assert torch.equal(module(student, teacher, weight=weight), want)
    assert ChannelAttentionKD()(student, teacher).isfinite()  # cka


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "distance: expected one of 'cka', 'mse', 'cosine', got 'kl'", {"distance": "kl"}),
        (ValueError, "similarity: expected one of 'cosine', 'mean', 'dot', got 'l2'", {"similarity": "l2"}),
        (TypeError, "debiased: expected True or False, got 1", {"debiased": 1}),
        (ValueError, "gamma: expected a finite number, got nan", {"gamma": float("nan")}),
        (TypeError, "gamma: expected a real number", {"gamma": torch.ones(2)}),
        (ValueError, r"temperature\[1\]: expected a finite number above 0, got 0", {"temperature": (1.0, 0)}),
        (ValueError, "temperature: expected a number or a pair .*, got 3 values", {"temperature": (1.0, 1.0, 1.0)}),
        (ValueError, "weight: weighs channels, but distance='cka' has no", {"weight": "attention"}),
        (ValueError, "weight: expected None, 'attention' or .*got shape", {"weight": torch.ones(5), "distance": "mse"}),
        (ValueError, "group: pools .* which distance='mse' does not", {"group": "world", "distance": "mse"}),
        (ValueError, "group: expected None, 'world' or", {"group": "all"}),
        (BackendUnavailable, "backend='cpu': channel_attention_kd is computed in plain torch", {"backend": "cpu"}),
        (ValueError, "backend: expected one of .*got 'gpu'", {"backend": "gpu"}),
    ],
)
def test_rejects_options(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    student, teacher = maps()
    with pytest.raises(error, match=message):
        channel_attention_kd(student, teacher, **options)
    if not isinstance(options.get("weight"), Tensor):
        with pytest.raises(error, match=message):
            ChannelAttentionKD(**options)


def test_rejects_sizes() -> None:
    student, teacher = maps()
    with pytest.raises(ValueError, match="debiased=True needs at least 4, got 3; use a larger batch, group='world'"):
        channel_attention_kd(student[:3], teacher[:3])
    assert channel_attention_kd(student[:2], teacher[:2], debiased=False).isfinite()
    with pytest.raises(ValueError, match="debiased=False needs at least 2, got 1"):
        channel_attention_kd(student[:1], teacher[:1], debiased=False)
    with pytest.raises(ValueError, match="batch sizes differ, 5 and 4; give the same samples to both"):
        channel_attention_kd(student, teacher[:4])
    with pytest.raises(ValueError, match=r"shapes differ, \(5, 2, 2, 4\) and .*aligner does; or distance='cka'"):
        channel_attention_kd(student[:, :2], teacher, distance="mse")


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_a_group_of_one_is_this_process_alone(one_rank: None) -> None:
    student, teacher = maps()
    assert torch.equal(channel_attention_kd(student, teacher, group="world"), channel_attention_kd(student, teacher))

"""Temperatures and weights of terms as tensors and numpy numbers, and gradients with respect to a temperature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from fastkd import losses
from fastkd.errors import BackendUnavailable

LOSSES = {
    losses.channel_kd: losses.ChannelKD,
    losses.pixel_relation_kd: losses.PixelRelationKD,
    losses.channel_distribution_kd: losses.ChannelDistributionKD,
    losses.logit_kd: losses.LogitKD,
    losses.cross_modal_kd: losses.CrossModalKD,
    losses.cross_modal_kd_from_logits: None,
}


def inputs_of(f, size=5, dtype=torch.float64):
    draw = lambda *shape, seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    if f is losses.cross_modal_kd:
        return [draw(2, n, size, seed=seed) for seed, n in enumerate((12, 4, 12, 4))]
    return [draw(2, size, 12, seed=seed) for seed in range(2)]


@pytest.mark.parametrize("f", LOSSES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_tensor_and_numpy_numbers_equal_their_values(f, backend):
    args = inputs_of(f, dtype=torch.float32)
    want = f(*args, temperature=2.0, backend=backend)
    numbers = [torch.tensor(2), torch.tensor([2.0]), np.float32(2), np.float64(2), np.int64(2), np.array(2.0)]
    numbers += [torch.tensor(2.0, requires_grad=True).detach()]
    for value in numbers:
        torch.testing.assert_close(f(*args, temperature=value, backend=backend), want, rtol=0, atol=0)
        if LOSSES[f] is not None:
            made = LOSSES[f](temperature=value, backend=backend)
            torch.testing.assert_close(made(*args), want, rtol=0, atol=0)
    with torch.no_grad():
        learned = torch.tensor(2.0, requires_grad=True)
        torch.testing.assert_close(f(*args, temperature=learned, backend=backend), want, rtol=0, atol=0)


def test_temperature_is_read_at_every_call():
    made = losses.LogitKD(temperature=torch.tensor(1.0))
    args = inputs_of(losses.logit_kd)
    for value in (1.0, 3.0):
        made.temperature.fill_(value)
        torch.testing.assert_close(made(*args), losses.logit_kd(*args, temperature=value))


@pytest.mark.parametrize("f", LOSSES)
def test_gradients_reach_a_learned_temperature(f):
    student, *others = inputs_of(f)
    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    student.requires_grad_()
    assert gradcheck(lambda t: f(student, *others, temperature=t), (tau,))
    if LOSSES[f] is not None:
        made = LOSSES[f](temperature=nn.Parameter(torch.tensor([0.7], dtype=torch.float64)))
        made(student, *others).backward()
        (want,) = torch.autograd.grad(f(student, *others, temperature=tau), tau)
        torch.testing.assert_close(made.temperature.grad, want.reshape(1))
    inside = torch.func.grad(lambda t: f(student.detach(), *others, temperature=t))(tau.detach())
    torch.testing.assert_close(inside, torch.autograd.grad(f(student, *others, temperature=tau), tau)[0])
    with pytest.raises(
        BackendUnavailable, match=r"no gradient with respect to the temperature; pass temperature\.detach"
    ):
        f(student, *others, temperature=tau, backend="cpu")


@pytest.mark.parametrize("guide", ["own", "teacher"])
def test_gradients_reach_the_temperature_of_a_guide(guide):
    student, teacher = inputs_of(losses.channel_distribution_kd)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    f = lambda s, t: losses.channel_distribution_kd(s, teacher, guide=guide, guide_temperature=t)
    student.requires_grad_()
    assert gradcheck(lambda t: f(student, t), (tau,))
    got = losses.channel_distribution_kd(student, teacher, guide=guide, guide_temperature=np.float32(0.5))
    torch.testing.assert_close(got, f(student, 0.5))


def test_term_weights_accept_tensor_and_numpy_numbers():
    args = inputs_of(losses.cross_modal_kd)
    want = losses.cross_modal_kd(*args, terms={"pixel_pixel": 0.5, "pixel_to_word": 2.0})
    terms = {"pixel_pixel": torch.tensor(0.5), "pixel_to_word": np.float32(2)}
    torch.testing.assert_close(losses.cross_modal_kd(*args, terms=terms), want)
    torch.testing.assert_close(losses.CrossModalKD(terms=terms)(*args), want)
    with pytest.raises(ValueError, match=r"terms\['pixel_pixel'\]: requires grad; .* return_terms=True"):
        losses.CrossModalKD(terms={"pixel_pixel": nn.Parameter(torch.tensor(1.0))})

"""Quantisation-aware training: weights and inputs of layers are rounded in training steps, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from train_tools import Scenes, run, same, toy

from fastkd.train import TrainConfig
from fastkd.train.fake_int8 import FakeInt8, rounded_input, rounded_weight


def codes_of(x, scale, zero, low, high):
    return scale * ((x / scale).round().add(zero).clamp(low, high) - zero)


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 7)])
def test_weights_have_a_scale_per_output_channel(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[0]).view(
        -1, *[1] * (len(shape) - 1)
    )
    weight[1] = 0
    scale = weight.abs().flatten(1).amax(1) / 64
    expected = torch.stack([codes_of(w, s, 0, -64, 64) if s else w for w, s in zip(weight, scale, strict=True)])
    weight.requires_grad_()
    got = rounded_weight(weight)
    torch.testing.assert_close(got, expected)
    assert got[0].unique().numel() < weight[0].numel() or weight[0].numel() < 10
    got.backward(torch.full_like(got, 2.0))
    assert torch.equal(weight.grad, torch.full_like(weight, 2.0))  # nothing is clamped


@pytest.mark.parametrize("offset", [0.0, 4.0, -4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_rounded_within_their_range_and_0(offset, dtype):
    x = (torch.randn(3, 5, generator=torch.Generator().manual_seed(1)) + offset).to(dtype).requires_grad_()
    wide = x.detach().float()
    low, high = min(0.0, float(wide.min())), max(0.0, float(wide.max()))
    scale = (high - low) / 255
    got = rounded_input(x)
    assert got.dtype == dtype
    assert float((got.detach().float() - wide).abs().max()) <= scale * (0.51 if dtype is torch.float32 else 1.5)
    torch.testing.assert_close(got, codes_of(wide, scale, round(-low / scale), 0, 255).to(dtype))
    got.sum().backward()
    assert bool((x.grad.float().unique() <= 1).all())
    assert float(x.grad.float().mean()) > 0.9  # at most the ends of the range are clamped
    zeros = torch.zeros(2, 2)
    assert torch.equal(rounded_input(zeros), zeros)


def test_a_layer_computes_with_rounded_values_inside_the_block_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(2, 3, 4, 4)
    plain = model(x)
    names = [name for name, _ in model.named_parameters()]
    with FakeInt8(model).active():
        got = model(x)
        assert [name for name, _ in model.named_parameters()] == names
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 5, 4, 4))  # an error in a layer leaves nothing behind
    conv, linear = model[0], model[2]
    hidden = F.conv2d(rounded_input(x), rounded_weight(conv.weight), conv.bias).flatten(1)
    expected = F.linear(rounded_input(hidden), rounded_weight(linear.weight), linear.bias)
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)
    assert torch.equal(model(x), plain)
    got.sum().backward()
    assert conv.weight.grad is not None
    assert all("weight" not in m.__dict__ and not m._forward_hooks and not m._forward_pre_hooks for m in model)


def test_training_rounds_and_evaluation_does_not(tmp_path):
    models = {fake: toy() for fake in (False, True)}
    seen = []
    for fake, model in models.items():
        model.head.register_forward_hook(
            lambda layer, args, output, fake=fake: seen.append((fake, layer.training, "weight" in layer.__dict__))
        )
        run(model, fake_int8=fake, val_dataset=Scenes(8), out=tmp_path / str(fake))
    assert not same(*models.values())
    rounded = {(fake, training): last for fake, training, last in seen}  # the checks before the first step do not round
    assert rounded == {(False, True): False, (False, False): False, (True, True): True, (True, False): False}


def test_excludes_a_compiled_student():
    with pytest.raises(ValueError, match="fake_int8=True and compile_student=True exclude each other"):
        TrainConfig(fake_int8=True, compile_student=True)

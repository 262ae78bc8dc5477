"""fp32 losses and metrics on devices without fp64, simulated by a dispatch mode that refuses fp64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from contract_cases import ALL_TERMS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkd import losses
from fastkd.ops import dispatch, numerics
from fastkd.ops.numerics import computes_fp64
from fastkd.ops.relation import _has_torch_gram
from fastkd.ops.relation.reference import relation_mse_gram

CPU = torch.device("cpu")


class WithoutDouble(TorchDispatchMode):
    def __init__(self, error=TypeError):
        super().__init__()
        self.error = error

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(result)):
            raise self.error("this device has no fp64")
        return result


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """Use plain torch, as on devices other than CPUs and NVIDIA GPUs."""
    monkeypatch.setitem(dispatch.AUTO_ORDER, "cpu", ("reference",))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MAP, WIDE = draw(2, 6, 8, 8), draw(2, 9, 8, 8, seed=1)
NEAR = torch.cat([MAP, torch.zeros(2, 3, 8, 8)], 1)[:, torch.randperm(9, generator=torch.Generator().manual_seed(2))]
PIXELS, WORDS, OTHERS = draw(2, 40, 6), draw(2, 5, 6), draw(2, 7, 6, seed=1)
PIXEL_PIXEL = {"pixel_pixel": 1.0}
LOSSES = {
    "channel_kd": (losses.channel_kd, [MAP, MAP.flip(1)], {"centered": True, "weight": "attention"}),
    "own guide": (losses.channel_distribution_kd, [MAP, MAP.flip(1)], {"guide": "own"}),
    "logit_kd": (losses.logit_kd, [MAP, MAP.flip(1)], {}),
    "pixel_relation_kd": (losses.pixel_relation_kd, [MAP, WIDE], {}),
    "mse, equal widths": (losses.pixel_relation_kd, [MAP, MAP.flip(2)], {"distance": "mse"}),
    "mse, other widths": (losses.pixel_relation_kd, [MAP, WIDE], {"distance": "mse"}),
    "mse, other widths, across images": (
        losses.pixel_relation_kd,
        [MAP, WIDE],
        {"distance": "mse", "cross_image": True},
    ),
    "mse, other widths, near": (losses.pixel_relation_kd, [MAP + 1e-3 * MAP.flip(1), NEAR], {"distance": "mse"}),
    "cross_modal_kd": (losses.cross_modal_kd, [PIXELS, WORDS, PIXELS.flip(1), WORDS], {"terms": ALL_TERMS}),
    "other words": (losses.cross_modal_kd, [PIXELS, WORDS, PIXELS.flip(1), OTHERS], {"terms": PIXEL_PIXEL}),
    "other words, near": (
        losses.cross_modal_kd,
        [PIXELS, WORDS, PIXELS, torch.cat([WORDS, WORDS], 1)],
        {"terms": PIXEL_PIXEL},
    ),
}


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fp32_losses_need_no_fp64(name, backend, error):
    function, inputs, options = LOSSES[name]
    computes_fp64(CPU)  # cache that the device has fp64: the mode below must not rely on it
    leaf, exact = inputs[0].clone().requires_grad_(), inputs[0].double().requires_grad_()
    with WithoutDouble(error):
        loss = function(leaf, *inputs[1:], **options, backend=backend)
        (grad,) = torch.autograd.grad(loss, leaf)
    want = function(exact, *(x.double() for x in inputs[1:]), **options, backend="reference")
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-12)
    (want_grad,) = torch.autograd.grad(want, exact)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-3, atol=1e-4 * want_grad.abs().max().item())


def test_fp64_support_is_tested_once_per_device(monkeypatch):
    monkeypatch.setattr(numerics, "_fp64", {})
    tries = []
    trial = numerics._try_fp64
    monkeypatch.setattr(numerics, "_try_fp64", lambda device: tries.append(device) or trial(device))
    with WithoutDouble():
        assert not computes_fp64(CPU)
    assert numerics._fp64 == {}  # the result under the mode is not cached for the device
    assert computes_fp64(CPU)
    assert computes_fp64(CPU)
    assert len(tries) == 2
    with WithoutDouble():
        assert not computes_fp64(CPU)
    with FakeTensorMode():
        assert computes_fp64(CPU)
        assert computes_fp64(torch.device("cuda")) or torch.cuda.is_available()
    assert computes_fp64(torch.device("meta"))
    monkeypatch.setattr(numerics, "_fp64", {CPU: False})
    with FakeTensorMode():
        assert not computes_fp64(CPU)
    compiled = torch.compile(lambda x: x + computes_fp64(x.device), fullgraph=True, backend="eager")
    torch._dynamo.reset()
    assert compiled(torch.zeros(1)) == 0


def test_out_of_memory_is_not_a_lack_of_fp64(monkeypatch):
    monkeypatch.setattr(numerics, "_fp64", {})
    with WithoutDouble(torch.OutOfMemoryError), pytest.raises(torch.OutOfMemoryError):
        computes_fp64(CPU)
    assert numerics._fp64 == {}


def test_metrics_move_to_the_cpu_without_fp64(monkeypatch):
    metrics = pytest.importorskip("fastkd.evaluate.metrics")
    truth = draw(6, 5, 5) > 0
    counted = [metrics.RISMetrics() for _ in range(2)]
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: moved.append(x) or x)
    for each in counted:
        each.update(draw(6, 5, 5, seed=1) > 0, truth)
    want = counted[0].compute()
    monkeypatch.setattr("fastkd.evaluate.counts.computes_fp64", lambda device: False)
    assert not moved
    assert counted[1].compute() == want
    assert moved


@pytest.mark.parametrize(("capability", "fast"), [((8, 0), True), ((8, 9), False), ((9, 0), True), ((12, 0), False)])
def test_gram_matrices_avoid_slow_fp64(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(numerics, "_fp64", {torch.device("cuda", 0): True})
    gpu = torch.device("cuda", 0)
    rows = lambda width, dtype: SimpleNamespace(shape=(2, 40, width), dtype=dtype, device=gpu)
    assert numerics.has_fast_fp64(gpu) == fast
    assert _has_torch_gram(rows(8, torch.float32), rows(5, torch.float32)) == fast
    assert _has_torch_gram(rows(8, torch.bfloat16), rows(5, torch.float32)) == fast
    assert _has_torch_gram(rows(8, torch.bfloat16), rows(5, torch.bfloat16)) == fast
    assert _has_torch_gram(rows(8, torch.float32), rows(8, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_matrices_of_equal_functions_cancel(dtype):
    """A teacher with zero channels in addition has the same relations: in fp32 the loss would be 1e-7, or below 0."""
    student = (MAP.flatten(2).mT + 3).to(dtype)  # cosines near 1
    teacher = torch.cat([student, torch.zeros(2, 64, 3, dtype=dtype)], 2)
    loss = relation_mse_gram(student, teacher, similarity="cosine")
    assert loss.abs().max() <= 1e-14

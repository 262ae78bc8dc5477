"""fastkd's fp32 products are fp32 at every ``torch.set_float32_matmul_precision``; the aligner's follow the setting.

Few CPUs round fp32 operands at "medium", so a dispatch mode rounds those of every fp32 product here, as GPUs do.
"""

from __future__ import annotations

import pytest
import torch
from contract_cases import ALL_TERMS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastkd import losses
from fastkd.losses import ChannelKD
from fastkd.ops import dispatch, products
from fastkd.ops.products import product

SETTINGS = ("high", "medium")
aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.dot, aten.addmv, aten._addmm_activation}


class Rounding(TorchDispatchMode):
    """Round the operands of fp32 products to bf16."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket in PRODUCTS:
            rounded = lambda x: x.bfloat16().float() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x
            args, kwargs = tree_map(rounded, (args, kwargs or {}))
        return operator(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def restore_setting():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=[("cpu",), ()], ids=["fp64", "parts"])
def product_method(request, monkeypatch):
    """Compute products as on CPUs (in fp64), or as on devices where fp64 is slow or missing (in bf16 parts)."""
    monkeypatch.setattr(products, "FAST_FP64", request.param)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MAPS = (draw(2, 16, 8, 8), draw(2, 16, 8, 8) + 0.3 * draw(2, 16, 8, 8, seed=1))
WORDS = tuple(draw(2, n, 12) + i * 0.3 * draw(2, n, 12, seed=1) for i in range(2) for n in (40, 6))
LOSSES = {
    "channel_kd": lambda *x, b: losses.channel_kd(*x, backend=b),
    "row_cosine": lambda *x, b: losses.channel_kd(*x, distance="row_cosine", backend=b),
    "pixel_relation_kd": lambda *x, b: losses.pixel_relation_kd(*x, cross_image=True, backend=b),
    "own guide": lambda *x, b: losses.channel_distribution_kd(*x, guide="own", backend=b),
    "teacher's guide": lambda *x, b: losses.channel_distribution_kd(*x, guide="teacher", backend=b),
    "cross_modal_kd": lambda *x, b: losses.cross_modal_kd(*x, terms=ALL_TERMS, backend=b),
    "cross_modal_kd cosine": lambda *x, b: losses.cross_modal_kd(
        *x, terms=ALL_TERMS, similarity="cosine", temperature=0.1, backend=b
    ),
}


def value_and_gradient(name, backend, dtype=torch.float32):
    student, *others = (x.to(dtype) for x in (WORDS if name.startswith("cross") else MAPS))
    leaf = student.requires_grad_()
    loss = LOSSES[name](leaf, *others, b=backend)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_simulated_tf32_rounds_unprotected_products():
    x, y = draw(40, 50), draw(50, 30)
    with Rounding():
        assert (x @ y - x.double() @ y.double()).abs().max() > 1e-2


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_losses_and_gradients_have_fp32_accuracy(name, backend, product_method):
    want = value_and_gradient(name, "reference", torch.float64)
    for setting in SETTINGS:
        torch.set_float32_matmul_precision(setting)
        with Rounding():
            got = value_and_gradient(name, backend)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("width", [16, 12])
def test_gram_form_is_fp32(width, product_method, monkeypatch):
    """The Gram form that "auto" takes without kernels."""
    monkeypatch.setitem(dispatch.AUTO_ORDER, "cpu", ("reference",))
    student, teacher = draw(2, 16, 8, 8), draw(2, width, 8, 8, seed=1)
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    want = losses.pixel_relation_kd(exact, teacher.double(), distance="mse", backend="reference")
    torch.set_float32_matmul_precision("medium")
    with Rounding():
        got = losses.pixel_relation_kd(leaf, teacher, distance="mse")
        (grad,) = torch.autograd.grad(got, leaf)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    (want_grad,) = torch.autograd.grad(want, exact)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=1e-5 * want_grad.abs().max().item())


def test_products_are_differentiable_in_every_mode(product_method):
    torch.set_float32_matmul_precision("medium")
    x, y = draw(3, 7, 9), draw(1, 9, 5, seed=1)
    close = lambda got, want: torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    f, plain = lambda a, b: product(a, b).square().sum(), lambda a, b: (a @ b).square().sum()
    exact = [z.double().requires_grad_() for z in (x, y)]
    leaves = [z.clone().requires_grad_() for z in (x, y)]
    with Rounding():
        first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(first[0].sum(), leaves[1])
        forward = torch.func.jvp(f, (x, y), (torch.ones_like(x), torch.ones_like(y)))
        mapped = torch.vmap(torch.func.grad(f), in_dims=(0, None))(x, y[0])
    want = torch.autograd.grad(plain(*exact), exact, create_graph=True)
    for got, expected in zip(first, want, strict=True):
        close(got, expected)
    close(second[0], torch.autograd.grad(want[0].sum(), exact[1])[0])
    for got, expected in zip(
        forward, torch.func.jvp(plain, tuple(exact), tuple(map(torch.ones_like, exact))), strict=True
    ):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-3)
    close(mapped, want[0])


def test_a_compiled_graph_follows_the_setting(product_method):
    torch._dynamo.reset()
    dtypes = []

    def record(graph, inputs):
        def run(*args):
            class Watch(TorchDispatchMode):
                def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
                    if operator.overloadpacket in PRODUCTS:
                        dtypes.append((args[0].dtype, args[0].shape[-1]))
                    return operator(*args, **(kwargs or {}))

            with Watch():
                return graph(*args)

        return run

    compiled = torch.compile(product, fullgraph=True, backend=record)
    x, y = draw(4, 8), draw(8, 4)
    for setting in ("highest", "medium", "highest"):
        torch.set_float32_matmul_precision(setting)
        torch.testing.assert_close(compiled(x, y), x @ y)
    protected = (torch.float64, 8) if products.FAST_FP64 else (torch.float32, 48)
    assert dtypes == [(torch.float32, 8), protected, (torch.float32, 8)]


def test_aligner_follows_the_users_setting():
    made = ChannelKD(student_channels=4, teacher_channels=6)
    torch.set_float32_matmul_precision("medium")
    with Rounding():
        got = made.aligner(MAPS[0][:, :4])
    want = torch.einsum("oc,bchw->bohw", *(x.bfloat16().double() for x in (made.aligner.linear.weight, MAPS[0][:, :4])))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)

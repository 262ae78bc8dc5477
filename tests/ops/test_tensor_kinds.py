"""Calls under transforms and with tensors that are not plain memory: the correct value, or one error with the fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from contract_cases import ALL_TERMS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import fastkd
from fastkd.losses import (
    channel_distribution_kd,
    channel_kd,
    cross_modal_kd,
    cross_modal_kd_from_logits,
    logit_kd,
    pixel_relation_kd,
)
from fastkd.ops import dispatch

WORDS = torch.linspace(-1, 2, 2 * 5 * 16).reshape(2, 5, 16).sin()


def words(like: Tensor) -> Tensor:
    return WORDS[: like.shape[0]].to(like.dtype)


def gram_kd(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return pixel_relation_kd(student, teacher, distance="mse", similarity="dot", **options)


def attention_kd(student: Tensor, teacher: Tensor, **options: Any) -> Any:
    options.setdefault("terms", ALL_TERMS)
    return cross_modal_kd(student, words(student), teacher, words(student).cos(), **options)


def from_logits_kd(student: Tensor, teacher: Tensor, **options: Any) -> Any:
    options.setdefault("terms", ALL_TERMS)
    return cross_modal_kd_from_logits(student.flatten(2).mT, teacher.flatten(2).mT, **options)


Loss = Callable[..., Tensor]
LOSSES: list[Loss] = [
    channel_distribution_kd,
    logit_kd,
    channel_kd,
    pixel_relation_kd,
    gram_kd,
    attention_kd,
    from_logits_kd,
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


@pytest.fixture
def maps() -> tuple[Tensor, Tensor]:
    """Return student and teacher, large enough for "auto" to use kernels."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(2, 16, 10, 10, generator=draw), torch.randn(2, 16, 10, 10, generator=draw)


@pytest.fixture
def kernels() -> None:
    reason = dispatch.unavailable_reason("cpu")
    if reason is not None:
        pytest.skip(reason)


def gradient(loss: Loss, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    leaf = student.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, teacher, **options), leaf)[0]


def exact(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    return gradient(loss, student.double(), teacher.double(), backend="reference").float()


def near(got: Any, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


# --- transforms -------------------------------------------------------------------------------------------------------


@every_loss
def test_auto_gives_the_derivative_inside_transforms(loss: Loss, maps: tuple[Tensor, Tensor]) -> None:
    student, teacher = maps
    expected = exact(loss, student, teacher)
    near(torch.func.grad(loss)(student, teacher), expected)

    one_each = [exact(loss, student[i : i + 1], teacher[i : i + 1]) for i in range(2)]
    leaf = student.clone().requires_grad_()
    per_sample = torch.func.vmap(lambda s, t: loss(s[None], t[None]))(leaf, teacher)
    near(torch.autograd.grad(per_sample.sum(), leaf)[0], torch.cat(one_each))

    step = expected.sign()
    slope = (expected * step).sum()
    near(torch.func.jvp(lambda s: loss(s, teacher), (student,), (step,))[1], slope)
    with forward_ad.dual_level():
        near(forward_ad.unpack_dual(loss(forward_ad.make_dual(student, step), teacher)).tangent, slope)


@every_loss
def test_named_backend_refuses_transforms(loss: Loss, maps: tuple[Tensor, Tensor], kernels: None) -> None:
    student, teacher = maps

    def named(s: Tensor, t: Tensor) -> Tensor:
        return loss(s, t, backend="cpu")

    def refused() -> Any:
        return pytest.raises(fastkd.BackendUnavailable, match=r"vmap.*forward-mode.*use backend='auto' or 'reference'")

    with refused():
        torch.func.grad(named)(student, teacher)
    with refused():
        torch.func.vmap(lambda s, t: named(s[None], t[None]))(student, teacher)
    with forward_ad.dual_level(), refused():
        named(forward_ad.make_dual(student, student), teacher)
    with forward_ad.dual_level():  # no tensor has a tangent
        near(named(student, teacher), loss(student, teacher, backend="reference"))


@every_loss
def test_batched_and_forward_mode_backwards(loss: Loss, maps: tuple[Tensor, Tensor], kernels: None) -> None:
    """Batched gradients are correct; a tangent, which would be lost, raises."""
    student, teacher = maps
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, backend="cpu")
    batch = torch.autograd.grad(value, leaf, torch.tensor([1.0, -2.0]), is_grads_batched=True, retain_graph=True)[0]
    near(batch[1], -2 * exact(loss, student, teacher))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward-mode AD; use backend='reference'"):
        torch.autograd.grad(value, leaf, forward_ad.make_dual(torch.ones(()), torch.ones(())))


@pytest.mark.parametrize("loss", [logit_kd, channel_kd], ids=lambda f: f.__name__)
def test_transforms_under_torch_compile(loss: Loss, maps: tuple[Tensor, Tensor]) -> None:
    """Inside a transform, plain torch is traced without a graph break; outside, the kernels run."""
    student, teacher = maps
    torch._dynamo.reset()
    expected = exact(loss, student, teacher)
    inside = torch.compile(torch.func.grad(lambda s, t: loss(s, t)), backend="aot_eager", fullgraph=True)
    near(inside(student, teacher), expected)
    outside = torch.compile(loss, backend="aot_eager", fullgraph=True)
    near(gradient(outside, student, teacher), expected)


# --- tensors that are not plain memory --------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_accepts_a_teacher_run_under_inference_mode(
    loss: Loss, backend: str, maps: tuple[Tensor, Tensor], kernels: None
) -> None:
    student, teacher = maps
    with torch.inference_mode():
        frozen = teacher * 1
    near(gradient(loss, student, frozen, backend=backend), exact(loss, student, teacher))
    small = (student[:, :, :2, :2], frozen[:, :, :2, :2])
    near(gradient(loss, *small, backend=backend), exact(loss, small[0], teacher[:, :, :2, :2]))


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_accepts_masks_and_weights_made_under_inference_mode(
    backend: str, maps: tuple[Tensor, Tensor], kernels: None
) -> None:
    student, teacher = maps
    pixels, valid = torch.arange(200).reshape(2, 100) % 3 > 0, torch.arange(10).reshape(2, 5) % 4 > 0
    weight = torch.arange(32.0).reshape(2, 16)
    with torch.inference_mode():
        made = [x.clone() for x in (pixels, valid, weight)]
    for loss, expected, given in (
        (logit_kd, {"pixel_mask": pixels}, {"pixel_mask": made[0]}),
        (attention_kd, {"pixel_mask": pixels, "word_mask": valid}, {"pixel_mask": made[0], "word_mask": made[1]}),
        (from_logits_kd, {"pixel_mask": pixels}, {"pixel_mask": made[0]}),
        (channel_kd, {"weight": weight}, {"weight": made[2]}),
        (channel_distribution_kd, {"weight": weight}, {"weight": made[2]}),
    ):
        got = gradient(loss, student, teacher, backend=backend, **given)
        near(got, gradient(loss, student, teacher, backend="reference", **expected))


class Wrapped(Tensor):
    """A tensor whose values are in another tensor, like a DTensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))


@every_loss
def test_wrapper_classes_use_plain_torch(loss: Loss, maps: tuple[Tensor, Tensor], kernels: None) -> None:
    student, teacher = maps
    got = loss(Wrapped(student), Wrapped(teacher))
    assert isinstance(got, Wrapped)
    near(got.inner, loss(student, teacher, backend="reference"))
    with pytest.raises(fastkd.BackendUnavailable, match=r"take plain tensors, got Wrapped.*to_local.*'reference'"):
        loss(Wrapped(student), Wrapped(teacher), backend="cpu")


def test_plain_subclasses_use_the_kernels(maps: tuple[Tensor, Tensor], kernels: None) -> None:
    """A subclass that holds its own memory is a plain tensor."""

    class Image(Tensor):
        pass

    rows = maps[0].flatten(2).repeat(1, 1, 2)  # enough for the kernel
    assert dispatch.choose("softmax_kl", "auto", rows.as_subclass(Image)) == "cpu"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: torch.nested.as_nested_tensor(list(x), layout=torch.jagged), r"nested.*jagged.*pad it.*mask"),
        (lambda x: torch.nested.as_nested_tensor(list(x), layout=torch.strided), r"nested.*strided.*pad it.*mask"),
        (lambda x: x.to_sparse(), r"layout sparse_coo; convert it with \.to_dense"),
        (lambda x: x.to_mkldnn(), r"layout mkldnn; convert it with \.to_dense"),
    ],
    ids=["jagged", "nested", "sparse", "mkldnn"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rejects_layouts_that_are_not_dense(
    make: Callable[[Tensor], Tensor], message: str, maps: tuple[Tensor, Tensor]
) -> None:
    student, teacher = maps
    for loss in (channel_distribution_kd, logit_kd, channel_kd, pixel_relation_kd, attention_kd):
        with pytest.raises(TypeError, match=f"^teacher.*: expected a dense tensor, got .*{message}"):
            loss(student, make(teacher))
    with pytest.raises(TypeError, match=f"^weight: expected a dense tensor, got .*{message}"):
        channel_kd(student, teacher, weight=make(torch.ones(2, 16)))


def test_rejects_a_sparse_mask(maps: tuple[Tensor, Tensor]) -> None:
    mask = torch.ones(2, 100, dtype=torch.bool).to_sparse()
    for loss in (logit_kd, attention_kd):
        with pytest.raises(TypeError, match=r"^pixel_mask: expected a dense tensor, got layout sparse_coo"):
            loss(*maps, pixel_mask=mask)


# --- tensors without values -------------------------------------------------------------------------------------------


def masked(student: Tensor, teacher: Tensor) -> list[Tensor]:
    """Return the results of every loss that checks values of masks or weights."""
    batch, device = student.shape[0], student.device
    pixels = torch.ones(batch, 100, dtype=torch.bool, device=device)
    weight = torch.ones(batch, 16, device=device)
    rows = [x.flatten(2).mT for x in (student, teacher)]
    valid = torch.ones(batch, 16, dtype=torch.bool, device=device)
    return [
        logit_kd(student, teacher, pixel_mask=pixels),
        channel_kd(student, teacher, weight=weight),
        channel_distribution_kd(student, teacher, weight=weight),
        pixel_relation_kd(student, teacher, weight=pixels.float()),
        cross_modal_kd_from_logits(*rows, pixel_mask=pixels, word_mask=valid),  # type: ignore[list-item]
    ]


def test_fake_and_meta_tensors(maps: tuple[Tensor, Tensor]) -> None:
    with FakeTensorMode() as mode:
        assert [x.shape for x in masked(*(mode.from_tensor(x) for x in maps))] == [()] * 5
    assert [x.shape for x in masked(*(x.to("meta") for x in maps))] == [()] * 5


def test_batched_masks_and_weights(maps: tuple[Tensor, Tensor]) -> None:
    student, teacher = maps
    mask, weight = torch.arange(200).reshape(2, 100) % 3 > 0, torch.arange(1.0, 33).reshape(2, 16)

    def one(s: Tensor, t: Tensor, m: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        s, t, m, w = (x[None] for x in (s, t, m, w))
        return logit_kd(s, t, pixel_mask=m), channel_kd(s, t, weight=w), from_logits_kd(s, t, pixel_mask=m)

    got = torch.func.vmap(one)(student, teacher, mask, weight)
    for i in range(2):
        for value, expected in zip(got, one(student[i], teacher[i], mask[i], weight[i]), strict=True):
            torch.testing.assert_close(value[i], expected, rtol=1e-4, atol=1e-7)


def test_values_are_checked_where_they_exist(maps: tuple[Tensor, Tensor]) -> None:
    nothing = torch.zeros(2, 100, dtype=torch.bool)
    with pytest.raises(ValueError, match="pixel_mask: no valid pixel"):
        logit_kd(*maps, pixel_mask=nothing)
    with pytest.raises(ValueError, match="weight: is 0 everywhere"):
        channel_kd(*maps, weight=torch.zeros(2, 16))

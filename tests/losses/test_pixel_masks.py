"""Pixel masks of channel_kd, pixel_relation_kd and channel_distribution_kd; feature_kd's are in test_feature_kd.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck

from fastkd import losses
from fastkd.losses import (
    ChannelDistributionKD,
    ChannelKD,
    PixelRelationKD,
    channel_distribution_kd,
    channel_kd,
    pixel_relation_kd,
)

MODULES = {channel_kd: ChannelKD, pixel_relation_kd: PixelRelationKD, channel_distribution_kd: ChannelDistributionKD}
OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    (channel_kd, {}),
    (channel_kd, {"centered": True, "patches": 2, "weight": "attention", "temperature": (0.1, 0.2)}),
    (channel_kd, {"similarity": "mean", "distance": "mse", "across_batch": True, "centered": True}),
    (pixel_relation_kd, {}),
    (pixel_relation_kd, {"similarity": "mean", "temperature": (1.0, 0.5), "cross_image": True}),
    (pixel_relation_kd, {"distance": "mse"}),
    (pixel_relation_kd, {"distance": "mse", "cross_image": True}),
    (pixel_relation_kd, {"distance": "row_cosine", "similarity": "dot"}),
    (channel_distribution_kd, {"temperature": (4.0, 2.0)}),
    (channel_distribution_kd, {"guide": "own", "weight": "attention"}),
]
MASK = torch.tensor([[[1, 1, 0, 1], [0, 1, 1, 1]], [[1, 0, 1, 1], [1, 1, 0, 0]]]).bool()  # (B, H, W)
with_options = pytest.mark.parametrize(
    ("f", "options"), OPTIONS, ids=lambda x: getattr(x, "__name__", None) or " ".join(f"{k}={v}" for k, v in x.items())
)


def maps(dtype: torch.dtype = torch.float32, channels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(2, channels, 2, 4, generator=generator, dtype=torch.float64).to(dtype)
    return draw(), draw()


def run(f: Any, student: Tensor, teacher: Tensor, **options: Any) -> list[Tensor]:
    student = student.clone().requires_grad_()
    loss = f(student, teacher, **options)
    return [loss.detach(), *grad(loss.sum(), student)]


def filled(x: Tensor, value: float, mask: Tensor = MASK) -> Tensor:
    return torch.where(mask[:, None], x, torch.tensor(value, dtype=x.dtype))


@with_options
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_masked_pixels_hold_affects_nothing(f: Any, options: Any, backend: str, dtype: torch.dtype) -> None:
    student, teacher = maps(dtype)
    for reduction in ("mean", "none"):
        given = options | {"pixel_mask": MASK, "backend": backend, "reduction": reduction}
        want = run(f, student, teacher, **given)
        assert all(x.isfinite().all() for x in want)
        assert want[1].abs().amax(1)[~MASK].max() == 0
        assert want[1].abs().max() > 0
        for bad in (float("nan"), float("inf"), -float("inf"), 60000.0):
            for s, t in ((bad, 0.0), (0.0, bad), (bad, bad)):
                for a, b in zip(run(f, filled(student, s), filled(teacher, t), **given), want, strict=True):
                    assert torch.equal(a, b)


@with_options
def test_a_mask_of_valid_pixels_changes_nothing(f: Any, options: Any) -> None:
    args = maps(torch.float64)
    want = run(f, *args, **options)
    for mask in (torch.ones_like(MASK), torch.ones(2, 8, dtype=torch.bool)):
        torch.testing.assert_close(run(f, *args, pixel_mask=mask, **options), want)


@with_options
def test_gradients(f: Any, options: Any) -> None:
    student, teacher = maps(torch.float64)
    assert gradcheck(lambda s: f(s, teacher, pixel_mask=MASK, **options), student.requires_grad_())
    inside = torch.func.grad(lambda s: f(s, teacher, pixel_mask=MASK, **options))(student.detach())
    torch.testing.assert_close(inside, run(f, student.detach(), teacher, pixel_mask=MASK, **options)[1])


@pytest.mark.parametrize(("f", "options"), [OPTIONS[i] for i in (1, 4, 6, 9)])
def test_one_compiled_graph_for_every_mask(f: Any, options: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for i, mask in enumerate((MASK, MASK.flip(2))):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = run(compiled, *maps(), pixel_mask=mask, **options, backend="cpu")
        torch.testing.assert_close(got, run(f, *maps(), pixel_mask=mask, **options, backend="cpu"))
    torch.compiler.reset()


@pytest.mark.parametrize("similarity", ["cosine", "dot", "mean"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_masked_columns_have_no_probability_where_all_logits_are_negative(similarity: str, backend: str) -> None:
    """Rows of one image point away from those of the other, and far: without care masked columns of 0 would win."""
    student, teacher = maps()
    student, teacher = (x.abs() * 300 * torch.tensor([1.0, -1.0])[:, None, None, None] for x in (student, teacher))
    options = {"similarity": similarity, "cross_image": True, "temperature": 0.05 if similarity == "cosine" else 10.0}
    same = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]).bool().expand(2, 2, 4)
    got = pixel_relation_kd(student, teacher, pixel_mask=same, backend=backend, **options, reduction="none")
    cut = [x.flatten(2)[:, :, same[0].flatten()] for x in (student, teacher)]
    want = pixel_relation_kd(*(x.double() for x in cut), backend="reference", **options, reduction="none")
    torch.testing.assert_close(got[same.flatten(1)].reshape(2, -1).double(), want, rtol=1e-3, atol=1e-4)
    assert want.max() > 1e-2


def test_patches_without_a_valid_pixel_do_not_count() -> None:
    student, teacher = maps()
    mask = torch.ones_like(MASK)
    mask[0, :, 2:] = False  # two of the four patches of the first sample
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    for given in (None, weight):
        rows = channel_kd(student, teacher, patches=2, weight=given, pixel_mask=mask, reduction="none")
        assert rows.shape == (8, 3)
        assert rows[[1, 3]].abs().max() == 0
        left = torch.tensor([0, 2, 4, 5, 6, 7])
        whole = torch.ones(8, 3) if given is None else weight.repeat_interleave(4, 0)
        got = channel_kd(student, teacher, patches=2, weight=given, pixel_mask=mask)
        torch.testing.assert_close(got, rows[left].sum() / whole[left].sum())


def test_weights_of_valid_pixels_alone_count() -> None:
    weight = torch.arange(1.0, 17).reshape(2, 8)
    rows = pixel_relation_kd(*maps(), pixel_mask=MASK, reduction="none")
    valid = MASK.flatten(1)
    for w in (weight, torch.where(valid, weight, float("nan"))):
        got = pixel_relation_kd(*maps(), pixel_mask=MASK, weight=w)
        torch.testing.assert_close(got, (rows * weight)[valid].sum() / weight[valid].sum())
    with pytest.raises(ValueError, match="weight: is 0 at every valid pixel"):
        pixel_relation_kd(*maps(), pixel_mask=MASK, weight=(~valid).float())


@pytest.mark.parametrize("f", [channel_kd, channel_distribution_kd])
def test_an_aligner_gets_no_gradient_from_masked_pixels(f: Any) -> None:
    (student, _), (_, teacher) = maps(channels=5), maps()
    results = []
    for value in (0.0, float("nan")):
        torch.manual_seed(0)
        made = MODULES[f](student_channels=5, teacher_channels=3)
        loss = made(filled(student, value), filled(teacher, value), pixel_mask=MASK)
        results.append([loss, *grad(loss, made.aligner.parameters())])
    assert results[0][1].abs().max() > 0
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("f", MODULES)
def test_errors(f: Any) -> None:
    args = maps()
    empty = MASK.clone()
    empty[1] = False
    for call in (f, MODULES[f]()):
        with pytest.raises(ValueError, match=r"pixel_mask: no valid pixel in sample\(s\) 1; drop such samples"):
            call(*args, pixel_mask=empty)
        with pytest.raises(TypeError, match="pixel_mask: expected a bool tensor"):
            call(*args, pixel_mask=MASK.float())
        with pytest.raises(ValueError, match=r"pixel_mask: expected shape \(2, 2, 4\) or \(2, 8\), got \(2, 4\)"):
            call(*args, pixel_mask=MASK[:, 0])


def test_errors_of_channel_kd() -> None:
    student, teacher = maps()
    empty = torch.zeros_like(MASK)
    one = torch.stack([MASK[0], empty[0]])
    assert channel_kd(student, teacher, pixel_mask=one, across_batch=True).isfinite()
    with pytest.raises(ValueError, match="pixel_mask: no valid pixel in the batch"):
        channel_kd(student, teacher, pixel_mask=empty, across_batch=True)
    with pytest.raises(ValueError, match=r"pixel_mask: the maps differ in size, \(2, 4\) and \(2, 2\); pass a pair"):
        channel_kd(student, teacher[..., :2], pixel_mask=MASK)
    with pytest.raises(ValueError, match=r"pixel_mask\[1\]: expected shape \(2, 2, 2\)"):
        channel_kd(student, teacher[..., :2], pixel_mask=(MASK, MASK))
    with pytest.raises(ValueError, match="pixel_mask: expected a mask or a pair"):
        channel_kd(student, teacher, pixel_mask=(MASK,))


def test_float8_maps() -> None:
    student, teacher = (x.to(torch.float8_e4m3fn) for x in maps())
    for f in MODULES:
        got = f(student, teacher, pixel_mask=MASK, backend="reference")
        torch.testing.assert_close(got, f(student.float(), teacher.float(), pixel_mask=MASK))


def test_every_loss_of_maps_takes_a_mask() -> None:
    for f in (*MODULES, losses.feature_kd):
        assert f(*maps(), pixel_mask=MASK).isfinite()


def test_patches_of_which_none_is_valid_are_an_error() -> None:
    student, teacher = maps()
    masks = torch.zeros(2, 2, 2, 4, dtype=torch.bool)  # of student and teacher
    masks[0, :, 0, 0] = masks[1, :, 1, 3] = True
    options: dict[str, Any] = {"patches": 2}
    with pytest.raises(ValueError, match="pixel_mask: no patch has valid pixels of both networks; use fewer patches"):
        channel_kd(student, teacher, pixel_mask=tuple(masks), **options)
    masks[1, 0, 0, 0] = True  # now one of the first sample
    weight = torch.tensor([[0.0], [1.0]]).expand(2, 3)
    with pytest.raises(ValueError, match="weight: is 0 in every valid patch"):
        channel_kd(student, teacher, pixel_mask=tuple(masks), weight=weight, **options)
    assert channel_kd(student, teacher, pixel_mask=tuple(masks), **options).isfinite()

"""feature_kd and FeatureKD: the formula written out, gradients, masks, weights, layouts, and the aligner."""

from __future__ import annotations

import copy
import inspect
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distiller_tools import Toy, make_batch, make_distiller
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from fastkd import Term
from fastkd.distill import recipe
from fastkd.distill.terms import term_value
from fastkd.losses import FeatureKD, feature_kd

DISTANCES = ("mse", "cosine", "smooth_l1")
NORMALIZE = (None, "l2", "standardize")
B, C, H, W = 2, 3, 2, 4


def maps(shape: tuple[int, ...] = (B, C, H, W), seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(shape, generator=g, dtype=torch.float64) + 0.5 for _ in range(2))
    return student, teacher


def some_mask() -> Tensor:
    mask = torch.rand(B, H, W, generator=torch.Generator().manual_seed(4)) < 0.6
    assert mask.sum((1, 2)).tolist() == [6, 4]  # weights of a sample depend on its number of valid pixels
    return mask


def normalised(pixels: Tensor, normalize: str | None) -> Tensor:
    """Return pixels (n, C) normalised in their own dtype."""
    if normalize == "l2":
        return pixels / pixels.norm(dim=1, keepdim=True)
    if normalize == "standardize":
        return (pixels - pixels.mean(0)) / (pixels.std(0, correction=0) + 1e-6)
    return pixels


def formula(student: Tensor, teacher: Tensor, distance: str, normalize: str | None, mask: Tensor) -> Tensor:
    """Return the distance of the n valid pixels of two maps, in reading order."""
    s, t = (normalised(x.movedim(1, -1)[mask], normalize) for x in (student, teacher))  # (n, C)
    if distance == "cosine":
        return 1 - (s * t).sum(1) / (s.norm(dim=1) * t.norm(dim=1))
    d = s - t
    return (d**2 if distance == "mse" else torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5)).mean(1)


def attention(teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the attention weights of the valid pixels, in reading order."""
    strength = teacher.abs().mean(1) / 0.5
    return torch.cat([s[m].softmax(0) * m.sum() for s, m in zip(strength, mask, strict=True)])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("distance", DISTANCES)
def test_definition(distance: str, normalize: str | None, masked: bool) -> None:
    student, teacher = maps()
    mask = some_mask() if masked else torch.ones(B, H, W, dtype=torch.bool)
    rows = formula(student, teacher, distance, normalize, mask)
    given = torch.rand(B, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    hidden = (~mask).unsqueeze(1)
    student, teacher = student.masked_fill(hidden, float("nan")), teacher.masked_fill(hidden, float("inf"))
    given_or_nan = given.masked_fill(~mask, float("nan"))
    w: Tensor
    for weight, w in (
        (None, torch.ones_like(rows)),
        (given_or_nan, given[mask]),
        ("attention", attention(teacher, mask)),
    ):
        options: dict[str, Any] = {"distance": distance, "normalize": normalize, "weight": weight}
        if masked:
            options["pixel_mask"] = mask
        want = torch.zeros(B, H, W, dtype=torch.float64)
        want[mask] = w * rows
        torch.testing.assert_close(feature_kd(student, teacher, reduction="none", **options), want)
        torch.testing.assert_close(feature_kd(student, teacher, reduction="sum", **options), want.sum())
        torch.testing.assert_close(feature_kd(student, teacher, **options), want.sum() / w.sum())
    if masked:
        flat = feature_kd(student, teacher, distance=distance, normalize=normalize, pixel_mask=mask.flatten(1))
        torch.testing.assert_close(flat, rows.mean())


def test_standardized_mse_is_twice_one_minus_the_correlation() -> None:
    student, teacher = maps()
    r = [
        torch.corrcoef(torch.stack([x.movedim(1, 0)[c].flatten() for x in (student, teacher)]))[0, 1] for c in range(C)
    ]
    want = 2 * (1 - torch.stack(r)).mean()
    torch.testing.assert_close(feature_kd(student, teacher, normalize="standardize"), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("distance", DISTANCES)
def test_first_and_second_derivatives(distance: str, normalize: str | None) -> None:
    student, teacher = maps((B, 2, 1, 2))
    mask = torch.tensor([[[True, True]], [[False, True]]])

    def loss(x: Tensor) -> Tensor:
        return feature_kd(x, teacher, distance=distance, normalize=normalize, weight="attention", pixel_mask=mask)

    assert gradcheck(loss, (student.requires_grad_(),))
    assert gradgradcheck(loss, (student,))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_masked_pixels_change_neither_loss_nor_gradient(normalize: str | None, aligned: bool) -> None:
    """Also with an aligner, in whose gradient 0 would meet the NaN, and a teacher of another size."""
    torch.manual_seed(0)
    student, teacher = maps((B, C, 4, 8))[0], maps(seed=1)[1]
    mask = torch.ones(B, 4, 8, dtype=torch.bool)
    mask[0, :, 4:], mask[1] = False, False  # half of a sample, and one sample
    widths = (C, C) if aligned else ()
    module = FeatureKD(*widths, aligner="mlp", resize="bilinear", normalize=normalize, weight="attention").double()
    results = []
    for value in (0.0, float("nan"), float("inf")):
        s = student.masked_fill(~mask.unsqueeze(1), value).requires_grad_()
        t = teacher.clone()
        t[0, :, :, 2:] = t[1] = value
        loss = module(s, t, pixel_mask=mask)
        results.append([loss, *torch.autograd.grad(loss, [s, *module.parameters()])])
    assert torch.isfinite(results[0][0])
    assert results[0][1][mask.unsqueeze(1).expand_as(student)].abs().min() > 0
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    cropped = feature_kd(student[:1, :, :, :4], F.interpolate(teacher[:1, :, :, :2], (4, 4), mode="bilinear"))
    plain = FeatureKD(resize="bilinear")(student, teacher, pixel_mask=mask)
    torch.testing.assert_close(plain, cropped)  # the masked half does not reach across the edge


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 3), (16, 16)])
def test_every_valid_pixel_has_a_resized_teacher(size: tuple[int, int]) -> None:
    student, teacher = maps((4, 1, 6, 8))[0], torch.ones(4, 1, *size, dtype=torch.float64)
    mask = torch.rand(4, 6, 8, generator=torch.Generator().manual_seed(5)) < 0.2
    rows = FeatureKD(resize="bilinear", reduction="none")(student, teacher, pixel_mask=mask)
    torch.testing.assert_close(rows, torch.where(mask, (student[:, 0] - 1) ** 2, 0.0))


def test_constant_and_zero_features_have_finite_gradients() -> None:
    for normalize in NORMALIZE:
        for distance in DISTANCES:
            student, teacher = (x.float() for x in maps())
            student[:, 0], student[0, :, 0, 0] = 0, 0  # a dead channel and a pixel of zeros
            loss = feature_kd(student.requires_grad_(), teacher, distance=distance, normalize=normalize)
            loss.backward()
            assert student.grad is not None
            assert student.grad.abs().max() < 10, (normalize, distance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision(dtype: torch.dtype) -> None:
    shape, every = (2, 16, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
    for distance in DISTANCES:
        for normalize in NORMALIZE:
            error = {"fastkd": [0.0, 0.0], "formula": [0.0, 0.0]}
            for seed in range(4):
                student, teacher = (x.to(dtype) for x in maps(shape, seed))

                def run(call: Any, *pair: Tensor) -> tuple[Tensor, Tensor]:
                    leaf = pair[0].clone().requires_grad_()
                    loss = call(leaf, pair[1])
                    return loss.double().detach(), torch.autograd.grad(loss, leaf)[0].double()

                def plain(s: Tensor, t: Tensor) -> Tensor:
                    return formula(s, t, distance, normalize, every).mean()  # noqa: B023

                want = run(plain, student.double(), teacher.double())
                for name, call in (
                    ("fastkd", lambda s, t: feature_kd(s, t, distance=distance, normalize=normalize)),  # noqa: B023
                    ("formula", plain),
                ):
                    for i, (got, exact) in enumerate(zip(run(call, student, teacher), want, strict=True)):
                        error[name][i] = max(error[name][i], ((got - exact).norm() / exact.norm()).item())
            for ours, theirs in zip(error["fastkd"], error["formula"], strict=True):
                assert ours <= max(2 * theirs, 2**-23), (distance, normalize, error)


def test_equals_when_compiled_as_one_graph() -> None:
    torch.manual_seed(0)
    student, teacher = (x.float() for x in maps((B, C, 4, 4)))
    teacher = teacher[..., ::2].repeat(1, 2, 1, 1)  # (B, 2 C, 4, 2)
    mask = torch.rand(B, 4, 4) < 0.7
    module = FeatureKD(C, 2 * C, resize="bilinear", normalize="standardize", weight="attention")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    student.requires_grad_()
    for call in (module, compiled):
        loss = call(student, teacher, pixel_mask=mask)
        got = [loss, *torch.autograd.grad(loss, [student, *module.parameters()])]
        if call is module:
            want = got
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_tensor_kinds() -> None:
    student, teacher = maps()
    want = feature_kd(student, teacher, distance="smooth_l1")
    with torch.inference_mode():
        inference = teacher.clone()
    student = student.to(memory_format=torch.channels_last).requires_grad_()
    loss = feature_kd(student, inference, distance="smooth_l1")
    loss.backward()
    torch.testing.assert_close(loss, want)
    assert feature_kd(student.float().to(torch.float8_e4m3fn), teacher.half()).dtype == torch.float32
    assert feature_kd(student, teacher.half()).dtype == torch.float64


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_nan_and_inf_propagate(normalize: str | None) -> None:
    for value in (float("nan"), float("inf")):
        for which in (0, 1):
            pair = maps()
            pair[which][0, 0, 0, 0] = value
            rows = feature_kd(*pair, normalize=normalize, reduction="none")
            assert not torch.isfinite(rows[0, 0, 0])
            assert normalize == "standardize" or torch.isfinite(rows[1]).all()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"student": torch.ones(2, 16, 3)},
            ValueError,
            r"student: expected shape \(B, C, H, W\), got \(2, 16, 3\).*x\.mT",
        ),
        ({"teacher": torch.ones(2, 3, 16)}, ValueError, r"teacher: expected shape .* look alike"),
        (
            {"student": torch.ones(2, 5, 4, 4)},
            ValueError,
            r"shapes differ, \(2, 5, 4, 4\) and \(2, 3, 4, 4\); .*FeatureKD",
        ),
        ({"student": torch.ones(2, 3, 4, 4).long()}, TypeError, "student: expected a floating-point tensor"),
        ({"student": torch.ones(2, 3, 0, 4)}, ValueError, "student: is empty"),
        ({"student": None}, TypeError, "student: expected a tensor"),
        ({"teacher": torch.ones(2, 3, 4, 4, requires_grad=True)}, ValueError, "teacher: requires grad.*detach"),
        ({"teacher": torch.ones(2, 3, 4, 4, device="meta")}, ValueError, "teacher: is on meta"),
        ({"distance": "l1"}, ValueError, "distance: expected one of 'mse', 'cosine', 'smooth_l1', got 'l1'"),
        ({"normalize": "layer"}, ValueError, "normalize: expected one of None, 'l2', 'standardize', got 'layer'"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of"),
        ({"weight": torch.ones(2, 16)}, ValueError, r"weight: expected .*\(2, 4, 4\), got shape \(2, 16\)"),
        ({"weight": -torch.ones(2, 4, 4)}, ValueError, "weight: expected values ≥ 0"),
        ({"weight": "focus"}, ValueError, "weight: expected None, 'attention' or a tensor"),
        ({"pixel_mask": torch.ones(2, 4, 4)}, TypeError, "pixel_mask: expected a bool tensor"),
        ({"pixel_mask": torch.ones(2, 8).bool()}, ValueError, r"pixel_mask: expected shape \(2, 4, 4\) or \(2, 16\)"),
        ({"pixel_mask": torch.zeros(2, 4, 4).bool()}, ValueError, "pixel_mask: no valid pixel in the batch"),
        (
            {"pixel_mask": torch.eye(4).bool().expand(2, 4, 4), "weight": (1 - torch.eye(4)).expand(2, 4, 4)},
            ValueError,
            "weight: is 0 at every valid pixel",
        ),
    ],
)
def test_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"student": torch.ones(2, 3, 4, 4), "teacher": torch.ones(2, 3, 4, 4)} | change
    student, teacher = given.pop("student"), given.pop("teacher")
    with pytest.raises(kind, match=message):
        feature_kd(student, teacher, **given)
    if {"distance", "normalize", "reduction"}.isdisjoint(change):  # these are errors of the module's constructor
        module = FeatureKD(resize="bilinear")
        with pytest.raises(kind, match=message):
            module(student, teacher, **given)


def test_one_pixel_cannot_be_standardized() -> None:
    with pytest.raises(ValueError, match="'standardize' needs at least two pixels"):
        feature_kd(torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1), normalize="standardize")


def test_module_takes_flat_channels_whose_width_it_knows() -> None:
    torch.manual_seed(0)
    student, teacher = maps()[0], maps((B, 5, H, W))[1]
    module = FeatureKD(C, 5, reduction="none").double()
    weight, mask = torch.rand(B, H, W, dtype=torch.float64), some_mask()
    want = module(student, teacher, weight=weight, pixel_mask=mask)
    flat = (student.flatten(2), teacher.flatten(2))
    got = module(*flat, weight=weight.flatten(1), pixel_mask=mask.flatten(1))
    torch.testing.assert_close(got, want.flatten(1))
    for pair, message in (
        ((flat[0].mT, flat[1].mT), r"student: expected 3 channels .*got shape \(2, 8, 3\); tokens .*x\.mT"),
        ((flat[0], flat[1].mT), "teacher: expected 5 channels in dimension 1"),
        ((flat[0][..., :3], flat[1][..., :3]), r"student: shape \(2, 3, 3\) may be channels .* or tokens"),
        ((flat[0], teacher), "dimensions differ, 3 and 4"),
        ((flat[0], flat[1][..., :6]), "shapes differ"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureKD(C, 5, resize="bilinear").double()(*pair)


def test_module_options() -> None:
    arguments = inspect.signature(feature_kd).parameters
    options = inspect.signature(FeatureKD).parameters
    own = {"student_channels", "teacher_channels", "aligner", "resize"}
    assert {name: one.default for name, one in options.items() if name not in own} == {
        name: one.default for name, one in arguments.items() if name not in {"student", "teacher", "pixel_mask"}
    }
    student, teacher = maps()
    module = FeatureKD(distance="cosine", normalize="l2")
    assert module.aligner is None
    assert "distance='cosine', normalize='l2', weight=None, reduction='mean', resize=None" in repr(module)
    for duplicate in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(duplicate(student, teacher), feature_kd(student, teacher, distance="cosine"))
    module = FeatureKD(C, C)  # equal widths: channels of two networks have no common order
    aligner = module.aligner
    assert aligner is not None
    want = feature_kd(aligner(student.float()), teacher.float())
    torch.testing.assert_close(module(student.float(), teacher.float()), want)
    for bad, kind in (((3, None), ValueError), ((0, 3), ValueError), ((3.0, 3), TypeError)):
        with pytest.raises(kind, match="channels"):
            FeatureKD(*bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="aligner: expected one of 'conv', 'mlp', got 'linear'"):
        FeatureKD(3, 4, aligner="linear")
    with pytest.raises(ValueError, match="resize: expected one of None, 'bilinear', got True"):
        FeatureKD(3, 4, resize=True)  # type: ignore[arg-type]


def test_named_term() -> None:
    student, teacher = maps()
    [term] = recipe(["feature"])
    value = term_value(term, SimpleNamespace(decoder_features=student), SimpleNamespace(decoder_features=teacher), {})
    every = torch.ones(B, H, W, dtype=torch.bool)
    torch.testing.assert_close(value, formula(student, teacher, "cosine", None, every).mean())


@pytest.mark.parametrize(("aligner", "parameters"), [("conv", 1), ("mlp", 2)])
def test_aligner_trains_and_is_not_part_of_the_student(aligner: str, parameters: int) -> None:
    batch, loss = make_batch(), FeatureKD(4, 6, aligner=aligner)
    distiller = make_distiller(Term(loss, "features"), student=Toy(4), teacher=Toy(6).eval().requires_grad_(False))
    aligned = list(loss.parameters())
    before = [p.detach().clone() for p in aligned]
    assert len(aligned) == parameters
    assert list(distiller.student.state_dict()) == list(Toy(4).state_dict())
    assert {id(p) for p in aligned} <= {id(p) for p in distiller.parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        output = distiller(batch)
        output.loss.backward()
        optimizer.step()
        losses.append(output.terms["feature_kd"].item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, aligned, strict=True))

"""Invalid input to a loss: one clear error that names the argument, the value received, and the fix."""

from __future__ import annotations

import math

import pytest
import torch

import fastkd
from fastkd.losses import (
    AttentionKD,
    ChannelAttentionKD,
    ChannelDistributionKD,
    ChannelKD,
    CrossModalKD,
    LogitKD,
    PixelRelationKD,
    channel_distribution_kd,
    channel_kd,
    cross_modal_kd,
    cross_modal_kd_from_logits,
    logit_kd,
    pixel_relation_kd,
)


def maps(*shape):
    return torch.randn(*(shape or (2, 3, 4, 4)))


def call(f, *, student=None, teacher=None, **options):
    """Call a loss with valid inputs, replaced by those given."""
    if f is cross_modal_kd:
        inputs = {
            "student_pixels": maps(2, 6, 4),
            "student_words": maps(2, 5, 4),
            "teacher_pixels": maps(2, 6, 4),
            "teacher_words": maps(2, 5, 4),
        }
        if student is not None:
            inputs["student_pixels"] = student
        if teacher is not None:
            inputs["teacher_pixels"] = teacher
        return f(**(inputs | options))
    default = (2, 6, 5) if f is cross_modal_kd_from_logits else (2, 3, 4, 4)
    return f(maps(*default) if student is None else student, maps(*default) if teacher is None else teacher, **options)


MAP_LOSSES = [channel_kd, pixel_relation_kd, channel_distribution_kd]
LOSSES = [*MAP_LOSSES, logit_kd, cross_modal_kd, cross_modal_kd_from_logits]
STUDENT = {cross_modal_kd: "student_pixels", cross_modal_kd_from_logits: "student_logits", logit_kd: "student_logits"}


@pytest.mark.parametrize("f", LOSSES)
def test_common_errors(f):
    student = STUDENT.get(f, "student")
    teacher = student.replace("student", "teacher")
    good = (2, 6, 4) if f is cross_modal_kd else (2, 6, 5) if f is cross_modal_kd_from_logits else (2, 3, 4, 4)
    call(f)

    def fails(kind, pattern, **given):
        with pytest.raises(kind, match=pattern):
            call(f, **given)

    fails(ValueError, r"reduction: expected one of 'mean', 'sum', 'none', got 'avg'", reduction="avg")
    fails(ValueError, r"temperature: expected a finite number above 0, got 0", temperature=0)
    fails(ValueError, r"temperature: .* got -1\.0", temperature=-1.0)
    fails(ValueError, r"temperature: .* got inf", temperature=math.inf)
    fails(ValueError, r"temperature: .* got nan", temperature=math.nan)
    fails(TypeError, r"temperature: expected a real number or a tensor that holds one, got a tensor of shape \(2,\)",
          temperature=torch.ones(2))  # fmt: skip
    fails(TypeError, "temperature: expected a real number .*, got str", temperature="1")
    fails(ValueError, "temperature: expected a finite number above 0, got 0", temperature=torch.tensor(0.0))
    fails(TypeError, r"temperature: .* got bool", temperature=True)
    fails(ValueError, r"backend: expected one of .*got 'gpu'", backend="gpu")
    fails(TypeError, rf"{student}: expected a floating-point tensor, got torch.int64.*\.float\(\)",
          student=torch.ones(good, dtype=torch.int64))  # fmt: skip
    fails(TypeError, rf"{teacher}: expected a floating-point tensor, got torch.uint8",
          teacher=torch.ones(good, dtype=torch.uint8))  # fmt: skip
    fails(TypeError, rf"{student}: expected a floating-point tensor, got torch.complex64",
          student=torch.ones(good, dtype=torch.complex64))  # fmt: skip
    fails(TypeError, rf"{student}: expected a tensor of shape .*, got list", student=[[1.0]])
    fails(ValueError, rf"{student}: expected shape \(B, .*, got \(2,\)", student=maps(2))
    fails(ValueError, rf"{teacher}: requires grad.*detach", teacher=maps(*good).requires_grad_())
    fails(ValueError, rf"{teacher}: is on meta, but {student}.* is on cpu; .*\.to\(device\)",
          teacher=torch.zeros(good, device="meta"))  # fmt: skip
    empty = (0, *good[1:])
    fails(ValueError, rf"{student}: is empty, shape \(0, ", student=maps(*empty), teacher=maps(*empty))
    with torch.no_grad():  # no gradients are recorded
        call(f, teacher=maps(*good).requires_grad_())


@pytest.mark.parametrize("f", [channel_kd, pixel_relation_kd])
def test_relation_losses_reject_unknown_options(f):
    with pytest.raises(ValueError, match="similarity: expected one of 'cosine', 'mean', 'dot', got 'l2'"):
        call(f, similarity="l2")
    with pytest.raises(ValueError, match="distance: expected one of 'kl', 'mse', 'row_cosine', got 'l1'"):
        call(f, distance="l1")
    with pytest.raises(fastkd.BackendUnavailable, match="cuda"):
        call(f, backend="cuda")


@pytest.mark.parametrize("f", [cross_modal_kd, cross_modal_kd_from_logits])
def test_cuda_is_unavailable_on_cpu_tensors(f):
    with pytest.raises(fastkd.BackendUnavailable, match="cuda"):
        call(f, backend="cuda")


@pytest.mark.parametrize(
    ("f", "student", "teacher", "pattern"),
    [
        (channel_kd, (2, 3, 4, 4), (2, 5, 4, 4), "numbers of channels differ, 3 and 5; .*ChannelKD"),
        (channel_kd, (2, 3, 4, 4), (1, 3, 4, 4), "batch sizes differ, 2 and 1"),
        (pixel_relation_kd, (2, 3, 4, 4), (2, 3, 4, 2), r"maps differ, \(4, 4\) and \(4, 2\); resize"),
        (pixel_relation_kd, (2, 3, 4, 4), (1, 3, 4, 4), "batch sizes differ, 2 and 1"),
        (channel_distribution_kd, (2, 3, 4, 4), (2, 5, 4, 4), r"shapes differ, \(2, 3, 4, 4\) and \(2, 5, 4, 4\)"),
        (logit_kd, (2, 2, 4, 4), (2, 2, 8, 8), "student_logits and teacher_logits: shapes differ"),
        (cross_modal_kd, (2, 7, 4), (2, 6, 4), r"student_pixels and teacher_pixels: \(B, N\) differ, \(2, 7\) and"),
        (cross_modal_kd, (2, 6, 3), (2, 6, 4), "student_pixels and student_words: widths D differ, 3 and 4"),
        (cross_modal_kd, (3, 6, 4), (3, 6, 4), "student_pixels and student_words: batch sizes differ, 3 and 2"),
        (cross_modal_kd_from_logits, (2, 7, 5), (2, 6, 5), r"\(B, N\) differ, \(2, 7\) and \(2, 6\)"),
        (cross_modal_kd_from_logits, (2, 6, 4), (2, 6, 5), "numbers of words differ, 4 and 5"),
        (cross_modal_kd_from_logits, (2, 3, 6, 5), (2, 1, 6, 5), r"heads differ, \(3,\) and \(1,\); average"),
        (cross_modal_kd_from_logits, (2, 3, 6, 5), (2, 6, 5), r"heads differ, \(3,\) and \(\)"),
    ],
)
def test_rejects_mismatched_shapes(f, student, teacher, pattern):
    with pytest.raises(ValueError, match=pattern):
        call(f, student=maps(*student), teacher=maps(*teacher))


@pytest.mark.parametrize("f", MAP_LOSSES)
def test_weights(f):
    rows = 16 if f is pixel_relation_kd else 3

    def fails(kind, pattern, weight, **more):
        with pytest.raises(kind, match=pattern):
            call(f, weight=weight, **more)

    fails(ValueError, rf"weight: expected None.* = \(2, {rows}\), got shape \(2, 7\)", torch.ones(2, 7))
    fails(ValueError, "weight: expected values ≥ 0, got a minimum of -1", -torch.ones(2, rows))
    fails(ValueError, "weight: is 0 everywhere", torch.zeros(2, rows))
    fails(
        TypeError, "weight: expected a floating-point tensor, got torch.int64", torch.ones(2, rows, dtype=torch.int64)
    )
    fails(TypeError, "weight: expected None.*got float", 1.0)
    fails(ValueError, "weight: expected None.*got 'focus'", "focus")
    fails(ValueError, "weight: is on meta", torch.ones(2, rows, device="meta"))
    if f is pixel_relation_kd:
        fails(ValueError, "weight: expected None or a tensor.*got 'attention'", "attention")
    if f is channel_kd:
        fails(ValueError, r"\(1, C\) = \(1, 3\), got shape \(2, 3\)", torch.ones(2, 3), across_batch=True)


def test_patches():
    for pattern, patches in (
        (r"patches: 3 does not divide the student's map of 4×4", 3),
        (r"patches: expected a positive int, got 0", 0),
    ):
        with pytest.raises(ValueError, match=pattern):
            channel_kd(maps(), maps(), patches=patches)
    with pytest.raises(ValueError, match="patches: 2 does not divide the teacher's map of 5×4"):
        channel_kd(maps(), maps(2, 3, 5, 4), patches=2)
    with pytest.raises(TypeError, match="patches: expected a positive int, got float"):
        channel_kd(maps(), maps(), patches=2.0)
    with pytest.raises(ValueError, match="patches: across_batch=True forms one relation"):
        channel_kd(maps(), maps(), patches=2, across_batch=True)
    with pytest.raises(ValueError, match=r"student: patches=2 needs shape \(B, C, H, W\), got \(2, 3, 16\)"):
        channel_kd(maps(2, 3, 16), maps(2, 3, 16), patches=2)


def test_guides():
    with pytest.raises(ValueError, match="guide: expected one of None, 'own', 'teacher', got 'student'"):
        channel_distribution_kd(maps(), maps(), guide="student")
    with pytest.raises(ValueError, match="guide_temperature: expected a finite number above 0, got 0"):
        channel_distribution_kd(maps(), maps(), guide="own", guide_temperature=0)


@pytest.mark.parametrize("f", [cross_modal_kd, cross_modal_kd_from_logits, logit_kd])
def test_masks(f):
    def fails(kind, pattern, **given):
        with pytest.raises(kind, match=pattern):
            call(f, **given)

    pixels = 16 if f is logit_kd else 6
    full = torch.ones(2, pixels, dtype=torch.bool)
    call(f, pixel_mask=full)
    fails(TypeError, r"pixel_mask: expected a bool tensor \(True = valid\), got torch.float32.*\.bool\(\)",
          pixel_mask=full.float())  # fmt: skip
    fails(ValueError, rf"pixel_mask: expected shape .*\(2, {pixels}\).*, got \(2, 7\)",
          pixel_mask=torch.ones(2, 7, dtype=torch.bool))  # fmt: skip
    fails(TypeError, "pixel_mask: expected a bool tensor of shape .*, got list", pixel_mask=[True])
    fails(ValueError, "pixel_mask: is on meta", pixel_mask=full.to("meta"))
    fails(ValueError, "pixel_mask: no valid pixel", pixel_mask=~full)
    if f is logit_kd:
        vectors = {"student": maps(2, 3), "teacher": maps(2, 3)}
        fails(ValueError, r"pixel_mask: expected shape \(2,\), got \(2, 16\)", pixel_mask=full, **vectors)
        fails(TypeError, "labels: expected a tensor of integers, got torch.bool", labels=full)
        fails(ValueError, "labels: no valid pixel in the batch", labels=full.long(), ignore_index=1)
        fails(ValueError, "pixel_mask and labels: no valid pixel", labels=full.long(), ignore_index=1, pixel_mask=full)
        fails(ValueError, "ignore_index: 255 marks rows by their labels; pass labels=", ignore_index=255)
        fails(ValueError, "class_dim: expected a dimension of logits of shape .*, got 4", class_dim=4)
        fails(TypeError, "class_dim: expected an int, got float", class_dim=1.0)
        return
    one_empty = full.clone()
    one_empty[1] = False
    fails(ValueError, r"pixel_mask: no valid pixel in sample\(s\) 1; drop", pixel_mask=one_empty)
    words = torch.ones(2, 5, dtype=torch.bool)
    call(f, word_mask=words)
    no_word = words.clone()
    no_word[0] = False
    fails(ValueError, r"word_mask: no valid word in sample\(s\) 0; drop", word_mask=no_word)
    fails(TypeError, "word_mask: expected a bool tensor", word_mask=words.long())
    fails(ValueError, r"word_mask: expected shape \(2, 5\), got \(2, 6\)", word_mask=full)
    fails(TypeError, "word_mask: expected a bool tensor of shape .*, got str", word_mask="all")
    fails(ValueError, "word_mask: a pair of masks is for terms=.*pixel_pixel", word_mask=(words, words))
    only = {"pixel_pixel": 1.0}
    call(f, word_mask=(words, words), terms=only)
    fails(ValueError, r"word_mask\[1\]: no valid word in sample\(s\) 0", word_mask=(words, no_word), terms=only)
    fails(ValueError, "word_mask: a pair of masks .* got 3 masks", word_mask=(words, words, words), terms=only)


@pytest.mark.parametrize("f", [cross_modal_kd, cross_modal_kd_from_logits])
def test_terms(f):
    def fails(kind, pattern, terms):
        with pytest.raises(kind, match=pattern):
            call(f, terms=terms)

    fails(ValueError, "terms: expected one of 'pixel_to_word', .*, got 'pixel_word'", {"pixel_word": 1.0})
    fails(ValueError, "terms: is empty; name at least one of", {})
    fails(TypeError, "terms: expected None or a dict .*, got list", ["pixel_pixel"])
    fails(ValueError, r"terms\['pixel_pixel'\]: expected a finite weight ≥ 0, got -1", {"pixel_pixel": -1})
    fails(ValueError, r"terms\['pixel_pixel'\]: .* got nan", {"pixel_pixel": math.nan})
    fails(
        TypeError,
        r"terms\['pixel_pixel'\]: expected a real number or a tensor that holds one, got str",
        {"pixel_pixel": "1"},
    )


def test_cross_modal_kd_rejects_an_unknown_similarity():
    with pytest.raises(ValueError, match="similarity: expected one of 'scaled_dot', 'cosine', got 'dot'"):
        call(cross_modal_kd, similarity="dot")


@pytest.mark.parametrize("module", [ChannelKD, PixelRelationKD, ChannelDistributionKD, CrossModalKD, LogitKD])
def test_modules_check_options_at_construction(module):
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        module(temperature=0.0)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        module(reduction="max")


@pytest.mark.parametrize("module", [ChannelKD, ChannelDistributionKD])
def test_aligners(module):
    with pytest.raises(ValueError, match="student_channels and teacher_channels: give both or neither, got 3 and None"):
        module(student_channels=3)
    with pytest.raises(ValueError, match="teacher_channels: expected a positive int or None, got 0"):
        module(student_channels=3, teacher_channels=0)
    with pytest.raises(TypeError, match="student_channels: expected a positive int or None, got float"):
        module(student_channels=3.0, teacher_channels=4)
    with pytest.raises(ValueError, match=r"student: expected 3 channels in dimension 1 .* got shape \(2, 5, 4, 4\)"):
        module(student_channels=3, teacher_channels=4)(maps(2, 5, 4, 4), maps(2, 4, 4, 4))


def test_values_are_checked_on_the_cpu_only():
    """Reading values would stall a GPU's stream; of a meta tensor only the shapes are checked."""
    m = lambda *shape: torch.zeros(*shape, device="meta")
    loss = cross_modal_kd_from_logits(
        m(2, 6, 5), m(2, 6, 5), word_mask=torch.zeros(2, 5, dtype=torch.bool, device="meta")
    )
    assert loss.shape == ()
    assert channel_kd(m(2, 3, 4, 4), m(2, 3, 4, 4), weight=m(2, 3)).device.type == "meta"


FLAGS = {
    ChannelKD: ("negate", "centered", "across_batch"),
    PixelRelationKD: ("cross_image",),
    ChannelAttentionKD: ("negate", "debiased"),
    CrossModalKD: ("return_terms",),
    AttentionKD: ("causal",),
}


@pytest.mark.parametrize("module", FLAGS)
def test_a_string_is_not_a_flag(module):
    """Python takes any string for true, also one from a file that says "false"."""
    tensors = [maps(4, 3, 4, 4)] * 4
    inputs = tensors if module is AttentionKD else [x.flatten(2) for x in tensors]
    for name in FLAGS[module]:
        with pytest.raises(TypeError, match=f"{name}: expected True or False, got 'false'"):
            module(**{name: "false"})
        made = module()
        setattr(made, name, "false")
        with pytest.raises(TypeError, match=f"{name}: expected True or False, got 'false'"):
            made(*inputs[: 4 if module in (AttentionKD, CrossModalKD) else 2])

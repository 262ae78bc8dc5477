"""Channel-wise distribution distillation: match each channel's distribution over the pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.losses._masks import fill, valid_pixels, without_masked
from fastkd.losses._mixing import mixing
from fastkd.losses._module import LossModule, make_aligner
from fastkd.losses._reduce import channel_attention, reduce_rows
from fastkd.losses._temperatures import Temperature, at_student_temperature
from fastkd.ops import checks
from fastkd.ops.numerics import compute_dtype, fp64_together, full_precision
from fastkd.ops.products import product
from fastkd.ops.softmax_kl import softmax_kl_unchecked

LAYOUT = "(B, C, H, W) or (B, C, N)"
GUIDES = (None, "own", "teacher")


def channel_distribution_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Temperature = 4.0,
    guide: str | None = None,
    guide_temperature: float | Tensor = 0.1,
    weight: Tensor | str | None = None,
    pixel_mask: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compare each channel's softmax over the pixels, optionally after mixing the channels by channel attention.

    Without a guide, a reconstruction of CWD ("Channel-wise Knowledge Distillation for Dense Prediction", arXiv
    2011.13256); the guides are interpretations of the channel attention in "Channel Attention-Guided Cross-Modal
    Knowledge Distillation for Referring Image Segmentation" (arXiv 2604.16806). Per channel, a map of N pixels:
    τ²·KL(softmax_N(F_T/τ) ‖ softmax_N(F_S/τ)).

    With a guide, P_x = softmax over columns of X̂_xX̂_xᵀ/guide_temperature, X̂ the channels scaled to norm 1, per sample:

    - "own": F_S is replaced by P_S F_S and F_T by P_T F_T (gradients flow through P_S);
    - "teacher": both are mixed by P_T.

    Args:
        student: (B, C, H, W) or (B, C, N), any floating dtype.
        teacher: the same shape. Must not require grad.
        temperature: τ > 0, or (τ_S, τ_T) for F_S/τ_S and F_T/τ_T, with the factor τ_S².
        guide: None, "own" or "teacher".
        guide_temperature: the temperature of P, > 0.
        weight: None, a (B, C) tensor ≥ 0, or "attention": C·softmax_C(⟨|F_T|⟩_N / 0.5).
        pixel_mask: None or bool, (B, H, W) or (B, N), True = valid: softmaxes, guides and attention weights are over
            the valid pixels. What masked pixels hold, even NaN, affects neither loss nor gradient.
        reduction: "mean" (Σ w·row / Σ w), "sum", or "none": (B, C).
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        The loss in fp32 (fp64 if an input is fp64).

    Raises:
        ValueError, TypeError: an invalid argument; the message names it and the fix. A sample without a valid pixel is
            an error on the CPU; on a GPU, where reading the mask would stall the stream, its loss is NaN.
        BackendUnavailable: ``backend`` cannot compute this here.

    Example:
        >>> loss = channel_distribution_kd(student_map, teacher_map.detach(), guide="teacher")
    """
    student_temperature, teacher_temperature, guide_temperature = _check_options(
        temperature, guide, guide_temperature, reduction
    )
    checks.floating("student", student, (3, 4), LAYOUT)
    checks.floating("teacher", teacher, (3, 4), LAYOUT)
    checks.teacher("teacher", teacher)
    checks.same_device(student=student, teacher=teacher)
    checks.same_size(
        "shapes",
        ("student", "teacher"),
        (student.shape, teacher.shape),
        "resize the maps to one size and align the channels, as ChannelDistributionKD's 1×1 aligner does",
    )
    checks.row_weight(weight, (student.shape[0], student.shape[1]), "(B, C)", student, attention=True)
    if guide is not None or weight is not None:
        checks.backend("softmax_kl", backend, student)

    student, teacher = fp64_together(student, teacher)
    rows_s, rows_t = student.flatten(2), teacher.flatten(2)  # (B, C, N)
    mask = None if pixel_mask is None else valid_pixels(pixel_mask, student, every_sample=True)
    if mask is not None and (guide is not None or isinstance(weight, str)):
        rows_s, rows_t = fill(rows_s, mask), fill(rows_t, mask)
    if isinstance(weight, str):
        weight = channel_attention(rows_t, None if mask is None else mask.unsqueeze(1))
    if guide is not None:
        rows_s, rows_t = _mix(rows_s, rows_t, guide, guide_temperature)
        if checks.differentiates_temperature(backend, guide_temperature):
            backend = "reference"  # the teacher's mixed rows need the gradient too
    if teacher_temperature is not None:
        rows_t, backend = at_student_temperature(rows_t, student_temperature, teacher_temperature, backend, rows_s)
    if mask is not None:
        rows_s, rows_t = fill(rows_s, mask, -torch.inf), fill(rows_t, mask, -torch.inf)
    rows = softmax_kl_unchecked(rows_s, rows_t, student_temperature, backend)
    return reduce_rows(rows * student_temperature**2, weight, reduction)


def _check_options(
    temperature: Temperature, guide: str | None, guide_temperature: float | Tensor, reduction: str
) -> tuple[float | Tensor, float | Tensor | None, float | Tensor]:
    """Return the temperatures of student, teacher and guide."""
    checks.option("guide", guide, GUIDES)
    checks.option("reduction", reduction, checks.REDUCTIONS)
    guide_temperature = checks.temperature(guide_temperature, "guide_temperature")
    return *checks.temperatures(temperature), guide_temperature


def _mix(student: Tensor, teacher: Tensor, guide: str, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return P_S F_S and P_T F_T, or with guide="teacher" P_T F_S and P_T F_T."""
    dtype = compute_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    with full_precision(student.device):
        p_t = mixing(teacher, temperature)
        p_s = mixing(student, temperature) if guide == "own" else p_t
        return product(p_s, student), product(p_t, teacher)


class ChannelDistributionKD(LossModule):
    """:func:`channel_distribution_kd` as a module with the same arguments; ``pixel_mask`` is passed to each call.

    If ``student_channels`` and ``teacher_channels`` are given and differ, its attribute ``aligner`` is a train-only,
    bias-free 1×1 convolution, else None.

    Example:
        >>> kd = ChannelDistributionKD(student_channels=64, teacher_channels=256)
        >>> optimizer = torch.optim.AdamW([*student.parameters(), *kd.parameters()])  # with the aligner's
        >>> loss = kd(student_map, teacher_map.detach())
    """

    def __init__(
        self,
        *,
        temperature: Temperature = 4.0,
        guide: str | None = None,
        guide_temperature: float | Tensor = 0.1,
        weight: Tensor | str | None = None,
        reduction: str = "mean",
        backend: str = "auto",
        student_channels: int | None = None,
        teacher_channels: int | None = None,
    ) -> None:
        _check_options(temperature, guide, guide_temperature, reduction)
        super().__init__(
            {
                "temperature": temperature,
                "guide": guide,
                "guide_temperature": guide_temperature,
                "weight": weight,
                "reduction": reduction,
                "backend": backend,
            }
        )
        self.aligner = make_aligner(student_channels, teacher_channels)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | str | None = None,
        pixel_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; a ``weight`` passed here overrides the module's."""
        options = self._options()
        if weight is not None:
            options["weight"] = weight
        if self.aligner is not None:
            student = self.aligner(without_masked(student, pixel_mask))
        return channel_distribution_kd(student, teacher, pixel_mask=pixel_mask, **options)

"""Feature distillation: match the feature maps themselves, pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.losses._masks import check_valid_weight, fill, pixel_attention, valid_pixels, valid_rows
from fastkd.losses._module import ChannelAligner, LossModule, check_widths
from fastkd.losses._reduce import reduce_rows
from fastkd.ops import checks
from fastkd.ops.numerics import compute_dtype, normalise_rows
from fastkd.ops.torch_state import savable

LAYOUT = "(B, C, H, W)"
DISTANCES = ("mse", "cosine", "smooth_l1")
NORMALIZE = (None, "l2", "standardize")
ALIGNERS = ("conv", "mlp")
RESIZE = (None, "bilinear")
DEVIATION_FLOOR = 1e-6
"""Added to the deviation of a standardised channel."""


def feature_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    distance: str = "mse",
    normalize: str | None = None,
    weight: Tensor | str | None = None,
    pixel_mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compare two feature maps at every pixel, in plain torch.

    A reconstruction of the hints of "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), with a 1×1 aligner in
    :class:`FeatureKD`. Per pixel i, with s = F_S[:, i] and t = F_T[:, i] after ``normalize``:

    - "mse": ‖s − t‖² / C;
    - "cosine": 1 − ⟨s, t⟩ / (‖s‖ ‖t‖), norms ≥ 1e-12;
    - "smooth_l1": mean_c h(s_c − t_c) with h(d) = d²/2 if |d| < 1, else |d| − ½.

    ``normalize`` divides every pixel by its norm over the channels ("l2"), or subtracts each channel's mean over the
    batch's pixels and divides by their population deviation + 1e-6 ("standardize"): the mean squared difference is
    then 2 (1 − Pearson correlation), twice the loss of "PKD: General Distillation Framework for Object Detectors via
    Pearson Correlation Coefficient" (arXiv 2207.02039).

    Args:
        student: (B, C, H, W), any floating dtype. Three dimensions are an error: (B, C, N) and the tokens (B, N, D)
            of a transformer look alike.
        teacher: the same shape. Must not require grad.
        distance: "mse", "cosine" or "smooth_l1".
        normalize: None, "l2" or "standardize".
        weight: None, a (B, H, W) tensor ≥ 0, or "attention": per sample n·softmax over its n valid pixels of the
            teacher's ⟨|F_T|⟩_C / 0.5.
        pixel_mask: None or bool, (B, H, W) or (B, H·W), True = valid. What masked pixels hold, even NaN, affects
            neither loss nor gradient.
        reduction: "mean" (Σ w·row / Σ w over the valid pixels of the batch), "sum", or "none": (B, H, W), 0 at masked
            pixels.

    Returns:
        The loss in fp32 (fp64 if an input is fp64). NaN and Inf propagate.

    Raises:
        ValueError, TypeError: an invalid argument; the message names it and the fix. A mask without any valid pixel
            is an error on the CPU; on a GPU, where reading it would stall the stream, the mean is NaN.

    Example:
        >>> loss = feature_kd(aligner(student_map), teacher_map.detach(), normalize="standardize")
    """
    _check_options(distance, normalize, reduction)
    _check_map("student", student)
    _check_map("teacher", teacher)
    checks.teacher("teacher", teacher)
    checks.same_device(student=student, teacher=teacher)
    checks.same_size(
        "shapes",
        ("student", "teacher"),
        (student.shape, teacher.shape),
        "align the channels and resize the maps, as FeatureKD(student_channels, teacher_channels, resize='bilinear') "
        "does",
    )
    outer = (student.shape[0], *student.shape[2:])  # (B, H, W)
    pixels = outer[0] * outer[1] * outer[2]
    if normalize == "standardize" and pixels == 1:
        raise ValueError("normalize: 'standardize' needs at least two pixels in the batch, got one")
    checks.row_weight(weight, outer, "(B, H, W)", student, attention=True)
    mask = None if pixel_mask is None else valid_pixels(pixel_mask, student)
    if isinstance(weight, Tensor):
        weight = weight.flatten(1)
        if mask is not None:
            check_valid_weight(weight, mask)

    dtype = compute_dtype(student, teacher)
    s, t = student.to(dtype).flatten(2), savable(teacher)[0].to(dtype).flatten(2)  # (B, C, N)
    if mask is not None:
        s, t = fill(s, mask), fill(t, mask)
    if isinstance(weight, str):
        weight = pixel_attention(t, mask)
    rows = _compare(_normalised(s, normalize, mask), _normalised(t, normalize, mask), distance)  # (B, N)
    if mask is not None:
        # Pixels of zeros have cosine 0, and a NaN in a channel's statistics reaches every pixel.
        rows, weight = valid_rows(rows, mask, weight, reduction)
    value = reduce_rows(rows, weight, reduction)
    return value.reshape(outer) if reduction == "none" else value


def _check_options(distance: str, normalize: str | None, reduction: str) -> None:
    checks.option("distance", distance, DISTANCES)
    checks.option("normalize", normalize, NORMALIZE)
    checks.option("reduction", reduction, checks.REDUCTIONS)


def _check_map(name: str, tensor: Tensor) -> None:
    if isinstance(tensor, Tensor) and tensor.dim() == 3:
        raise ValueError(
            f"{name}: expected shape {LAYOUT}, got {tuple(tensor.shape)}: with three dimensions, channels (B, C, N) "
            "and tokens (B, N, D) look alike; pass x.unsqueeze(-1) for channels, x.mT.unsqueeze(-1) for tokens"
        )
    checks.floating(name, tensor, (4,), LAYOUT)


def _normalised(maps: Tensor, normalize: str | None, mask: Tensor | None) -> Tensor:
    """Return the normalised maps (B, C, N), whose masked pixels hold 0 and are not counted."""
    if normalize is None:
        return maps
    if normalize == "l2":
        return normalise_rows(maps.mT).mT
    count = maps.shape[0] * maps.shape[2] if mask is None else mask.sum()
    centred = maps - maps.sum((0, 2), keepdim=True) / count
    if mask is not None:
        centred = fill(centred, mask)
    variance = (centred * centred).sum((0, 2), keepdim=True) / count  # (1, C, 1)
    # A constant channel, such as a dead one, gets no gradient: the formula's slope is 1e6 there.
    constant = variance <= DEVIATION_FLOOR**2
    deviation = torch.where(constant, torch.ones_like(variance), variance).sqrt()
    fallback = centred.detach() / (variance.detach().sqrt() + DEVIATION_FLOOR)
    return torch.where(constant, fallback, centred / (deviation + DEVIATION_FLOOR))


def _compare(student: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """Return the distance (B, N) of every pixel of two (B, C, N)."""
    if distance == "cosine":
        return 1 - (normalise_rows(student.mT) * normalise_rows(teacher.mT)).sum(-1)
    if distance == "smooth_l1":
        return F.smooth_l1_loss(student, teacher, reduction="none").mean(1)
    return (student - teacher).square().mean(1)


class FeatureKD(LossModule):
    """:func:`feature_kd` as a module with the same arguments (``pixel_mask`` in each call), an aligner and a resizer.

    Given ``student_channels`` and ``teacher_channels``, its attribute ``aligner`` maps the student's channels to the
    teacher's, also if the widths are equal: channels of separately trained networks have no common order. It belongs to
    the loss and trains with the student. Without the widths it is None.

    Args:
        student_channels: channels of the student's map; give both or neither.
        teacher_channels: channels of the teacher's map.
        aligner: "conv": a 1×1 convolution. "mlp": two of them, ``teacher_channels`` wide, around a GELU. Both are
            bias-free.
        resize: None, or "bilinear": the teacher's map is resized to the student's size if they differ. Teacher pixels
            at whose location all student pixels are masked are omitted from the interpolation.
        distance, normalize, weight, reduction: see :func:`feature_kd`.

    Example:
        >>> kd = FeatureKD(128, 512, aligner="mlp", resize="bilinear", normalize="standardize")
        >>> optimizer = torch.optim.AdamW([*student.parameters(), *kd.parameters()])  # with the aligner's
        >>> loss = kd(student_map, teacher_map.detach())
    """

    def __init__(
        self,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        *,
        aligner: str = "conv",
        resize: str | None = None,
        distance: str = "mse",
        normalize: str | None = None,
        weight: Tensor | str | None = None,
        reduction: str = "mean",
    ) -> None:
        checks.option("aligner", aligner, ALIGNERS)
        checks.option("resize", resize, RESIZE)
        _check_options(distance, normalize, reduction)
        super().__init__({"distance": distance, "normalize": normalize, "weight": weight, "reduction": reduction})
        check_widths(student_channels, teacher_channels)
        self.student_channels, self.teacher_channels, self.resize = student_channels, teacher_channels, resize
        self.aligner: nn.Module | None = None
        if student_channels is not None and teacher_channels is not None:
            self.aligner = ChannelAligner(student_channels, teacher_channels)
            if aligner == "mlp":
                last = ChannelAligner(teacher_channels, teacher_channels)
                self.aligner = nn.Sequential(self.aligner, nn.GELU(), last)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | str | None = None,
        pixel_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of maps (B, C, H, W); a ``weight`` passed here overrides the module's.

        If the module knows the widths, (B, C, N) with C ≠ N is accepted too. ``weight`` and ``pixel_mask`` are then
        (B, N), and otherwise have the student's size.
        """
        self._check_layout("student", student, self.student_channels)
        self._check_layout("teacher", teacher, self.teacher_channels)
        checks.same_device(student=student, teacher=teacher)
        checks.same_size(
            "dimensions", ("student", "teacher"), (student.dim(), teacher.dim()), "give both as (B, C, H, W)"
        )
        options = self._options()
        if weight is not None:
            options["weight"] = weight
        flat = student.dim() == 3
        if flat:  # as maps of width 1
            student, teacher = student.unsqueeze(-1), teacher.unsqueeze(-1)
            if isinstance(options["weight"], Tensor):
                options["weight"] = options["weight"].unsqueeze(-1)
        if pixel_mask is not None:
            pixel_mask = valid_pixels(pixel_mask, student).unflatten(1, student.shape[2:])  # (B, H, W)
            # Filled before the aligner, whose gradient would multiply 0 by the NaN of a masked pixel.
            student = fill(student, pixel_mask)
        if self.resize is not None and not flat and teacher.shape[2:] != student.shape[2:]:
            teacher = _resized(teacher, student, pixel_mask)
        value = feature_kd(
            student if self.aligner is None else self.aligner(student), teacher, pixel_mask=pixel_mask, **options
        )
        return value.squeeze(-1) if flat and value.dim() else value

    def _check_layout(self, name: str, tensor: Tensor, channels: int | None) -> None:
        """Raise unless dimension 1 holds the channels."""
        if channels is None:
            _check_map(name, tensor)
            return
        checks.floating(name, tensor, (3, 4), "(B, C, H, W) or (B, C, N)")
        if tensor.shape[1] != channels:
            fix = "; tokens (B, N, D): pass x.mT" if tensor.dim() == 3 and tensor.shape[2] == channels else ""
            raise ValueError(
                f"{name}: expected {channels} channels in dimension 1 ({name}_channels), got shape "
                f"{tuple(tensor.shape)}{fix}"
            )
        if tensor.dim() == 3 and tensor.shape[2] == channels:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)} may be channels (B, C, N) or tokens (B, N, D), since N = "
                f"{channels}; pass x.unsqueeze(-1) for channels, x.mT.unsqueeze(-1) for tokens, of both networks"
            )

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return f"{super().extra_repr()}, resize={self.resize!r}"


def _resized(teacher: Tensor, student: Tensor, mask: Tensor | None) -> Tensor:
    """Return the teacher's map at the student's size, interpolated from valid pixels only."""
    checks.teacher("teacher", teacher)
    checks.same_size(
        "batch sizes", ("student", "teacher"), (student.shape[0], teacher.shape[0]), "give the same samples"
    )
    teacher = teacher.to(compute_dtype(student, teacher))
    size = student.shape[2:]
    if mask is None:
        return F.interpolate(teacher, size=size, mode="bilinear", align_corners=False)
    # A teacher pixel is valid if a student pixel in its place is, so that valid pixels have a weight of 1/4 or more.
    valid = F.adaptive_max_pool2d(mask.to(teacher.dtype).unsqueeze(1), teacher.shape[2:])  # (B, 1, h, w)
    total = F.interpolate(fill(teacher, valid[:, 0] > 0), size=size, mode="bilinear", align_corners=False)
    return total / F.interpolate(valid, size=size, mode="bilinear", align_corners=False)

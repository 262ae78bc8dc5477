"""Channel-relation distillation: match the similarities between a network's channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastkd.losses._masks import PixelMask, fill_maps, valid_pixels, valid_rows, without_masked
from fastkd.losses._module import LossModule, make_aligner
from fastkd.losses._reduce import attention_of, channel_attention, reduce_rows
from fastkd.losses._temperatures import Temperature, rows_at_student_temperature
from fastkd.ops import checks
from fastkd.ops.collectives import active_group, check_call, check_group
from fastkd.ops.numerics import compute_dtype, fp64_together
from fastkd.ops.relation import relation_unchecked
from fastkd.ops.relation.group import channel_means, channel_relation
from fastkd.ops.relation.plan import keeping_pays
from fastkd.ops.relation.reference import DISTANCES, SIMILARITIES
from fastkd.ops.torch_state import savable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LAYOUT = "(B, C, H, W) or (B, C, N)"


def channel_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    similarity: str = "cosine",
    distance: str = "kl",
    temperature: Temperature = 0.1,
    negate: bool = False,
    centered: bool = False,
    weight: Tensor | str | None = None,
    pixel_mask: PixelMask | None = None,
    patches: int = 1,
    across_batch: bool = False,
    group: ProcessGroup | str | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compare the channel–channel relation matrices of student and teacher, row by row.

    A reconstruction of the channel-relation term of "Channel Attention-Guided Cross-Modal Knowledge Distillation for
    Referring Image Segmentation" (arXiv 2604.16806); its options also give the channel relations of DANet ("Dual
    Attention Network for Scene Segmentation", arXiv 1809.02983), ICKD ("Exploring Inter-Channel Correlation for
    Diversity-preserved Knowledge Distillation", arXiv 2202.03680) and the channel term of CIRKD ("Cross-Image
    Relational Knowledge Distillation for Semantic Segmentation", arXiv 2204.06986): see docs/equivalents.md.

    Each sample's features are a C×N matrix X. With E = sim(X, X) of shape C×C, σ = −1 if ``negate`` else +1:

    - ``similarity``: "cosine" E = X̂X̂ᵀ with rows of norm 1; "mean" E = XXᵀ/N; "dot" E = XXᵀ.
    - ``distance``, per channel r: "kl" KL(softmax(σE_T[r]/τ) ‖ softmax(σE_S[r]/τ)), without a factor τ²;
      "mse" mean_j (E_S[r, j] − E_T[r, j])²; "row_cosine" ‖E_S[r]/‖E_S[r]‖ − E_T[r]/‖E_T[r]‖‖².

    A per-sample relation is invariant to a permutation of the pixels, so it carries no spatial information by itself.

    Args:
        student: (B, C, H, W) or (B, C, N), any floating dtype.
        teacher: the same B and C; its H, W may differ. Must not require grad.
        temperature: τ > 0, used by "kl"; (τ_S, τ_T) divides E_S by τ_S and E_T by τ_T.
        negate: compare by dissimilarity, as DANet's softmax(rowmax(E) − E) does; used by "kl".
        centered: subtract each channel's mean over the pixels first (with "cosine": Pearson correlation).
        weight: None, a (B, C) tensor ≥ 0, or "attention": C·softmax_C(⟨|F_T|⟩_N / 0.5).
        pixel_mask: None or bool, (B, H, W) or (B, N), True = valid; for maps of different sizes a pair (student's,
            teacher's). The relation is that of the valid pixels: they alone enter norms, means and N. What masked
            pixels hold, even NaN, affects neither loss nor gradient. Patches without a valid pixel do not count.
        patches: p > 1 splits H×W into p×p equal patches, each a separate sample. Needs (B, C, H, W).
        across_batch: one relation for the whole batch, whose rows are the channels over all B·N pixels; ``weight`` is
            then (1, C).
        group: with ``across_batch``, pool the batches of these processes: None (this process alone), "world" (all
            processes; this one alone where torch.distributed is not initialised) or a ``torch.distributed``
            ProcessGroup. The loss is then equal on every rank, and the gradients, averaged over the ranks as
            DistributedDataParallel does, are those of one process with the whole batch. All ranks call the loss and
            its backward, with the same C, options and ``weight``; their batch sizes may differ, down to 0. Computed in
            plain torch and differentiable once; see docs/scaling.md for what is communicated.
        reduction: "mean" (Σ w·row / Σ w), "sum", or "none": (B, C); (B·p², C) with patches, samples outermost and
            patches in row-major order; (1, C) with ``across_batch``.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        The loss in fp32 (fp64 if an input is fp64).

    Raises:
        ValueError, TypeError: an invalid argument; the message names it and the fix. A sample without a valid pixel
            (with ``across_batch``, a batch) is an error on the CPU; on a GPU, where reading the mask would stall the
            stream, its rows do not count. With ``group``, it may be on other ranks.
        BackendUnavailable: ``backend`` cannot compute this here.

    Example:
        >>> loss = channel_kd(student_map, teacher_map.detach(), across_batch=True, centered=True)
        >>> loss = channel_kd(student_map, teacher_map.detach(), across_batch=True, group="world")  # under torchrun
    """
    student_temperature, teacher_temperature = _check_options(
        similarity, distance, temperature, negate, centered, patches, across_batch, group, reduction
    )
    pooled = active_group(group)
    checks.floating("student", student, (3, 4), LAYOUT, no_samples=pooled is not None)
    checks.floating("teacher", teacher, (3, 4), LAYOUT, no_samples=pooled is not None)
    checks.teacher("teacher", teacher)
    checks.same_device(student=student, teacher=teacher)
    names = ("student", "teacher")
    checks.same_size("batch sizes", names, (student.shape[0], teacher.shape[0]), "give the same samples to both")
    checks.same_size(
        "numbers of channels",
        names,
        (student.shape[1], teacher.shape[1]),
        "align them, as ChannelKD's 1×1 aligner does",
    )
    channels = student.shape[1]
    samples = 1 if across_batch else student.shape[0]
    layout = "(1, C)" if across_batch else "(B, C)"
    checks.row_weight(weight, (samples, channels), layout, student, attention=True)
    masks = _masks(pixel_mask, student, teacher, across_batch, pooled is not None)
    if masks is not None:
        student, teacher = fill_maps(student, masks[0]), fill_maps(teacher, masks[1])
    if pooled is not None:
        check_call(backend, student, teacher)
        student, teacher = savable(student.flatten(2), teacher.flatten(2))  # (B, C, N)
        needs_means = centered or similarity == "mean" or isinstance(weight, str)
        means = channel_means(student, teacher, pooled, masks) if needs_means else None
        if isinstance(weight, str):
            assert means is not None
            weight = attention_of(means.strength[None])
        rows = channel_relation(
            student,
            teacher,
            pooled,
            similarity=similarity,
            distance=distance,
            temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            negate=negate,
            centered=centered,
            pooled=means,
            masks=masks,
        )
        return reduce_rows(rows, weight, reduction)
    if weight is not None or teacher_temperature is not None:
        checks.backend("relation", backend, student)

    student, teacher = fp64_together(student, teacher)
    masks_s, masks_t = masks or (None, None)
    shape = (patches, across_batch)
    if isinstance(weight, str):
        valid_t = None if masks_t is None else _rows("teacher", _as_maps(masks_t, teacher), *shape)
        weight = channel_attention(_rows("teacher", teacher, *shape), valid_t)
    elif weight is not None and patches > 1:
        weight = weight.repeat_interleave(patches * patches, 0)
    if centered:
        student, teacher = _centred(student, masks_s, across_batch), _centred(teacher, masks_t, across_batch)
    rows_s, rows_t = _rows("student", student, *shape), _rows("teacher", teacher, *shape)  # (S, C, n)
    valid = None
    if masks is not None:
        valid_s, valid_t = (
            _rows(name, _as_maps(mask, maps), *shape)
            for name, mask, maps in (("student", masks[0], student), ("teacher", masks[1], teacher))
        )
        valid = valid_s.any(2) & valid_t.any(2)  # (S, 1)
        if patches > 1:
            _check_valid_patches(valid, weight)
        if similarity == "mean":
            rows_s, rows_t = _mean_over_valid(rows_s, valid_s), _mean_over_valid(rows_t, valid_t)
    if teacher_temperature is not None and distance == "kl":
        rows_s, rows_t, backend = rows_at_student_temperature(
            rows_s, rows_t, similarity, student_temperature, teacher_temperature, backend
        )
        similarity = "dot"
    rows = relation_unchecked(
        rows_s,
        rows_t,
        similarity=similarity,
        distance=distance,
        temperature=student_temperature,
        negate=negate,
        keep=keeping_pays(rows_s, rows_t),  # C×C is small compared with C×N
        backend=backend,
    )
    if valid is not None:
        rows, weight = valid_rows(rows, valid.expand_as(rows), weight, reduction)
    return reduce_rows(rows, weight, reduction)


def _check_options(
    similarity: str,
    distance: str,
    temperature: Temperature,
    negate: bool,
    centered: bool,
    patches: int,
    across_batch: bool,
    group: ProcessGroup | str | None,
    reduction: str,
) -> tuple[float | Tensor, float | Tensor | None]:
    """Return the temperatures of student and teacher."""
    checks.option("similarity", similarity, SIMILARITIES)
    checks.option("distance", distance, DISTANCES)
    checks.flags(negate=negate, centered=centered, across_batch=across_batch)
    temperatures = checks.temperatures(temperature)
    checks.option("reduction", reduction, checks.REDUCTIONS)
    if isinstance(patches, bool) or not isinstance(patches, int):
        raise TypeError(f"patches: expected a positive int, got {type(patches).__name__}")
    if patches < 1:
        raise ValueError(f"patches: expected a positive int, got {patches}")
    if across_batch and patches > 1:
        raise ValueError(
            f"patches: across_batch=True forms one relation of the whole batch, so patches must be 1, not {patches}"
        )
    check_group(group, "across_batch", across_batch)
    return temperatures


def _masks(
    mask: PixelMask | None, student: Tensor, teacher: Tensor, across_batch: bool, grouped: bool
) -> tuple[Tensor, Tensor] | None:
    """Return the checked masks (B, N) of student and teacher."""
    if mask is None:
        return None
    pair = isinstance(mask, tuple | list)
    if pair and len(mask) != 2:
        raise ValueError(f"pixel_mask: expected a mask or a pair (student's, teacher's), got {len(mask)} values")
    if not pair and student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"pixel_mask: the maps differ in size, {tuple(student.shape[2:])} and {tuple(teacher.shape[2:])}; pass a "
            "pair (student's, teacher's)"
        )
    names = ("pixel_mask[0]", "pixel_mask[1]") if pair else ("pixel_mask", "pixel_mask")
    masks = mask if pair else (mask, mask)
    student_mask, teacher_mask = (
        valid_pixels(one, maps, name, every_sample=not across_batch, anywhere=grouped)
        for one, maps, name in zip(masks, (student, teacher), names, strict=True)
    )
    return student_mask, teacher_mask


def _check_valid_patches(valid: Tensor, weight: Tensor | None) -> None:
    """Raise unless a patch (S, 1) is valid, and has a weight above 0 if there is a weight (S, C)."""
    if not checks.readable(valid):
        return
    if not bool(valid.any()):
        raise ValueError(
            "pixel_mask: no patch has valid pixels of both networks; use fewer patches, or skip this loss for such a "
            "batch"
        )
    if weight is not None and checks.readable(weight) and bool((weight[valid[:, 0]] == 0).all()):
        raise ValueError("weight: is 0 in every valid patch, so the weighted mean is undefined")


def _as_maps(mask: Tensor, maps: Tensor) -> Tensor:
    """Return a mask (B, N) as a map of one channel."""
    return mask.reshape(maps.shape[0], 1, *maps.shape[2:])


def _centred(features: Tensor, mask: Tensor | None, across_batch: bool) -> Tensor:
    """Return features minus each channel's mean over the valid pixels, of a sample or the batch; 0 at masked ones."""
    features = features.to(compute_dtype(features))
    dims = (0, *range(2, features.dim())) if across_batch else tuple(range(2, features.dim()))
    if mask is None:
        return features - features.mean(dims, keepdim=True)
    count = _as_maps(mask, features).sum(dims, keepdim=True).clamp_min(1)
    return fill_maps(features - features.sum(dims, keepdim=True) / count, mask)


def _mean_over_valid(rows: Tensor, valid: Tensor) -> Tensor:
    """Return rows (S, C, n) whose XXᵀ/n is that of the valid columns, (S, 1, n), alone."""
    rows = rows.to(compute_dtype(rows))
    count = valid.sum(2, keepdim=True, dtype=rows.dtype).clamp_min(1)
    return rows * (rows.shape[2] / count).sqrt()


def _rows(name: str, features: Tensor, patches: int, across_batch: bool) -> Tensor:
    """Return features as (samples, C, pixels), whose rows the relation compares."""
    if across_batch:
        return features.flatten(2).transpose(0, 1).flatten(1).unsqueeze(0)  # (1, C, B·N)
    if patches == 1:
        return features.flatten(2)  # (B, C, N)
    if features.dim() != 4:
        raise ValueError(f"{name}: patches={patches} needs shape (B, C, H, W), got {tuple(features.shape)}")
    b, c, h, w = features.shape
    if h % patches or w % patches:
        raise ValueError(
            f"patches: {patches} does not divide the {name}'s map of {h}×{w}; choose a common divisor, or crop the map"
        )
    split = features.reshape(b, c, patches, h // patches, patches, w // patches)  # (B, C, p, H/p, p, W/p)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(b * patches**2, c, -1)  # (B·p², C, N/p²)


class ChannelKD(LossModule):
    """:func:`channel_kd` as a module with the same arguments; ``pixel_mask`` is passed to each call.

    If ``student_channels`` and ``teacher_channels`` are given and differ, its attribute ``aligner`` is a train-only,
    bias-free 1×1 convolution, else None. An aligner trained by this loss can match the relations without the student
    learning anything; prefer student and teacher maps of equal width.

    Example:
        >>> kd = ChannelKD(across_batch=True, centered=True)
        >>> loss = kd(student_map, teacher_map.detach())
    """

    def __init__(
        self,
        *,
        similarity: str = "cosine",
        distance: str = "kl",
        temperature: Temperature = 0.1,
        negate: bool = False,
        centered: bool = False,
        weight: Tensor | str | None = None,
        patches: int = 1,
        across_batch: bool = False,
        group: ProcessGroup | str | None = None,
        reduction: str = "mean",
        backend: str = "auto",
        student_channels: int | None = None,
        teacher_channels: int | None = None,
    ) -> None:
        _check_options(similarity, distance, temperature, negate, centered, patches, across_batch, group, reduction)
        super().__init__(
            {
                "similarity": similarity,
                "distance": distance,
                "temperature": temperature,
                "negate": negate,
                "centered": centered,
                "weight": weight,
                "patches": patches,
                "across_batch": across_batch,
                "group": group,
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
        pixel_mask: PixelMask | None = None,
    ) -> Tensor:
        """Return the loss; a ``weight`` passed here overrides the module's."""
        options = self._options()
        if weight is not None:
            options["weight"] = weight
        if self.aligner is not None:
            student = self.aligner(without_masked(student, pixel_mask))
        return channel_kd(student, teacher, pixel_mask=pixel_mask, **options)

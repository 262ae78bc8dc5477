"""Pixel-relation distillation: match the similarities between a network's pixels, within an image or a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastkd.losses._masks import check_valid_weight, fill, valid_pixels, valid_rows
from fastkd.losses._module import LossModule
from fastkd.losses._reduce import reduce_rows
from fastkd.losses._temperatures import Temperature, rows_at_student_temperature
from fastkd.losses._valid_rows import columns_per_valid_one, mean_over_columns, without_columns
from fastkd.ops import checks
from fastkd.ops.collectives import active_group, check_call, check_group
from fastkd.ops.numerics import compute_dtype
from fastkd.ops.relation import relation_unchecked
from fastkd.ops.relation.group import gathered_relation
from fastkd.ops.relation.reference import DISTANCES, SIMILARITIES, relation_mse_gram
from fastkd.ops.torch_state import savable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LAYOUT = "(B, C, H, W) or (B, C, N)"


def pixel_relation_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    similarity: str = "cosine",
    distance: str = "kl",
    temperature: Temperature = 0.1,
    cross_image: bool = False,
    group: ProcessGroup | str | None = None,
    weight: Tensor | None = None,
    pixel_mask: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compare the pixel–pixel relation matrices of student and teacher, row by row.

    The usual relational baseline. With ``cross_image`` it reconstructs the mini-batch pixel term of CIRKD
    ("Cross-Image Relational Knowledge Distillation for Semantic Segmentation", arXiv 2204.06986), with
    ``distance="mse"`` the pair-wise term of SKDS ("Structured Knowledge Distillation for Semantic Segmentation", arXiv
    1903.04197) and the Gram loss of DINOv3 (arXiv 2508.10104): see docs/equivalents.md.

    Each sample's features are an N×C matrix X, one row per pixel, and E = sim(X, X) of shape N×N:

    - ``similarity``: "cosine" E = X̂X̂ᵀ with rows of norm 1; "mean" E = XXᵀ/C; "dot" E = XXᵀ.
    - ``distance``, per pixel r: "kl" KL(softmax(E_T[r]/τ) ‖ softmax(E_S[r]/τ)), without a factor τ²;
      "mse" mean_j (E_S[r, j] − E_T[r, j])²; "row_cosine" ‖E_S[r]/‖E_S[r]‖ − E_T[r]/‖E_T[r]‖‖².

    Args:
        student: (B, C_S, H, W) or (B, C_S, N), any floating dtype.
        teacher: (B, C_T, H, W) or (B, C_T, N), the same B and pixels; C_T may differ. Must not require grad.
        temperature: τ > 0, used by "kl"; (τ_S, τ_T) divides E_S by τ_S and E_T by τ_T.
        cross_image: relate the pixels of image i to the pixels of image j for all B² ordered pairs, with a softmax per
            pair; a row's loss is the mean over j.
        group: with ``cross_image``, j runs over the images of these processes: None (this process alone), "world" (all
            processes; this one alone where torch.distributed is not initialised) or a ``torch.distributed``
            ProcessGroup. "mean" and "sum" are then over the rows of all ranks and equal on every rank, "none" returns
            this rank's rows. The gradients, averaged over the ranks as DistributedDataParallel does, are those of one
            process with the whole batch. All ranks call the loss and its backward with maps of one size and width;
            their batch sizes may differ, down to 0. Computed in plain torch and differentiable once. "mse" adds
            Gram matrices; the other distances gather the features of all ranks, and read their batch sizes on the
            host, so they run outside torch.compile's graphs. docs/scaling.md states what is communicated.
        weight: None or a (B, N) tensor ≥ 0.
        pixel_mask: None or bool, (B, H, W) or (B, N), True = valid. Masked pixels are neither rows nor columns: what
            they hold, even NaN, affects neither loss nor gradient. With ``group``, on every rank or on none.
        reduction: "mean" (Σ w·row / Σ w over the valid pixels), "sum", or "none": (B, N), pixels in row-major order, 0
            at masked pixels.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        The loss in fp32 (fp64 if an input is fp64).

    Raises:
        ValueError, TypeError: an invalid argument; the message names it and the fix. A sample without a valid pixel is
            an error on the CPU, unless there is a ``group``; on a GPU, where reading the mask would stall the stream,
            it has no rows, and the rows of other images have distance 0 to it.
        BackendUnavailable: ``backend`` cannot compute this here.

    Example:
        >>> loss = pixel_relation_kd(student_map, teacher_map.detach(), distance="mse")
    """
    student_temperature, teacher_temperature = _check_options(
        similarity, distance, temperature, cross_image, group, reduction
    )
    pooled = active_group(group)
    checks.floating("student", student, (3, 4), LAYOUT, no_samples=pooled is not None)
    checks.floating("teacher", teacher, (3, 4), LAYOUT, no_samples=pooled is not None)
    checks.teacher("teacher", teacher)
    checks.same_device(student=student, teacher=teacher)
    names = ("student", "teacher")
    checks.same_size("batch sizes", names, (student.shape[0], teacher.shape[0]), "give the same samples to both")
    checks.same_size("maps", names, (student.shape[2:], teacher.shape[2:]), "resize or pool one to the other's size")
    rows_s, rows_t = student.flatten(2).mT, teacher.flatten(2).mT  # (B, N, C)
    rows_shape = (rows_s.shape[0], rows_s.shape[1])
    checks.row_weight(weight, rows_shape, "(B, N)", student, attention=False, pooled=pooled is not None)
    if pooled is not None:
        check_call(backend, student, teacher)
        rows_s, rows_t = savable(rows_s, rows_t)
    elif pixel_mask is not None or teacher_temperature is not None:
        checks.backend("relation", backend, student)
    mask, factor = None, None
    if pixel_mask is not None:
        mask = valid_pixels(pixel_mask, student, every_sample=True, anywhere=pooled is not None)
        if weight is not None and pooled is None:
            check_valid_weight(weight, mask)
        rows_s, rows_t = (fill(x.mT, mask).mT for x in (rows_s, rows_t))
        if distance == "kl":
            dtype = compute_dtype(student, teacher)
            taus = (student_temperature, student_temperature if teacher_temperature is None else teacher_temperature)
            rows_s, rows_t = (
                without_columns(x, mask, similarity, dtype, tau, cross_image, pooled)
                for x, tau in zip((rows_s, rows_t), taus, strict=True)
            )
            similarity = "dot"
        elif distance == "mse" and cross_image:
            rows_s, rows_t, factor = mean_over_columns(rows_s, rows_t, mask, similarity)
            similarity = "dot"
        elif distance == "mse":
            factor = columns_per_valid_one(mask, compute_dtype(student, teacher))
    options: dict[str, Any] = {"similarity": similarity, "distance": distance}
    if pooled is not None and distance == "mse":
        rows = relation_mse_gram(rows_s, rows_t, similarity=similarity, cross=True, group=pooled)
    elif pooled is not None:
        temperatures: dict[str, Any] = {"temperature": student_temperature, "teacher_temperature": teacher_temperature}
        rows = gathered_relation(rows_s, rows_t, pooled, **options, **temperatures)
    else:
        if teacher_temperature is not None and distance == "kl":
            rows_s, rows_t, backend = rows_at_student_temperature(
                rows_s, rows_t, similarity, student_temperature, teacher_temperature, backend
            )
            options["similarity"] = "dot"
        rows = relation_unchecked(
            rows_s, rows_t, **options, temperature=student_temperature, cross=cross_image, backend=backend
        )
    if mask is not None:
        rows, weight = valid_rows(rows if factor is None else rows * factor, mask, weight, reduction)
    return reduce_rows(rows, weight, reduction, pooled)


def _check_options(
    similarity: str,
    distance: str,
    temperature: Temperature,
    cross_image: bool,
    group: ProcessGroup | str | None,
    reduction: str,
) -> tuple[float | Tensor, float | Tensor | None]:
    """Return the temperatures of student and teacher."""
    checks.option("similarity", similarity, SIMILARITIES)
    checks.option("distance", distance, DISTANCES)
    checks.flags(cross_image=cross_image)
    checks.option("reduction", reduction, checks.REDUCTIONS)
    check_group(group, "cross_image", cross_image)
    return checks.temperatures(temperature)


class PixelRelationKD(LossModule):
    """:func:`pixel_relation_kd` as a module with the same arguments; ``pixel_mask`` is passed to each call.

    The widths may differ; no aligner is needed.

    Example:
        >>> kd = PixelRelationKD(distance="mse", cross_image=True)
        >>> loss = kd(student_map, teacher_map.detach())
    """

    def __init__(
        self,
        *,
        similarity: str = "cosine",
        distance: str = "kl",
        temperature: Temperature = 0.1,
        cross_image: bool = False,
        group: ProcessGroup | str | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        _check_options(similarity, distance, temperature, cross_image, group, reduction)
        super().__init__(
            {
                "similarity": similarity,
                "distance": distance,
                "temperature": temperature,
                "cross_image": cross_image,
                "group": group,
                "weight": weight,
                "reduction": reduction,
                "backend": backend,
            }
        )

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | None = None,
        pixel_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; a ``weight`` passed here overrides the module's."""
        options = self._options()
        if weight is not None:
            options["weight"] = weight
        return pixel_relation_kd(student, teacher, pixel_mask=pixel_mask, **options)

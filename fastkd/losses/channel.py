"""Channel-relation distillation: match the similarities between a network's channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastkd.losses._module import LossModule, make_aligner
from fastkd.losses._reduce import attention_of, channel_attention, reduce_rows
from fastkd.ops import checks
from fastkd.ops.collectives import active_group, check_call, check_group
from fastkd.ops.numerics import compute_dtype
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
    temperature: float | Tensor = 0.1,
    negate: bool = False,
    centered: bool = False,
    weight: Tensor | str | None = None,
    patches: int = 1,
    across_batch: bool = False,
    group: ProcessGroup | str | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compare the channel–channel relation matrices of student and teacher, row by row.

    A reconstruction of the channel-relation term of "Channel Attention-Guided Cross-Modal Knowledge Distillation for
    Referring Image Segmentation" (arXiv 2604.16806); its options also give the channel relations of DANet
    ("Dual Attention Network for Scene Segmentation"), ICKD ("Exploring Inter-Channel Correlation for
    Diversity-preserved Knowledge Distillation") and the channel term of CIRKD ("Cross-Image Relational Knowledge
    Distillation for Semantic Segmentation"): see docs/maths.md.

    Each sample's features are a C×N matrix X. With E = sim(X, X) of shape C×C, σ = −1 if ``negate`` else +1:

    - ``similarity``: "cosine" E = X̂X̂ᵀ with rows of norm 1; "mean" E = XXᵀ/N; "dot" E = XXᵀ.
    - ``distance``, per channel r: "kl" KL(softmax(σE_T[r]/τ) ‖ softmax(σE_S[r]/τ)), without a factor τ²;
      "mse" mean_j (E_S[r, j] − E_T[r, j])²; "row_cosine" ‖E_S[r]/‖E_S[r]‖ − E_T[r]/‖E_T[r]‖‖².

    A per-sample relation is invariant to a permutation of the pixels, so it carries no spatial information by itself.

    Args:
        student: (B, C, H, W) or (B, C, N), any floating dtype.
        teacher: the same B and C; its H, W may differ. Must not require grad.
        temperature: τ > 0, used by "kl".
        negate: compare by dissimilarity, as DANet's softmax(rowmax(E) − E) does; used by "kl".
        centered: subtract each channel's mean over the pixels first (with "cosine": Pearson correlation).
        weight: None, a (B, C) tensor ≥ 0, or "attention": C·softmax_C(⟨|F_T|⟩_N / 0.5).
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
        ValueError, TypeError: an invalid argument; the message names it and the fix.
        BackendUnavailable: ``backend`` cannot compute this here.

    Example:
        >>> loss = channel_kd(student_map, teacher_map.detach(), across_batch=True, centered=True)
        >>> loss = channel_kd(student_map, teacher_map.detach(), across_batch=True, group="world")  # under torchrun
    """
    temperature = _check_options(similarity, distance, temperature, patches, across_batch, group, reduction)
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
    if pooled is not None:
        check_call(backend, student, teacher)
        student, teacher = savable(student.flatten(2), teacher.flatten(2))  # (B, C, N)
        needs_means = centered or similarity == "mean" or isinstance(weight, str)
        means = channel_means(student, teacher, pooled) if needs_means else None
        if isinstance(weight, str):
            assert means is not None
            weight = attention_of(means.strength[None])
        rows = channel_relation(
            student,
            teacher,
            pooled,
            similarity=similarity,
            distance=distance,
            temperature=temperature,
            negate=negate,
            centered=centered,
            pooled=means,
        )
        return reduce_rows(rows, weight, reduction)
    if weight is not None:
        checks.backend("relation", backend, student)

    rows_s = _rows("student", student, centered, patches, across_batch)
    rows_t = _rows("teacher", teacher, centered, patches, across_batch)
    if isinstance(weight, str):
        weight = channel_attention(_rows("teacher", teacher, False, patches, across_batch))
    elif weight is not None and patches > 1:
        weight = weight.repeat_interleave(patches * patches, 0)
    rows = relation_unchecked(
        rows_s,
        rows_t,
        similarity=similarity,
        distance=distance,
        temperature=temperature,
        negate=negate,
        keep=keeping_pays(rows_s, rows_t),  # C×C is small compared with C×N
        backend=backend,
    )
    return reduce_rows(rows, weight, reduction)


def _check_options(
    similarity: str,
    distance: str,
    temperature: float | Tensor,
    patches: int,
    across_batch: bool,
    group: ProcessGroup | str | None,
    reduction: str,
) -> float | Tensor:
    checks.option("similarity", similarity, SIMILARITIES)
    checks.option("distance", distance, DISTANCES)
    temperature = checks.temperature(temperature)
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
    return temperature


def _rows(name: str, features: Tensor, centered: bool, patches: int, across_batch: bool) -> Tensor:
    """Return features as (samples, C, pixels), whose rows the relation compares."""
    if centered:
        features = features.to(compute_dtype(features))
        dims = (0, *range(2, features.dim())) if across_batch else tuple(range(2, features.dim()))
        features = features - features.mean(dims, keepdim=True)
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
    """:func:`channel_kd` as a module with the same arguments.

    If ``student_channels`` and ``teacher_channels`` are given and differ, its attribute ``aligner`` is a train-only,
    bias-free 1×1 convolution, else None. An aligner trained by this loss can match the relations without the student
    learning anything; prefer student and teacher maps of equal width.
    """

    def __init__(
        self,
        *,
        similarity: str = "cosine",
        distance: str = "kl",
        temperature: float | Tensor = 0.1,
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
        _check_options(similarity, distance, temperature, patches, across_batch, group, reduction)
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

    def forward(self, student: Tensor, teacher: Tensor, *, weight: Tensor | str | None = None) -> Tensor:
        """Return the loss; a ``weight`` passed here overrides the module's."""
        options = self._options()
        if weight is not None:
            options["weight"] = weight
        return channel_kd(student if self.aligner is None else self.aligner(student), teacher, **options)

"""Attended-map distillation: compare maps whose channels attend to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastkd.errors import BackendUnavailable
from fastkd.losses._mixing import mixing
from fastkd.losses._module import LossModule, make_aligner
from fastkd.losses._reduce import channel_attention, reduce_rows
from fastkd.losses._temperatures import Temperature
from fastkd.ops import checks
from fastkd.ops.cka import check_samples, negative_log_cka
from fastkd.ops.collectives import active_group, check_call, check_group
from fastkd.ops.dispatch import BACKENDS
from fastkd.ops.numerics import compute_dtype, fp64_together, full_precision, normalise_rows
from fastkd.ops.products import product
from fastkd.ops.relation.reference import SIMILARITIES
from fastkd.ops.torch_state import is_finite, savable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LAYOUT = "(B, C, H, W) or (B, C, N)"
DISTANCES = ("cka", "mse", "cosine")


def channel_attention_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    similarity: str = "cosine",
    negate: bool = False,
    temperature: Temperature = 0.1,
    gamma: float | Tensor = 1.0,
    distance: str = "cka",
    debiased: bool = True,
    weight: Tensor | str | None = None,
    group: ProcessGroup | str | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compare the maps of student and teacher after each map's channels have attended to one another.

    Another reading of the channel attention in "Channel Attention-Guided Cross-Modal Knowledge Distillation for
    Referring Image Segmentation" (arXiv 2604.16806), with the residual form of DANet ("Dual Attention Network for
    Scene Segmentation", arXiv 1809.02983). Each sample's features are a C×N matrix X; with E = sim(X, X) of shape C×C
    and σ = −1 if ``negate`` else +1, the attended map is Z = γ·softmax(σE/τ) X + X.

    - ``similarity``: "cosine" E = X̂X̂ᵀ with rows of norm 1; "mean" E = XXᵀ/N; "dot" E = XXᵀ.
    - ``distance``: "cka" −log CKA(Z_S, Z_T) over the samples of the batch, each flattened; "mse", per channel r,
      mean_n (Z_S[r, n] − Z_T[r, n])²; "cosine", per channel, ½‖Z_S[r]/‖Z_S[r]‖ − Z_T[r]/‖Z_T[r]‖‖², which is 1 minus
      the cosine of two rows that are not 0.

    CKA is the cosine of the two networks' centred B×B Gram matrices ("Similarity of Neural Network Representations
    Revisited", arXiv 1905.00414), so it compares which samples a network finds alike. The published estimator is close
    to 1 for any two networks if the batch is small and the maps are large: 0.9998 for random features, B = 16 and
    C·N = 65,536. The default is the unbiased estimator of HSIC, whose CKA is near 0 there. It may be negative; below
    0.1, −log is continued by its tangent, so that the loss is finite and its slope with respect to CKA stays −10.

    Args:
        student: (B, C, H, W) or (B, C, N), any floating dtype.
        teacher: the same B; for "mse" and "cosine" the same shape, for "cka" C, H and W may differ. Must not require
            grad.
        negate: attend to dissimilar channels, as DANet's softmax(rowmax(E) − E) does.
        temperature: τ > 0, or (τ_S, τ_T).
        gamma: γ, a number, or a tensor with one element, which may be learned; its gradient includes the teacher's map.
        distance: "cka", "mse" or "cosine".
        debiased: for "cka": the unbiased estimator, which needs B ≥ 4; False: the biased one as published, B ≥ 2.
        weight: for "mse" and "cosine": None, a (B, C) tensor ≥ 0, or "attention": C·softmax_C(⟨|F_T|⟩_N / 0.5).
        group: for "cka": pool the samples of these processes: None (this process alone), "world" (all processes; this
            one alone where torch.distributed is not initialised) or a ``torch.distributed`` ProcessGroup. The loss is
            then equal on every rank, and the gradients, averaged over the ranks as DistributedDataParallel does, are
            those of one process with the whole batch. All ranks call the loss and its backward; their batch sizes may
            differ, down to 0. The maps Z of all ranks are gathered; differentiable once, outside torch.compile's
            graphs.
        reduction: "mean" (Σ w·row / Σ w), "sum", or "none": (B, C), for "cka" (1,).
        backend: "auto" or "reference": the loss is computed in plain torch.

    Returns:
        The loss in fp32 (fp64 if an input is fp64). Equal networks have loss 0. NaN and Inf propagate.

    Raises:
        ValueError, TypeError: an invalid argument; the message names it and the fix.
        BackendUnavailable: another backend was requested.

    Example:
        >>> loss = channel_attention_kd(student_map, teacher_map.detach())  # any widths
        >>> loss = channel_attention_kd(student_map, teacher_map.detach(), distance="mse", weight="attention")
    """
    temperatures, gamma = _check_options(
        similarity, negate, temperature, gamma, distance, debiased, weight, group, reduction, backend
    )
    pooled = active_group(group)
    checks.floating("student", student, (3, 4), LAYOUT, no_samples=pooled is not None)
    checks.floating("teacher", teacher, (3, 4), LAYOUT, no_samples=pooled is not None)
    checks.teacher("teacher", teacher)
    checks.same_device(student=student, teacher=teacher)
    names = ("student", "teacher")
    if distance == "cka":
        checks.same_size("batch sizes", names, (student.shape[0], teacher.shape[0]), "give the same samples to both")
        if pooled is None:
            check_samples(student.shape[0], debiased, "use a larger batch, group='world', or distance='mse'")
        else:
            check_call("reference", student, teacher)
    else:
        hint = "resize the maps to one size and align the channels, as ChannelAttentionKD's 1×1 aligner does"
        checks.same_size("shapes", names, (student.shape, teacher.shape), f"{hint}; or distance='cka'")
        checks.row_weight(weight, (student.shape[0], student.shape[1]), "(B, C)", student, attention=True)

    dtype = compute_dtype(student, teacher)
    student, teacher = fp64_together(*savable(student, teacher))
    with full_precision(student.device):
        z_s, z_t = (
            _attended(x.flatten(2).to(dtype), similarity, negate, tau, gamma)
            for x, tau in zip((student, teacher), temperatures, strict=True)
        )  # (B, C, N)
    if distance == "cka":
        return reduce_rows(negative_log_cka(z_s.flatten(1), z_t.flatten(1), debiased, pooled), None, reduction)
    if distance == "mse":
        rows = (z_s - z_t).square().mean(-1)  # (B, C)
    else:
        rows = (normalise_rows(z_s) - normalise_rows(z_t)).square().sum(-1) / 2
    return reduce_rows(rows, channel_attention(teacher.flatten(2)) if isinstance(weight, str) else weight, reduction)


def _attended(
    rows: Tensor, similarity: str, negate: bool, temperature: float | Tensor, gamma: float | Tensor
) -> Tensor:
    """Return Z = γ P X + X for rows X (B, C, N)."""
    return gamma * product(mixing(rows, temperature, similarity, negate), rows) + rows


def _check_options(
    similarity: str,
    negate: bool,
    temperature: Temperature,
    gamma: float | Tensor,
    distance: str,
    debiased: bool,
    weight: object,
    group: ProcessGroup | str | None,
    reduction: str,
    backend: str,
) -> tuple[tuple[float | Tensor, float | Tensor], float | Tensor]:
    """Return the temperatures of student and teacher, and γ."""
    checks.option("similarity", similarity, SIMILARITIES)
    checks.option("distance", distance, DISTANCES)
    checks.option("reduction", reduction, checks.REDUCTIONS)
    checks.flags(negate=negate, debiased=debiased)
    if distance == "cka" and weight is not None:
        raise ValueError("weight: weighs channels, but distance='cka' has no loss per channel; use 'mse' or 'cosine'")
    check_group(group, "distance", True)
    if group is not None and distance != "cka":
        raise ValueError(
            f"group: pools the samples of several processes, which distance={distance!r} does not compare with each "
            "other; use distance='cka', or group=None"
        )
    _check_backend(backend)
    student, teacher = checks.temperatures(temperature)
    return (student, student if teacher is None else teacher), _gamma(gamma)


def _gamma(value: float | Tensor) -> float | Tensor:
    gamma = checks.number("gamma", value, traced=True)
    if isinstance(gamma, Tensor) and not checks.readable(gamma):
        return gamma
    read = gamma.item() if isinstance(gamma, Tensor) else gamma
    if not is_finite(read):
        raise ValueError(f"gamma: expected a finite number, got {read!r}")
    return gamma


def _check_backend(backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if backend not in ("auto", "reference"):
        raise BackendUnavailable(
            f"backend={backend!r}: channel_attention_kd is computed in plain torch; use backend='auto' or 'reference'"
        )


class ChannelAttentionKD(LossModule):
    """:func:`channel_attention_kd` as a module with the same arguments.

    Given ``gamma=torch.nn.Parameter(torch.tensor(0.0))``, γ is learned, one for both networks. If ``student_channels``
    and ``teacher_channels`` are given and differ, its attribute ``aligner`` is a train-only, bias-free 1×1 convolution,
    else None; "mse" and "cosine" need it where the widths differ, "cka" does not.

    Example:
        >>> kd = ChannelAttentionKD(gamma=torch.nn.Parameter(torch.tensor(0.0)))
        >>> optimizer = torch.optim.AdamW([*student.parameters(), *kd.parameters()])  # with γ
        >>> loss = kd(student_map, teacher_map.detach())
    """

    def __init__(
        self,
        *,
        similarity: str = "cosine",
        negate: bool = False,
        temperature: Temperature = 0.1,
        gamma: float | Tensor = 1.0,
        distance: str = "cka",
        debiased: bool = True,
        weight: Tensor | str | None = None,
        group: ProcessGroup | str | None = None,
        reduction: str = "mean",
        backend: str = "auto",
        student_channels: int | None = None,
        teacher_channels: int | None = None,
    ) -> None:
        _check_options(similarity, negate, temperature, gamma, distance, debiased, weight, group, reduction, backend)
        super().__init__(
            {
                "similarity": similarity,
                "negate": negate,
                "temperature": temperature,
                "gamma": gamma,
                "distance": distance,
                "debiased": debiased,
                "weight": weight,
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
        return channel_attention_kd(student if self.aligner is None else self.aligner(student), teacher, **options)

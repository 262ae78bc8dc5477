"""Attention distillation: match the attention maps of two networks, computed from their queries and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.losses._module import LossModule
from fastkd.losses._reduce import reduce_rows
from fastkd.losses._temperatures import Temperature, differentiable, scaled, temperature_ratio
from fastkd.ops import checks
from fastkd.ops.attention_kl import attention_kl_unchecked
from fastkd.ops.attention_kl.plan import Inputs
from fastkd.ops.numerics import compute_dtype, computes_fp64
from fastkd.ops.torch_state import has_tangent, is_finite, savable

Scale = float | Tensor | None


def attention_kd(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    scale: Scale | tuple[Scale, Scale] = None,
    temperature: Temperature = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    relation_heads: int | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compare attention maps: KL(softmax(E_T[i]/τ_T) ‖ softmax(E_S[i]/τ_S)) of every query i over its valid keys.

    E = scale · Q Kᵀ + bias per network and head. Neither map is stored, so the loss fits modules that compute their
    attention with a fused kernel. There is no factor τ²: the temperature sets the sharpness of a map. With
    ``relation_heads`` this is the query–key relation of "MiniLMv2" (arXiv 2012.15828).

    Args:
        student_q: queries (B, H, N, D_S), any floating dtype, after the module's norms and rotary embedding.
        student_k: keys (B, H, M, D_S).
        teacher_q: (B, H, N, D_T); D_T may differ from D_S, and H too with ``relation_heads``. Must not require grad.
        teacher_k: (B, H, M, D_T). Must not require grad.
        scale: of Q Kᵀ. None: 1/√D of each network. A number, or a tensor (H,) or (H, 1, 1) with one per head, for both
            networks; a tuple is (student's, teacher's). A constant, as the biases are.
        temperature: τ > 0, or (τ_S, τ_T).
        student_bias: None or a floating tensor that broadcasts to (B, H, N, M), such as relative positions or −inf at
            forbidden pairs. Must not require grad.
        teacher_bias: the same for the teacher.
        key_mask: None or bool (B, M), True = valid.
        query_mask: None or bool (B, N), True = valid. What masked queries and keys hold, even NaN, affects neither loss
            nor gradient.
        causal: query i attends to the keys j ≤ i + (M − N) only; needs M ≥ N.
        relation_heads: None, or the number R of equal parts into which each network's heads, concatenated, are
            divided before they are compared. Heads and widths may then differ between the networks.
        reduction: "mean" over the valid queries of all heads, "sum", or "none": (B, H, N), 0 at masked queries.
        backend: "auto", "reference" or "cpu"; on GPUs "auto" uses plain torch, which stores the maps.

    Returns:
        The loss in fp32 (fp64 if an input is fp64). 0·log 0 counts as 0; NaN and Inf propagate.

    Raises:
        ValueError, TypeError: an invalid argument; the message names it and the fix. A query without a valid key is an
            error on the CPU; on a GPU, where reading the mask would stall the stream, its loss is NaN. Biases are not
            read.
        BackendUnavailable: ``backend`` cannot compute this here.

    Example:
        >>> loss = attention_kd(q_s, k_s, q_t.detach(), k_t.detach(), key_mask=tokens != pad)
    """
    checks.option("reduction", reduction, checks.REDUCTIONS)
    checks.flags(causal=causal)
    student_temperature, teacher_temperature = checks.temperatures(temperature)
    features = {"student_q": student_q, "student_k": student_k, "teacher_q": teacher_q, "teacher_k": teacher_k}
    _check_features(features)
    if relation_heads is not None:
        features = _as_relation_heads(features, relation_heads)
        student_q, student_k, teacher_q, teacher_k = features.values()
    heads = student_q.shape[1]
    checks.same_size(
        "heads", ("student_q", "teacher_q"), (heads, teacher_q.shape[1]), "pass relation_heads to regroup them"
    )
    batch, queries, keys = student_q.shape[0], student_q.shape[2], student_k.shape[2]
    if causal and keys < queries:
        raise ValueError(f"causal: needs at least as many keys as queries, got {keys} keys and {queries} queries")
    shape = (batch, heads, queries, keys)
    student_bias = _bias("student_bias", student_bias, shape, student_q)
    teacher_bias = _bias("teacher_bias", teacher_bias, shape, student_q)
    key_mask, query_mask = _masks(key_mask, query_mask, causal, student_q, student_k)
    student_scale, teacher_scale = _scales(scale, student_q, teacher_q)
    if teacher_temperature is not None:  # the operator takes one temperature for both networks
        backend = differentiable(backend, student_temperature, teacher_temperature)
        ratio = temperature_ratio(student_temperature, teacher_temperature, student_q.device)
        teacher_scale = teacher_scale * ratio
        if teacher_bias is not None:
            biases = [x for x in (student_bias, teacher_bias) if x is not None]
            teacher_bias = scaled(teacher_bias.to(compute_dtype(*biases, *features.values())), ratio)
    scales, masks = (student_scale, teacher_scale), (key_mask, query_mask)
    inputs = Inputs(student_q, student_k, teacher_q, teacher_k, *scales, student_bias, teacher_bias, *masks)
    expected = _expected_gradient(reduction, shape, query_mask)
    rows = attention_kl_unchecked(inputs, student_temperature, causal, expected, backend)
    if reduction == "mean":  # not rows.mean(), whose backward writes a gradient per row; masked rows are 0
        return rows.sum() / (rows.numel() if query_mask is None else query_mask.sum() * heads)
    return reduce_rows(rows, None, reduction)


def _expected_gradient(reduction: str, shape: Sequence[int], query_mask: Tensor | None) -> float | None:
    """Return what each row's loss receives in the backward of the reduced loss itself, if that is one number."""
    if reduction == "none":
        return None
    batch, heads, queries, _ = shape
    if reduction == "sum" or torch.compiler.is_compiling():  # a traced number is one graph per batch size
        return 1.0
    if query_mask is None:
        return 1.0 / (batch * heads * queries)
    return 1.0 / (int(query_mask.sum()) * heads) if checks.readable(query_mask) else 1.0


def _check_features(features: dict[str, Tensor]) -> None:
    for name, tensor in features.items():
        layout = f"(B, heads, {'N' if name.endswith('q') else 'M'}, D)"
        checks.floating(name, tensor, (4,), layout)
        if name.startswith("teacher"):
            checks.teacher(name, tensor)
    checks.same_device(**features)
    q_s, k_s, q_t, k_t = features.values()
    for side, q, k in (("student", q_s, k_s), ("teacher", q_t, k_t)):
        names = (f"{side}_q", f"{side}_k")
        checks.same_size("batch sizes", names, (q.shape[0], k.shape[0]), "give the same samples to both")
        checks.same_size("heads", names, (q.shape[1], k.shape[1]), "repeat the keys of grouped queries")
        checks.same_size("widths D", names, (q.shape[3], k.shape[3]), "pass queries and keys of the same module")
    hint = "resize one network's tokens, and drop CLS and register tokens that the other lacks"
    checks.same_size("batch sizes", ("student_q", "teacher_q"), (q_s.shape[0], q_t.shape[0]), "give the same samples")
    checks.same_size("queries N", ("student_q", "teacher_q"), (q_s.shape[2], q_t.shape[2]), hint)
    checks.same_size("keys M", ("student_k", "teacher_k"), (k_s.shape[2], k_t.shape[2]), hint)


def _as_relation_heads(features: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Return queries and keys (B, H, N, D) as (B, R, N, H·D/R), where R is ``heads``."""
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"relation_heads: expected None or a positive int, got {type(heads).__name__}")
    for name, x in features.items():
        width = x.shape[1] * x.shape[3]
        if heads < 1 or width % heads:
            raise ValueError(
                f"relation_heads: expected a divisor of {name}'s width {width} (heads × D), got {heads}; try "
                f"{math.gcd(*(x.shape[1] * x.shape[3] for x in features.values()))}"
            )
    return {
        name: x if x.shape[1] == heads else x.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
        for name, x in features.items()
    }


def _scales(scale: object, student_q: Tensor, teacher_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return each network's scales (H,), in fp64 if the device computes in it: they multiply every logit."""
    values: Sequence[object] = scale if isinstance(scale, tuple | list) else (scale, scale)
    if len(values) != 2:
        raise ValueError(f"scale: expected a pair (student's, teacher's), got {len(values)} values")
    names = ("scale[0]", "scale[1]") if values is scale else ("scale", "scale")
    student, teacher = (
        _scale(name, value, q) for name, value, q in zip(names, values, (student_q, teacher_q), strict=True)
    )
    return student, teacher


def _scale(name: str, value: object, q: Tensor) -> Tensor:
    heads = q.shape[1]
    dtype = torch.float64 if computes_fp64(q.device) else torch.float32
    if not isinstance(value, Tensor):
        number = q.shape[3] ** -0.5 if value is None else checks.number(name, value)
        assert not isinstance(number, Tensor)
        if not is_finite(number):
            raise ValueError(f"{name}: expected a finite number, got {number!r}")
        return torch.full((heads,), number, dtype=dtype, device=q.device)
    checks.floating(name, value, (0, 1, 3), "(), (H,) or (H, 1, 1)")
    if value.numel() != 1 and tuple(value.shape) not in ((heads,), (heads, 1, 1)):
        raise ValueError(f"{name}: expected one number per head, ({heads},), got shape {tuple(value.shape)}")
    if value.dim():
        checks.same_device(student_q=q, **{name: value})
    _constant(name, value)
    if checks.readable(value) and not bool(value.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got {value.tolist()}")
    return savable(value)[0].detach().to(q.device, dtype).reshape(-1).expand(heads)  # without reading it from a GPU


def _constant(name: str, tensor: Tensor) -> None:
    recorded = torch.is_grad_enabled() and tensor.requires_grad
    if recorded or (not torch.compiler.is_compiling() and has_tangent(tensor)):
        state = "requires grad" if recorded else "has a forward-mode tangent"
        raise ValueError(f"{name}: {state}, but the loss has no gradient for it; pass {name}.detach()")


def _bias(name: str, bias: Tensor | None, shape: tuple[int, int, int, int], like: Tensor) -> Tensor | None:
    """Return a checked bias with four dimensions."""
    if bias is None:
        return None
    checks.floating(name, bias, (1, 2, 3, 4), "that broadcasts to (B, heads, N, M)")
    _constant(name, bias)
    checks.same_device(student_q=like, **{name: bias})
    sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to (B, heads, N, M) = {shape}, got {tuple(bias.shape)}"
        )
    return savable(bias)[0].detach().reshape(sizes)


def _masks(
    key_mask: Tensor | None, query_mask: Tensor | None, causal: bool, q: Tensor, k: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the checked masks."""
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    if key_mask is not None:
        key_mask = checks.bool_mask("key_mask", key_mask, [(batch, keys)], k)
        checks.every_sample_valid("key_mask", key_mask, "key")
    if query_mask is not None:
        query_mask = checks.bool_mask("query_mask", query_mask, [(batch, queries)], q)
        if checks.readable(query_mask) and not bool(query_mask.any()):
            raise ValueError("query_mask: no valid query in the batch; skip this loss for such a batch")
    if causal and key_mask is not None and checks.readable(key_mask):
        first = key_mask.int().argmax(1)  # (B,), the first valid key
        early = torch.arange(queries, device=q.device) + (keys - queries) < first[:, None]  # (B, N)
        blind = early if query_mask is None else early & query_mask
        if bool(blind.any()):
            sample, query = blind.nonzero()[0].tolist()
            raise ValueError(
                f"key_mask: with causal=True no valid key is visible to query {query} of sample {sample}; mask such "
                "queries with query_mask"
            )
    return key_mask, query_mask


class AttentionKD(LossModule):
    """:func:`attention_kd` as a module with the same arguments; masks and biases are passed to each call.

    It has no parameters.

    Example:
        >>> kd = AttentionKD(relation_heads=6)
        >>> loss = kd(q_s, k_s, q_t.detach(), k_t.detach(), key_mask=tokens != pad)
    """

    def __init__(
        self,
        *,
        scale: Scale | tuple[Scale, Scale] = None,
        temperature: Temperature = 1.0,
        causal: bool = False,
        relation_heads: int | None = None,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        checks.option("reduction", reduction, checks.REDUCTIONS)
        checks.flags(causal=causal)
        checks.temperatures(temperature)
        super().__init__(
            {
                "scale": scale,
                "temperature": temperature,
                "causal": causal,
                "relation_heads": relation_heads,
                "reduction": reduction,
                "backend": backend,
            }
        )

    def forward(
        self,
        student_q: Tensor,
        student_k: Tensor,
        teacher_q: Tensor,
        teacher_k: Tensor,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss."""
        return attention_kd(
            student_q,
            student_k,
            teacher_q,
            teacher_k,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            key_mask=key_mask,
            query_mask=query_mask,
            **self._options(),
        )

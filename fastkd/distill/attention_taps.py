"""Taps for attention: the queries and keys whose map a module computes, after its norms and rotary embeddings."""

from __future__ import annotations

import threading
import types
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastkd.losses import attention_kd


class AttentionTap(NamedTuple):
    """A tap of an attention module, as a target of `Taps`: records a `TappedAttention` instead of the output.

    The module, or one inside it, must call ``torch.nn.functional.scaled_dot_product_attention``, whose arguments are
    recorded; of several calls the last. timm's attention modules do (those that do so only on request are switched
    during the forward), transformers' with ``attn_implementation="sdpa"``, its default, and ``nn.MultiheadAttention``
    with ``need_weights=False``. A module that is compiled by ``torch.compile`` cannot be tapped.

    Args:
        path: path of the attention module, such as ``"blocks.11.attn"`` (timm's ViT and DINOv3),
            ``"layers.3.blocks.1.attn"`` (Swin) or ``"encoder.layer.11.attention.self"`` (BERT).
        tokens: the tokens to keep, as queries and as keys: slices separated by commas. ``":"`` keeps all, ``"5:"``
            drops one CLS and four register tokens, ``"0:1,5:"`` drops only the registers. Maps are compared token by
            token, so keep the tokens that have a counterpart in the other network: all patches; CLS if both networks
            have it; register tokens never, since each network learns its own.

    Example:
        >>> ours = {"last": AttentionTap("blocks.11.attn", tokens="1:")}  # without CLS
        >>> theirs = {"last": AttentionTap("blocks.23.attn", tokens="5:")}  # without CLS and four registers
        >>> term = Term(tapped_attention_kd, "last")
        >>> distiller = Distiller(student, teacher, task_loss, [term], student_taps=ours, teacher_taps=theirs)
    """

    path: str
    tokens: str = ":"


@dataclass(frozen=True)
class TappedAttention:
    """The arguments of an attention: its map is ``softmax(scale · q kᵀ + bias)``.

    Attributes:
        q: (B, heads, N, D).
        k: (B, heads, M, D), the keys of grouped queries repeated.
        bias: None, or what is added to the logits, with −inf where a boolean mask excludes a pair.
        scale: None (1/√D) or a number.
        causal: whether query i attends to keys j ≤ i only. Where N ≠ M, or tokens are kept in another order, ``bias``
            excludes the other pairs instead.
    """

    q: Tensor
    k: Tensor
    bias: Tensor | None
    scale: float | None
    causal: bool


def tapped_attention_kd(
    student: TappedAttention,
    teacher: TappedAttention,
    *,
    temperature: float | Tensor | tuple[float | Tensor, float | Tensor] = 1.0,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    relation_heads: int | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Return :func:`fastkd.losses.attention_kd` of two tapped attentions, with their scales, biases and causality.

    Biases are constants: a relative position bias gets its gradient from the task loss only. The options are those of
    ``attention_kd``.

    Raises:
        TypeError: a side is not a `TappedAttention`.
        ValueError: one map is causal and the other is not, or ``attention_kd`` rejects its arguments.

    Example:
        >>> Term(tapped_attention_kd, "last", kwargs={"relation_heads": 6})  # "last": an AttentionTap of each model
    """
    for name, side in (("student", student), ("teacher", teacher)):
        if not isinstance(side, TappedAttention):
            raise TypeError(
                f"{name}: expected a TappedAttention, as an AttentionTap records, got {type(side).__name__}"
            )
    if student.causal != teacher.causal:
        raise ValueError(f"causal: differs, {student.causal} for the student and {teacher.causal} for the teacher")
    constant = lambda bias: None if bias is None else bias.detach()
    return attention_kd(
        student.q,
        student.k,
        teacher.q,
        teacher.k,
        scale=(student.scale, teacher.scale),
        student_bias=constant(student.bias),
        teacher_bias=constant(teacher.bias),
        causal=student.causal,
        temperature=temperature,
        key_mask=key_mask,
        query_mask=query_mask,
        relation_heads=relation_heads,
        reduction=reduction,
        backend=backend,
    )


# --- recording --------------------------------------------------------------------------------------------------------


class _Calls(TorchFunctionMode):
    """Record the arguments of the latest attention."""

    def __init__(self) -> None:
        super().__init__()
        self.latest: TappedAttention | None = None

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.latest = _arguments(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:  # the mode is off in here, and it calls the function above
            with self:
                return _multi_head_attention_forward(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _without_overrides(function: Any) -> Any:
    """Return a copy of a function of torch.nn.functional that does not ask modes to replace it, which would not end."""
    names = vars(F) | {"has_torch_function": lambda tensors: False}
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


_multi_head_attention_forward = _without_overrides(F.multi_head_attention_forward)


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> TappedAttention:
    """Return what the map of ``scaled_dot_product_attention`` depends on."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    bias = attn_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
    queries, keys = query.shape[-2], key.shape[-2]
    if is_causal and queries != keys:  # torch aligns the first query and key, attention_kd the last
        bias, is_causal = _causal_bias(torch.arange(queries), torch.arange(keys), query), False
    return TappedAttention(query, key, bias, scale, is_causal)


def _causal_bias(queries: Tensor, keys: Tensor, like: Tensor) -> Tensor:
    """Return a bias (N, M) that excludes the pairs whose key has a later position than the query."""
    later = keys > queries[:, None]
    return like.new_zeros(later.shape).masked_fill_(later.to(like.device), -torch.inf)


class AttentionHooks:
    """Forward hooks of a tapped module: ``before`` starts recording, ``after`` stops and keeps the attention."""

    def __init__(self, outputs: dict[str, tuple[Any, int | None]], name: str, tokens: str) -> None:
        self.outputs, self.name, self.slices = outputs, name, _slices(name, tokens)
        self.active: dict[int, tuple[_Calls, list[nn.Module]]] = {}  # by thread

    def before(self, module: nn.Module, args: Any) -> None:
        """Record calls of this thread; switch modules that compute the map themselves to the fused function."""
        switched = [m for m in module.modules() if getattr(m, "fused_attn", None) is False]
        for each in switched:
            each.fused_attn = True  # type: ignore[assignment]
        calls = _Calls()
        calls.__enter__()
        self.active[threading.get_ident()] = calls, switched

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Undo ``before``, also after an exception, and keep the latest attention."""
        calls, switched = self.active.pop(threading.get_ident())
        calls.__exit__(None, None, None)
        for each in switched:
            each.fused_attn = False  # type: ignore[assignment]
        if calls.latest is not None:
            self.outputs[self.name] = _kept(self.name, calls.latest, self.slices), None
        elif output is not None:  # else the forward raised
            raise RuntimeError(
                f"tap {self.name!r}: {type(module).__name__} computed no attention with torch's "
                "scaled_dot_product_attention, whose arguments the tap records: load a transformers model with "
                "attn_implementation='sdpa', call nn.MultiheadAttention with need_weights=False, do not compile the "
                "module, or compute queries and keys in your own hook"
            )


def _slices(name: str, tokens: str) -> list[slice]:
    """Return the slices in a text such as ``"0:1,5:"``."""
    try:
        parts = [[int(bound) if bound.strip() else None for bound in part.split(":")] for part in tokens.split(",")]
        if any(len(part) != 2 for part in parts):
            raise ValueError
    except (AttributeError, ValueError):
        raise ValueError(
            f"tap {name!r}: tokens: expected slices such as ':', '5:' or '0:1,5:', got {tokens!r}"
        ) from None
    return [slice(*part) for part in parts]


def _kept(name: str, attention: TappedAttention, slices: list[slice]) -> TappedAttention:
    """Return the attention between the tokens of some slices."""
    if slices == [slice(None, None)]:
        return attention
    q, k, bias, causal = attention.q, attention.k, attention.bias, attention.causal
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"tap {name!r}: tokens selects among queries and keys alike, but there are {q.shape[-2]} queries and "
            f"{k.shape[-2]} keys"
        )
    count = q.shape[-2]
    kept = [i for part in slices for i in range(count)[part]]
    if not kept:
        raise ValueError(f"tap {name!r}: tokens selects none of {count} tokens")
    index = torch.tensor(kept, device=q.device)
    q, k = (x.index_select(-2, index) for x in (q, k))
    if bias is not None:
        for dim in (-2, -1):
            if bias.dim() >= -dim and bias.shape[dim] > 1:
                bias = bias.index_select(dim, index)
    if causal and kept != sorted(set(kept)):  # the order of the tokens is no longer that of their positions
        bias, causal = _causal_bias(index, index, q), False
    return TappedAttention(q, k, bias, attention.scale, causal)

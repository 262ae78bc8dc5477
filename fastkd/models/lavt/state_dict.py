"""Normalise LAVT state dicts: remove wrapper prefixes, computed buffers and BERT's pooler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastkd._wrappers import plain_name

TEXT_PREFIX = "text_encoder."
_INDEX, _TABLE = ".attn.relative_position_index", ".attn.relative_position_bias_table"
# Buffers that are recomputed, and the pooler of a complete BERT: LAVT uses the word vectors, not the pooled one.
_UNUSED = {TEXT_PREFIX + name for name in ("embeddings.position_ids", "embeddings.token_type_ids")} | {
    TEXT_PREFIX + f"pooler.dense.{name}" for name in ("weight", "bias")
}


def gather(state_dict: Mapping[str, Any], bert_state_dict: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Return one state dict under LAVT's names, without wrapper prefixes, computed buffers and the pooler.

    Args:
        state_dict: ``backbone.*`` and ``classifier.*``, optionally ``text_encoder.*``.
        bert_state_dict: Weights under BertModel's names; they get the prefix ``text_encoder.``.

    Raises:
        TypeError: An argument is not a dict of names and tensors.
        ValueError: Two names for one tensor, text weights present twice, or a computed buffer of the wrong shape.
    """
    state = _named_tensors("state_dict", state_dict)
    if bert_state_dict is not None:
        named = _named_tensors("bert_state_dict", bert_state_dict)
        text = {TEXT_PREFIX + name.removeprefix(TEXT_PREFIX): tensor for name, tensor in named.items()}
        if duplicates := [name for name in state if name.startswith(TEXT_PREFIX)]:
            raise ValueError(
                f"bert_state_dict was given, but state_dict already has text weights, such as {duplicates[0]}"
            )
        if not text:
            raise ValueError("bert_state_dict is empty; pass None for a model that takes word vectors only")
        state |= text
    kept = {name: t for name, t in state.items() if name not in _UNUSED and not _is_position_index(name, state)}
    for name, tensor in kept.items():
        if not tensor.is_floating_point() and not name.endswith(("num_batches_tracked", _INDEX)):
            raise ValueError(f"state_dict: {name} is {tensor.dtype}, weights must be floating point")
    return kept


def _is_position_index(name: str, state: Mapping[str, Tensor]) -> bool:
    """Return whether ``name`` is the index of an existing bias table; (2w − 1)² rows need a w² × w² index."""
    table = state.get(name.removesuffix(_INDEX) + _TABLE) if name.endswith(_INDEX) else None
    if table is None:
        return False
    rows = table.shape[0] if table.dim() else 0
    window = (math.isqrt(rows) + 1) // 2
    # LAVTConfig.from_state_dict reports a table with another number of rows.
    if (2 * window - 1) ** 2 == rows and state[name].shape != (window**2, window**2):
        raise ValueError(
            f"state_dict: {name} is {tuple(state[name].shape)}, expected {(window**2, window**2)} for the {rows} rows "
            "of its relative_position_bias_table"
        )
    return True


def add_counters(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Add missing batch-norm counters, which old files lack and inference does not use."""
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros_like(tensor))


def _named_tensors(argument: str, state: Any) -> dict[str, Tensor]:
    """Return the tensors by name, without wrapper prefixes."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{argument} must be a dict of names and tensors, got {type(state).__name__}")
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            hint = f'; for a whole checkpoint, pass its ["{key}"]' if isinstance(value, Mapping) else ""
            raise TypeError(f"{argument} must hold tensors by name, got {type(value).__name__} for {key!r}{hint}")
        name = plain_name(key)
        while name.startswith("module."):  # DistributedDataParallel
            name = name.removeprefix("module.")
        if name in named:
            raise ValueError(f"{argument} has two tensors for {name} (with and without a wrapper's prefix)")
        named[name] = value
    return named

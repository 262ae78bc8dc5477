"""State dicts of LAVT: other people's names brought to ours, with every key accounted for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastkd._wrappers import plain_name

TEXT = "text_encoder."
_INDEX, _TABLE = ".attn.relative_position_index", ".attn.relative_position_bias_table"
_UNUSED = {TEXT + name for name in ("embeddings.position_ids", "embeddings.token_type_ids")} | {
    TEXT + f"pooler.dense.{name}" for name in ("weight", "bias")
}  # computed anew, and of a BERT that was saved whole; LAVT reads the words, not the pooled sentence


def gather(state_dict: Mapping[str, Any], bert_state_dict: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """One state dict under LAVT's own names: wrappers' prefixes off, computed buffers and the pooler dropped.

    Args:
        state_dict: ``backbone.*`` and ``classifier.*``, and ``text_encoder.*`` or not.
        bert_state_dict: A BertModel's names, which get ``text_encoder.`` in front.

    Raises:
        TypeError: No dict of names and tensors.
        ValueError: Two names for one tensor, text weights twice, or a computed buffer that fits no weight.
    """
    state = _named("state_dict", state_dict)
    if bert_state_dict is not None:
        text = {TEXT + name.removeprefix(TEXT): t for name, t in _named("bert_state_dict", bert_state_dict).items()}
        if twice := [name for name in state if name.startswith(TEXT)]:
            raise ValueError(
                f"bert_state_dict was given, but state_dict has text weights of its own, such as {twice[0]}"
            )
        if not text:
            raise ValueError("bert_state_dict is empty; leave it out for a model that takes word vectors only")
        state |= text
    kept = {name: t for name, t in state.items() if name not in _UNUSED and not _is_index(name, state)}
    for name, tensor in kept.items():
        if not tensor.is_floating_point() and not name.endswith(("num_batches_tracked", _INDEX)):
            raise ValueError(f"state_dict: {name} is {tensor.dtype}, weights must be floating point")
    return kept


def _is_index(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether this is the index of a table that is there; (2w − 1)² rows go with w² × w² numbers."""
    table = state.get(name.removesuffix(_INDEX) + _TABLE) if name.endswith(_INDEX) else None
    if table is None:
        return False
    rows = table.shape[0] if table.dim() else 0
    window = (math.isqrt(rows) + 1) // 2
    if (2 * window - 1) ** 2 == rows and state[name].shape != (window**2, window**2):  # other tables fail by themselves
        raise ValueError(
            f"state_dict: {name} is {tuple(state[name].shape)}, not {(window**2, window**2)} as the {rows} rows of its "
            "relative_position_bias_table ask for"
        )
    return True


def add_counters(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Batch norms' counters, which old files lack and inference never reads, are taken from the model."""
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros_like(tensor))


def _named(argument: str, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise TypeError(f"{argument} must be a dict of names and tensors, got {type(state).__name__}")
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            hint = f'; is it a whole checkpoint? Then give its ["{key}"]' if isinstance(value, Mapping) else ""
            raise TypeError(f"{argument} must hold tensors by name, got {type(value).__name__} for {key!r}{hint}")
        name = plain_name(key)
        while name.startswith("module."):  # of DistributedDataParallel
            name = name.removeprefix("module.")
        if name in named:
            raise ValueError(f"{argument} has two tensors for {name} (with and without a wrapper's prefix)")
        named[name] = value
    return named

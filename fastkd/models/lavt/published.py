"""Read published LAVT checkpoints without running code from the file."""

from __future__ import annotations

import argparse
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastkd._messages import shortened
from fastkd.models import pickles
from fastkd.models.lavt.state_dict import TEXT_PREFIX


@dataclass(frozen=True)
class LAVTCheckpoint:
    """Weights and settings of a published checkpoint.

    Attributes:
        layout: "lavt" (text weights under ``bert_model``) or "lavt_one" (text weights inside ``model``).
        state: The weights under ``model``.
        bert_state: The weights under ``bert_model``, or None.
        fusion_heads: Parsed from ``args.mha``; 1-1-1-1 if it is empty or absent.
    """

    layout: str
    state: Mapping[str, Tensor]
    bert_state: Mapping[str, Tensor] | None
    fusion_heads: tuple[int, ...]


def read_checkpoint(path: str | Path) -> LAVTCheckpoint:
    """Read a checkpoint such as ``refcoco.pth``; reject pickled objects other than tensors and settings.

    Args:
        path: A file written by ``torch.save``: a dict with ``model``, ``args`` and, in one of the layouts,
            ``bert_model``. Optimizer and scheduler states are ignored.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, has another layout, an invalid ``args.mha``, or holds objects other than
            tensors, plain containers and ``argparse.Namespace`` (all are listed, none is constructed).

    Example::

        found = read_checkpoint("refcoco.pth")
        found.layout, found.fusion_heads     # ("lavt", (1, 1, 1, 1))
    """
    path = Path(path)
    values = pickles.load(path)
    model = values.get("model") if isinstance(values, Mapping) else None
    if not isinstance(model, Mapping):
        got = f"a dict of {_keys(values)}" if isinstance(values, Mapping) else f"a {type(values).__name__}"
        raise ValueError(
            f"{path} is not a LAVT checkpoint: expected a dict with 'model' (and 'bert_model', 'args'), got {got}. "
            "Pass a bare state dict to LAVT.from_state_dict"
        )
    text_inside = any(TEXT_PREFIX in name for name in model if isinstance(name, str))
    bert = values.get("bert_model")
    if bert is not None and not isinstance(bert, Mapping):
        raise ValueError(f"{path}: 'bert_model' must be a state dict, got {type(bert).__name__}")
    if bert is None and not text_inside:
        raise ValueError(
            f"{path} has no text weights: neither 'bert_model' nor {TEXT_PREFIX}* in 'model'; found {_keys(values)}"
        )
    if bert is not None and text_inside:
        raise ValueError(f"{path} has text weights twice: under 'bert_model' and as {TEXT_PREFIX}* in 'model'")
    args = values.get("args", argparse.Namespace())
    if not isinstance(args, argparse.Namespace | Mapping):
        raise ValueError(f"{path}: 'args' must be an argparse.Namespace, got {type(args).__name__}")
    mha = args.get("mha") if isinstance(args, Mapping) else getattr(args, "mha", None)
    return LAVTCheckpoint("lavt" if bert is not None else "lavt_one", model, bert, _parse_heads(path, mha))


def _parse_heads(path: Path, mha: Any) -> tuple[int, ...]:
    """Parse ``args.mha``: None, "", "4-4-4-4", or a sequence of four numbers."""
    if mha is None or mha == "":
        return (1, 1, 1, 1)
    numbers = re.split(r"[-,\s]+", mha.strip()) if isinstance(mha, str) else mha
    try:
        heads = tuple(int(number) if isinstance(number, str) else operator.index(number) for number in numbers)
        if len(heads) != 4 or min(heads) < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{path}: args.mha must be empty or four heads such as '1-2-4-8', got {mha!r}") from None
    return heads


def _keys(values: Mapping[Any, Any]) -> str:
    return shortened([str(name) for name in values], 6) or "nothing"

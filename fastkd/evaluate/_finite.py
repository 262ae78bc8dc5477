"""Networks that compute NaN: no decision can be read from it, and argmax would make it background."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def undecided(logits: Tensor) -> Tensor:
    """Return which samples of logits (B, 2, H, W) have a pixel without a larger logit and without a tie, (B,) bool.

    That is a NaN, or the same infinity twice.
    """
    return torch.isnan(logits[:, 1].float() - logits[:, 0].float()).flatten(1).any(1)


def blame(model: nn.Module) -> str:
    """Return the likely cause of NaN, and the fix, as the end of an error message."""
    broken = [
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        return f"its weights hold NaN or Inf ({', '.join(broken[:3])}{more}): load an earlier checkpoint"
    kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})) or "no"
    return f"its weights ({kinds}) are finite: look at the image, or compute in float32 if a narrower format overflows"

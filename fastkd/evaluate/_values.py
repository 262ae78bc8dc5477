"""Check values: masks of 0 and 1, logits without NaN. Needs only torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastkd._messages import shortened


def check_mask(mask: Tensor, name: str = "mask") -> None:
    """Raise ``ValueError`` unless the mask holds only 0 and 1; a bool mask is not read."""
    if mask.dtype == torch.bool:
        return
    invalid = (mask != 0) & (mask != 1)
    if bool(invalid.any()):
        values = torch.unique(mask[invalid])
        listed = ", ".join(f"{value:g}" for value in values[:3].tolist()) + (", ..." if len(values) > 3 else "")
        raise ValueError(
            f"{name} must be bool or hold only 0 and 1, got {mask.dtype} with {listed}: use mask > 0 for masks of 0 "
            "and 255, mask > 0.5 for soft ones"
        )


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model that returns them, or an object that holds them."""
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[no-any-return]


def has_nan(logits: Tensor) -> Tensor:
    """Return bool (B,), True where two-class logits (B, 2, H, W) have a pixel that cannot be decided.

    Such a pixel holds NaN or the same infinity twice; argmax would silently call it background.
    """
    return torch.isnan(logits[:, 1].float() - logits[:, 0].float()).flatten(1).any(1)


def nan_cause(model: nn.Module) -> str:
    """Return the likely cause of NaN logits and the fix, to append to an error message."""
    non_finite = [
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if non_finite:
        return f"its weights hold NaN or Inf ({shortened(non_finite)}): load an earlier checkpoint"
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})) or "no"
    return f"its weights ({dtypes}) are finite: check the image, or compute in float32 if a narrower type overflows"

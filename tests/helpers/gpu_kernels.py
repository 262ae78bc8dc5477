"""Select where tests run GPU kernels: on a GPU, or on CPU tensors, interpreted or built for the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from contract_cases import Place
from contract_tools import quick_interpreter
from emulation import emulated

from fastkd.ops import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MARKS = [pytest.mark.gpu] if DEVICE == "cuda" else []


@contextmanager
def require_backend(place: Any) -> Iterator[None]:
    """Skip the test if the backend is unavailable; build and install the CUDA backend for CPU tensors."""
    with ExitStack() as stack:
        if place == ("cuda", "cpu"):
            try:
                stack.enter_context(emulated())
            except RuntimeError as error:
                pytest.skip(f"the cuda backend is not in use on CPU tensors: {error}")
        reason = dispatch.BACKENDS[place.backend].device_type_reason(place.device) or dispatch.unavailable_reason(
            place.backend
        )
        if reason is not None:
            pytest.skip(f"the {place.backend} backend is not in use on {place.device}: {reason}")
        yield


@contextmanager
def require_gpu_kernels(backend: str) -> Iterator[None]:
    """Require a GPU backend on this machine's device, with overflow checks in Triton's interpreter."""
    with ExitStack() as stack:
        stack.enter_context(require_backend(Place(backend, DEVICE)))
        if (backend, DEVICE) == ("triton", "cpu"):
            stack.enter_context(quick_interpreter(checks_overflow=True))
        yield

"""What every test file may use: the places a kernel runs in, the dtypes, and backends that are absent as skips."""

from __future__ import annotations

import ctypes
import os
from typing import NamedTuple

import pytest


def _has_gpu() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


# Triton decides when a kernel is defined, once per process, whether it is compiled or interpreted. With a GPU the tests
# run what users run; without one the same kernels are interpreted on CPU tensors. Torch is not imported to find out,
# since some versions of it import Triton.
if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What tests start in processes of their own is the fastkd that this process found, not the tree they are started in.
os.environ.setdefault("PYTHONSAFEPATH", "1")


class Place(NamedTuple):
    """A backend and the device its tensors live on."""

    backend: str
    device: str


PLACES = [
    Place("reference", "cpu"),
    Place("cpu", "cpu"),
    Place("triton", "cpu"),
    pytest.param(Place("reference", "cuda"), marks=pytest.mark.gpu),
    pytest.param(Place("triton", "cuda"), marks=pytest.mark.gpu),
    pytest.param(Place("cuda", "cuda"), marks=pytest.mark.gpu),
]


def _id(place: Place) -> str:
    return f"{place.backend}@{place.device}"


def _require(place: Place) -> Place:
    from fastkd.ops import _backends

    reason = _backends._misplaced(place.backend, place.device) or _backends.why_not(place.backend)
    if reason is not None:
        pytest.skip(f"the {place.backend} backend is not in use on {place.device}: {reason}")
    return place


@pytest.fixture(params=PLACES, ids=_id)
def place(request: pytest.FixtureRequest) -> Place:
    """Each backend, on each device it computes on."""
    return _require(request.param)


@pytest.fixture(params=PLACES[1:3] + PLACES[4:], ids=_id)
def kernel_place(request: pytest.FixtureRequest) -> Place:
    """Each backend but the reference: those that go through a registered operator."""
    return _require(request.param)


@pytest.fixture(autouse=True)
def _quiet_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is absent here (no compiler, no GPU) is a skip of its own tests, not a warning in all others."""
    from fastkd.ops import _backends

    monkeypatch.setattr(_backends, "_warned", set(_backends.BACKENDS))
    monkeypatch.delenv("FASTKD_BACKEND", raising=False)

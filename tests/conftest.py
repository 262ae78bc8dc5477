"""Fixtures of all tests: backends and devices, contract cases, tiny teachers. Unavailable backends are skipped."""

from __future__ import annotations

import ctypes
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest


def _has_gpu() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


# Triton reads this when a kernel is defined, once per process. With a GPU, kernels are compiled as for users; without
# one, they are interpreted on CPU tensors. Detecting the GPU must not import torch: some versions import Triton.
if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Arrays in tests are small, and one test process runs per core: more threads would only wait for one another. Tests of
# threads set the number themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Subprocesses import the fastkd that this process imports, not the one in their working directory.
os.environ.setdefault("PYTHONSAFEPATH", "1")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise the fixtures below with the backends of ``fastkd.ops.dispatch`` and the contract's cases.

    Without a GPU, generate a single, skipped case per test and GPU backend.
    """
    own = {n.strip() for mark in metafunc.definition.iter_markers("parametrize") for n in _names(mark.args[0])}
    fixtures = set(metafunc.fixturenames) - own  # a test may parametrise these names itself
    if not any(name.endswith(("place", "setting")) for name in fixtures):
        return
    import contract_cases as contract
    import torch

    kernels = [s for s in contract.settings() if s.place.backend != "reference"]
    basic = contract.settings(list(contract.BASIC.values()))
    values_of = {
        "place": contract.places("softmax_kl"),
        "kernel_place": [p for p in contract.places("softmax_kl") if p.backend != "reference"],
        "setting": contract.settings(),
        "kernel_setting": kernels,
        "compiled_setting": [
            s for s in contract.settings() if s.place.backend == "cpu" or s.case.name in contract.ONE_PER_LOSS
        ],
        "paired_setting": contract.settings(contract.PAIRED_AND_MASKED),
        "basic_setting": basic,
        "basic_kernel_setting": [s for s in basic if s.place.backend != "reference"],
    }
    simulated = [mark.args[0] for mark in metafunc.definition.iter_markers("simulated_cases")]
    for name, values in values_of.items():
        if name not in fixtures:
            continue
        if simulated:
            values = [s for s in values if not s.place.is_simulated or all(s.case.name in names for names in simulated)]
        if not torch.cuda.is_available():
            first = {_place(v): v for v in reversed(values)}
            values = [v for v in values if _place(v).device == "cpu" or v == first[_place(v)]]
        metafunc.parametrize(name, [_parameter(v) for v in values], indirect=True)


def _names(names: Any) -> list[str]:
    return names.split(",") if isinstance(names, str) else list(names)


def _place(value: Any) -> Any:
    return getattr(value, "place", value)


def _parameter(value: Any) -> Any:
    place = _place(value)
    name = f"{place.backend}@{place.device}" + (f" {value.case.name}" if value is not place else "")
    return pytest.param(value, id=name, marks=[pytest.mark.gpu] if place.device == "cuda" else [])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drop the cases that a test's ``applies`` marks exclude."""
    items[:] = [item for item in items if all(_applies(item, mark.args[0]) for mark in item.iter_markers("applies"))]


def _applies(item: Any, predicate: Callable[..., bool]) -> bool:
    return predicate(**{name: item.callspec.params[name] for name in inspect.signature(predicate).parameters})


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Yield each backend of softmax_kl on each of its devices."""
    from gpu_kernels import require_backend

    with require_backend(request.param):
        yield request.param


@pytest.fixture
def kernel_place(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Yield each ``place`` except the reference's: backends behind a registered operator."""
    from gpu_kernels import require_backend

    with require_backend(request.param):
        yield request.param


@pytest.fixture
def setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Yield each contract case on each backend and device of its family."""
    yield from _setting(request)


@pytest.fixture
def kernel_setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Yield each ``setting`` except the reference's."""
    yield from _setting(request)


@pytest.fixture
def paired_setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Yield each case with a pair of temperatures or a pixel mask on each backend and device."""
    yield from _setting(request)


@pytest.fixture
def compiled_setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Yield each case on the C++ backend and one case per loss on the others, for tests that take seconds."""
    yield from _setting(request)


@pytest.fixture
def basic_setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Yield one case of each family on each backend and device."""
    yield from _setting(request)


@pytest.fixture
def basic_kernel_setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Yield each ``basic_setting`` except the reference's."""
    yield from _setting(request)


def _setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    from contract_tools import quick_interpreter, threads
    from gpu_kernels import require_backend

    with ExitStack() as stack:
        stack.enter_context(require_backend(request.param.place))
        stack.enter_context(threads(1))  # waking threads takes longer than computing these small arrays
        if request.param.place == ("triton", "cpu"):
            stack.enter_context(quick_interpreter())
        yield request.param


@pytest.fixture(autouse=True)
def _quiet_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suppress warnings about unavailable backends (no compiler, no GPU); their own tests are skipped."""
    from fastkd.ops import dispatch

    monkeypatch.setattr(dispatch, "_warned", set(dispatch.BACKENDS))
    monkeypatch.delenv("FASTKD_BACKEND", raising=False)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return folders of tiny random teachers in transformers' format, by kind."""
    import tiny_teachers

    return tiny_teachers.write_all(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="module")
def teachers(tiny_folders: dict[str, Any]) -> dict[str, Any]:
    """Return the teachers of ``tiny_folders``, by kind."""
    import tiny_teachers

    return tiny_teachers.load_all(tiny_folders)


@pytest.fixture(params=("clipseg", "sam3"))
def teacher(request: pytest.FixtureRequest, teachers: dict[str, Any]) -> Any:
    """Return each of ``teachers`` (the kinds of tiny_teachers.KINDS, spelled out to import it lazily)."""
    return teachers[request.param]

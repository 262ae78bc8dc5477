"""What every test file may use: the places a kernel runs in, the dtypes, and backends that are absent as skips."""

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


# Triton decides when a kernel is defined, once per process, whether it is compiled or interpreted. With a GPU the tests
# run what users run; without one the same kernels are interpreted on CPU tensors. Torch is not imported to find out,
# since some versions of it import Triton.
if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Test arrays are small and test processes run on every core: more threads would only wait for one another. Tests of
# threads set their number themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What tests start in processes of their own is the fastkd that this process found, not the tree they are started in.
os.environ.setdefault("PYTHONSAFEPATH", "1")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise the fixtures below with the backends of ``fastkd.ops.dispatch`` and the contract's cases.

    Without a GPU one of a test's cases on each GPU backend stands for all of them: it is skipped.
    """
    own = {n.strip() for mark in metafunc.definition.iter_markers("parametrize") for n in _names(mark.args[0])}
    fixtures = set(metafunc.fixturenames) - own  # a test may mean something else by the same name
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
    """Each backend of softmax_kl, on each device it computes on."""
    from gpu_kernels import present

    with present(request.param):
        yield request.param


@pytest.fixture
def kernel_place(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each of them but the reference: those that go through a registered operator."""
    from gpu_kernels import present

    with present(request.param):
        yield request.param


@pytest.fixture
def setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each loss in each variant, on each backend of its family, on each device."""
    yield from _setting(request)


@pytest.fixture
def kernel_setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each of them but the reference's."""
    yield from _setting(request)


@pytest.fixture
def compiled_setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each on the compiled CPU kernels, and one case of each loss on every other backend: they take seconds."""
    yield from _setting(request)


@pytest.fixture
def basic_setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """One case of each family, on each backend, on each device."""
    yield from _setting(request)


@pytest.fixture
def basic_kernel_setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each of them but the reference's."""
    yield from _setting(request)


def _setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    from contract_tools import quick_interpreter, threads
    from gpu_kernels import present

    with ExitStack() as stack:
        stack.enter_context(present(request.param.place))
        stack.enter_context(threads(1))  # the arrays are small: waking threads for them is what would take the time
        if request.param.place == ("triton", "cpu"):
            stack.enter_context(quick_interpreter())
        yield request.param


@pytest.fixture(autouse=True)
def _quiet_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is absent here (no compiler, no GPU) is a skip of its own tests, not a warning in all others."""
    from fastkd.ops import dispatch

    monkeypatch.setattr(dispatch, "_warned", set(dispatch.BACKENDS))
    monkeypatch.delenv("FASTKD_BACKEND", raising=False)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tiny random teachers of transformers, one folder of each kind."""
    import tiny_teachers

    return tiny_teachers.write_all(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="module")
def teachers(tiny_folders: dict[str, Any]) -> dict[str, Any]:
    """The same, loaded."""
    import tiny_teachers

    return tiny_teachers.load_all(tiny_folders)


@pytest.fixture(params=("clipseg", "sam3"))
def teacher(request: pytest.FixtureRequest, teachers: dict[str, Any]) -> Any:
    """Each of them (tiny_teachers.KINDS, which is not imported for other tests)."""
    return teachers[request.param]

"""The first call of a process under any state of torch leaves the backend available and exact."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastkd
from fastkd.losses import channel_kd, cross_modal_kd
from fastkd.ops import dispatch, launch
from fastkd.ops.dispatch import unavailable_reason

FAMILIES = dispatch.FAMILIES


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Clear the results of self-tests and return the monkeypatch; skip without the C++ kernels."""
    reason = unavailable_reason("cpu")
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(dispatch, "_reasons", {})
    return monkeypatch


@contextlib.contextmanager
def another_default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)  # a device would leave its torch function mode for later tests


@contextlib.contextmanager
def half_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def within(transform: Callable[..., Any]) -> Callable[[Callable[[], None]], None]:
    """Return a function that runs another inside a transform of torch.func."""

    def run(action: Callable[[], None]) -> None:
        def inside(x: torch.Tensor) -> torch.Tensor:
            action()
            return (x * 2).sum()

        transform(inside)(torch.ones(3))

    return run


def under(context: Callable[[], Any]) -> Callable[[Callable[[], None]], None]:
    def run(action: Callable[[], None]) -> None:
        with context():
            action()

    return run


def traced(action: Callable[[], None]) -> None:
    def inside(x: torch.Tensor) -> torch.Tensor:
        action()
        return x * 2

    torch.jit.trace(inside, (torch.ones(3),), check_trace=False)


def compiled(action: Callable[[], None]) -> None:
    constant = torch.compiler.assume_constant_result(lambda: action() or 1)
    torch.compile(lambda x: x * constant(), backend="eager", fullgraph=True)(torch.ones(3))


def checkpointed(action: Callable[[], None]) -> None:
    from torch.utils.checkpoint import checkpoint

    def inside(x: torch.Tensor) -> torch.Tensor:
        action()
        return x * 2

    checkpoint(inside, torch.ones(3, requires_grad=True), use_reentrant=False).sum().backward()


STATES: dict[str, Callable[[Callable[[], None]], None]] = {
    "inference mode": under(torch.inference_mode),
    "no grad": under(torch.no_grad),
    "autocast": under(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "a default device": under(another_default_device),
    "a default dtype": under(half_by_default),
    "a device context": under(lambda: torch.device("meta")),
    "fake tensors": under(FakeTensorMode),
    "a FLOP counter": under(lambda: FlopCounterMode(display=False)),
    "hooks for saved tensors": under(torch.autograd.graph.save_on_cpu),
    "hooks switched off": under(lambda: torch.autograd.graph.disable_saved_tensors_hooks("no hooks here")),
    "forward mode": under(forward_ad.dual_level),
    "checkpointing": checkpointed,
    "vmap": within(torch.func.vmap),
    "func.grad": within(torch.func.grad),
    "jvp": within(lambda f: lambda x: torch.func.jvp(f, (x,), (x,))),
    "torch.compile": compiled,
    "jit.trace": traced,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("where", STATES)
def test_self_test_ignores_the_callers_state(fresh: pytest.MonkeyPatch, where: str) -> None:
    answers = []
    STATES[where](lambda: answers.extend(unavailable_reason("cpu", family, "cpu") for family in FAMILIES))
    assert answers == [None] * len(FAMILIES)


def test_first_call_under_inference_mode_then_training(fresh: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(2, 4, 32, 32), torch.randn(2, 4, 32, 32)
    with torch.inference_mode():
        first = channel_kd(student, teacher, backend="cpu")
    leaf = student.requires_grad_()
    later = channel_kd(leaf, teacher, backend="cpu")
    assert torch.equal(first, later.detach())
    (grad,) = torch.autograd.grad(later, leaf)
    (exact,) = torch.autograd.grad(channel_kd(leaf, teacher.double(), backend="reference"), leaf)
    torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-7)


def test_self_test_may_query_its_own_backend(fresh: pytest.MonkeyPatch) -> None:
    """The self-test runs while the caller holds the lock."""
    family = importlib.import_module("fastkd.ops.softmax_kl")
    seen = []

    def query(backend: str, device: torch.device) -> None:
        seen.append(
            (
                unavailable_reason("cpu", "softmax_kl", "cpu"),
                unavailable_reason("cpu", "relation", "cpu"),
                threading.get_ident(),
            )
        )

    fresh.setattr(family, "self_test", query)
    waiting = threading.Thread(target=unavailable_reason, args=("cpu", "softmax_kl", "cpu"), daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()
    assert [row[:2] for row in seen] == [(None, None)]
    assert seen[0][2] != waiting.ident


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (OSError(12, os.strerror(12)), True),
        (RuntimeError("no kernel image is available for execution on the device"), False),
    ],
    ids=["GPU", "Python", "CPU", "system", "permanent"],
)
def test_out_of_memory_is_not_remembered(fresh: pytest.MonkeyPatch, error: Exception, transient: bool) -> None:
    family = importlib.import_module("fastkd.ops.softmax_kl")
    fresh.setattr(dispatch, "_warned", set())
    real = family.self_test

    def raises(*_: object) -> None:
        raise error

    fresh.setattr(family, "self_test", raises)
    inputs = torch.zeros(1, 1, 4096), torch.ones(1, 1, 4096)
    message = "tried again at the next call" if transient else "Shown once"
    with pytest.warns(
        fastkd.FastKDWarning, match=f"the cpu backend is unavailable.*self-test failed on cpu.*{message}"
    ):
        assert dispatch.choose("softmax_kl", "auto", *inputs) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("softmax_kl", "auto", *inputs) == "reference"
    fresh.setattr(family, "self_test", real)
    assert dispatch.choose("softmax_kl", "auto", *inputs) == ("cpu" if transient else "reference")


def test_a_lack_of_threads_is_not_remembered(fresh: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        assert "can't start new thread" in str(unavailable_reason("cpu", "softmax_kl", "cpu"))
    assert unavailable_reason("cpu", "softmax_kl", "cpu") is None


@pytest.mark.parametrize("mib", ["0.000001", "many"])
def test_self_test_ignores_the_workspace_limit(fresh: pytest.MonkeyPatch, mib: str) -> None:
    """The call raises the error; the backend is available once the setting is valid."""
    fresh.setenv("FASTKD_WORKSPACE_MIB", mib)
    maps = torch.randn(2, 32, 16, 16)
    words = torch.randn(2, 3, 32)
    for call in (lambda: channel_kd(maps, maps * 2), lambda: cross_modal_kd(maps, words, maps * 2, words)):
        with pytest.raises(ValueError, match="FASTKD_WORKSPACE_MIB"):
            call()
    assert [unavailable_reason("cpu", family, "cpu") for family in FAMILIES] == [None] * len(FAMILIES)
    fresh.delenv("FASTKD_WORKSPACE_MIB")
    assert launch.workspace_limit(torch.device("cpu")) == 32 * 2**20
    assert channel_kd(maps, maps * 2).item() == pytest.approx(0, abs=1e-6)  # cosines are independent of the scale


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_during_a_self_test(fresh: pytest.MonkeyPatch) -> None:
    """The child can query backends although the thread that holds the lock does not exist there."""
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with dispatch._lock:
            held.set()
            go.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            free = dispatch._lock.acquire(timeout=20)
            status = 0 if free and not dispatch._testing else 1
        finally:
            os._exit(status)
    go.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

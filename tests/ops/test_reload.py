"""Repeated imports: ``importlib.reload``, and a second copy after ``sys.modules`` was cleared."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastkd.ops import registration

START = """
import importlib, sys
import torch
import fastkd.losses as losses

generator = torch.Generator().manual_seed(0)
s, t = (torch.randn(2, 12, 10, 10, generator=generator) for _ in range(2))
v, w, vt, wt = (torch.randn(2, n, 8, generator=generator) for n in (40, 5, 40, 5))
CALLS = [("logit_kd", (s, t)), ("channel_kd", (s, t)), ("cross_modal_kd", (v, w, vt, wt))]

def values(losses, backend):
    found = []
    for name, (first, *others) in CALLS:
        leaf = first.clone().requires_grad_()
        loss = getattr(losses, name)(leaf, *others, backend=backend)
        found += [loss.detach(), *torch.autograd.grad(loss, leaf)]
    return found

def check(losses):
    backends = [b for b in ("cpu", "triton") if fastkd.info()["backends"][b]["in_use"]]
    for backend in backends:
        for a, b in zip(values(losses, backend), values(losses, "reference"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)

check(losses)
names = [name for name in sys.modules if name.split(".")[0] == "fastkd"]
"""
RELOADED = "for name in names: importlib.reload(sys.modules[name])\n"
CLEARED = "for name in names: del sys.modules[name]\n"
AGAIN = """
import fastkd.losses
check(losses)  # the functions of the first import
check(fastkd.losses)
"""
NEWEST = """
import fastkd.ops.softmax_kl as family
kernels = vars(torch.ops.fastkd)["_implementations"]["softmax_kl_forward"][1].kernels
assert kernels is family._forward, "the kernels of the newest import run"
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize("again", [RELOADED, CLEARED], ids=["reloaded", "cleared"])
def test_package_works_after_a_second_import(again: str) -> None:
    done = run("import fastkd\n" + START + again + AGAIN + NEWEST)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def other_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the operators of a test outside fastkd's namespace."""
    monkeypatch.setattr(registration, "NAMESPACE", "fastkd_tests")


SCHEMA = "(Tensor x, float temperature) -> Tensor"


def implementation(factor: float) -> registration.Implementation:
    return registration.Implementation(
        lambda x, _: x * factor, lambda x, _: torch.empty_like(x), lambda *_: int(factor)
    )


@pytest.mark.usefixtures("other_namespace")
def test_newest_implementation_is_called() -> None:
    x = torch.ones(3)
    step = lambda x: torch.ops.fastkd_tests.newest(x, 1.0) + 1
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for factor in (2.0, 3.0):
        registration.register("newest", SCHEMA, implementation(factor))
        assert torch.equal(torch.ops.fastkd_tests.newest.default(x, 1.0), x * factor)
        assert torch.equal(torch.ops.fastkd_tests.newest.scheduled(x, torch.tensor(1.0)), x * factor)
        assert torch.equal(compiled(x), x * factor + 1)
        with FlopCounterMode(display=False) as counter:
            step(x)
        assert counter.get_total_flops() == factor


@pytest.mark.usefixtures("other_namespace")
def test_rejects_an_operator_of_another_version() -> None:
    registration.register("versions", SCHEMA, implementation(1.0))
    with pytest.raises(RuntimeError, match="operator versions takes other arguments; restart the interpreter"):
        registration.register("versions", SCHEMA.replace("Tensor x", "Tensor x, Tensor y"), implementation(1.0))

"""The package is imported again: ``importlib.reload``, and a second copy after ``sys.modules`` was emptied."""

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

def works(losses):
    backends = [b for b in ("cpu", "triton") if fastkd.info()["backends"][b]["in_use"]]
    for backend in backends:
        for a, b in zip(values(losses, backend), values(losses, "reference"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)

works(losses)
names = [name for name in sys.modules if name.split(".")[0] == "fastkd"]
"""
RELOADED = "for name in names: importlib.reload(sys.modules[name])\n"
EMPTIED = "for name in names: del sys.modules[name]\n"
AGAIN = """
import fastkd.losses
works(losses)  # what the first import left behind
works(fastkd.losses)
"""
NEWEST = """
import fastkd.ops.softmax_kl as family
work = vars(torch.ops.fastkd)["_work"]["softmax_kl_forward"][1].kernels
assert work is family._forward, "the newest import's kernels are those that run"
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize("how", [RELOADED, EMPTIED], ids=["reloaded", "emptied"])
def test_the_package_works_after_a_second_import(how: str) -> None:
    done = run("import fastkd\n" + START + how + AGAIN + NEWEST)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators of these tests are not fastkd's."""
    monkeypatch.setattr(registration, "NAMESPACE", "fastkd_tests")


SCHEMA = "(Tensor x, float temperature) -> Tensor"


def work(factor: float) -> registration.Work:
    return registration.Work(lambda x, _: x * factor, lambda x, _: torch.empty_like(x), lambda *_: int(factor))


@pytest.mark.usefixtures("elsewhere")
def test_the_newest_work_is_called() -> None:
    x = torch.ones(3)
    step = lambda x: torch.ops.fastkd_tests.newest(x, 1.0) + 1
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for factor in (2.0, 3.0):
        registration.register("newest", SCHEMA, work(factor))
        assert torch.equal(torch.ops.fastkd_tests.newest.default(x, 1.0), x * factor)
        assert torch.equal(torch.ops.fastkd_tests.newest.scheduled(x, torch.tensor(1.0)), x * factor)
        assert torch.equal(compiled(x), x * factor + 1)
        with FlopCounterMode(display=False) as counter:
            step(x)
        assert counter.get_total_flops() == factor


@pytest.mark.usefixtures("elsewhere")
def test_another_versions_operator_is_an_error_that_says_to_restart() -> None:
    registration.register("versions", SCHEMA, work(1.0))
    with pytest.raises(RuntimeError, match="operator versions takes other arguments; restart the interpreter"):
        registration.register("versions", SCHEMA.replace("Tensor x", "Tensor x, Tensor y"), work(1.0))

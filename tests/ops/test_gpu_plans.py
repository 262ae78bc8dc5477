"""The launches of the CUDA and Triton kernels for the benchmarks' GPU workloads, recorded without running them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from emulation import emulated

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import providers, workloads
from fastkd.ops import launch
from fastkd.ops.dispatch import FAMILIES, unavailable_reason
from fastkd.ops.pixel_word import native as pixel_word_native
from fastkd.ops.relation import native as relation_native
from fastkd.ops.relation.plan import keeping_pays

MULTIPROCESSORS = 132  # of an H100
WORKLOADS_OF = {family: found for family in FAMILIES if (found := workloads.select(family, "cuda"))}
WORKLOADS = {w.name: w for found in WORKLOADS_OF.values() for w in found}
HEAVY = {"TilesArgs", "DerivativeArgs", "ProductArgs"}  # the arguments of kernels with matrix products of relations


class Launch(NamedTuple):
    arguments: str  # type of the kernel's argument
    blocks: int
    threads: int


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    try:
        with emulated() as module:
            for family in WORKLOADS_OF:  # run the self-tests
                assert unavailable_reason("cuda", family, "cpu") is None
            yield module
    except RuntimeError as error:
        pytest.skip(f"the cuda backend is not in use on CPU tensors: {error}")


def record(module: ModuleType, workload: workloads.Workload) -> list[Launch]:
    """Return the launches of a forward and its backward, whose inputs have no values."""
    inputs = workload.inputs_without_values()
    module.record_launches(True)
    try:
        providers.make_step(workload, "cuda", "both", inputs)()
    finally:
        rows = module.record_launches(False)
    launches = []
    for kernel, blocks, threads, _ in rows:
        found = re.search(r"Kernel = void \(\*\)\((?:.*?::)?(\w+)\)", kernel)  # its only argument's type
        assert found is not None, kernel
        launches.append(Launch(found[1], blocks, threads))
    return launches


@pytest.mark.parametrize("name", WORKLOADS)
def test_few_launches_fill_an_80_gb_gpu(module: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FASTKD_WORKSPACE_MIB", "512")
    launches = record(module, WORKLOADS[name])
    print(name, *launches, sep="\n  ")
    assert len(launches) <= 12
    if WORKLOADS[name].family == "relation" and not WORKLOADS[name].small:
        assert {each.arguments for each in launches} >= HEAVY
        for each in launches:
            assert each.blocks >= MULTIPROCESSORS or each.arguments not in HEAVY, each


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_run_in_the_workspace_of_a_16_gb_gpu(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    allocated: list[int] = []
    allocate = launch.allocate_workspace

    def recording(*arguments: Any) -> torch.Tensor:
        workspace = allocate(*arguments)
        allocated.append(workspace.numel())
        return workspace

    for calls in (relation_native, pixel_word_native):
        monkeypatch.setattr(calls, "allocate_workspace", recording)
    monkeypatch.setenv("FASTKD_WORKSPACE_MIB", "160")
    record(module, WORKLOADS[name])
    sums = 2 * 14464 * 128 * 4 if "120x120" in name else 0  # fp32 sums of a gradient computed in bands
    assert all(size <= 160 * 2**20 + sums for size in allocated)


def test_all_samples_of_short_rows_share_a_round(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """(32, 512, 900) needs 10 MiB without partial sums; those of a single sample would take 4 MiB."""
    monkeypatch.setenv("FASTKD_WORKSPACE_MIB", "32")
    launches = record(module, WORKLOADS["channel_kd kl 32x512x30x30 bfloat16"])
    assert sorted(each.arguments for each in launches if each.arguments in HEAVY) == sorted(HEAVY)


@pytest.mark.parametrize(("gib", "mib"), [(80, 512), (48, 491.52), (16, 163.84)])
def test_default_workspace_is_a_share_of_the_gpu(monkeypatch: pytest.MonkeyPatch, gib: int, mib: float) -> None:
    monkeypatch.delenv("FASTKD_WORKSPACE_MIB", raising=False)
    properties = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    launch.default_workspace_mib.cache_clear()
    try:
        assert launch.workspace_limit(torch.device("cuda", 0)) == int(mib * 2**20)
    finally:
        launch.default_workspace_mib.cache_clear()
    assert launch.workspace_limit(torch.device("cpu")) == 32 * 2**20


@pytest.mark.parametrize(
    ("dtype", "widths", "kept"),
    [
        (torch.bfloat16, (900, 900), True),
        (torch.bfloat16, (225, 225), False),
        (torch.bfloat16, (400, 540), True),
        (torch.float32, (225, 225), True),
        (torch.float32, (64, 64), False),
    ],
)
def test_only_wide_rows_keep_their_relations_on_a_gpu(dtype: torch.dtype, widths: tuple[int, int], kept: bool) -> None:
    student, teacher = (SimpleNamespace(shape=(2, 64, k), dtype=dtype, device=torch.device("cuda")) for k in widths)
    assert keeping_pays(student, teacher) == kept
    student.device = torch.device("cpu")
    assert keeping_pays(student, teacher)


TRITON = """
import json, sys
import torch
from benchmarks import workloads
from benchmarks.aot.cases import run_contract
from benchmarks.aot.record import recorded, workload_launches
from fastkd.losses import channel_distribution_kd, channel_kd, cross_modal_kd
from fastkd.ops.dispatch import FAMILIES

launches, new = {}, {}
with recorded(90) as recording:
    for family in FAMILIES:
        for workload in workloads.select(family, "cuda"):
            launches[workload.name] = workload_launches(workload, recording)
with recorded(90) as recording:
    for loss in (channel_distribution_kd, channel_kd, cross_modal_kd):
        maps = torch.empty(2, 8, 20, 20, requires_grad=True)
        words = (torch.empty(2, 5, 8),) if loss is cross_modal_kd else ()
        inputs = (maps, *words, torch.empty(2, 8, 20, 20), *words)
        rows = loss(*inputs, reduction="none", backend="triton")
        for grad in (torch.empty_like(rows), torch.empty(2 * rows.numel())[1::2].view(rows.shape),
                     torch.empty(()).expand(rows.shape), torch.empty(rows.shape[::-1]).T):
            before = len(recording.specialisations)
            torch.autograd.grad(rows, maps, grad, retain_graph=True)
            new.setdefault(loss.__name__, []).append(len(recording.specialisations) - before)
fused = {one.kernel: one.options["enable_fp_fusion"] for one in recording.specialisations}
with recorded(90) as recording:
    run_contract()
contract = len(recording.specialisations)
print(json.dumps({"launches": launches, "new": new, "fused": fused, "contract": contract}))
"""


@pytest.fixture(scope="module")
def triton() -> Any:
    """Return the launches of each workload, and the specialisations that each gradient layout adds."""
    pytest.importorskip("triton", reason="Triton is not installed")
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH")) if path)
    environment = os.environ | {"TRITON_INTERPRET": "0", "FASTKD_WORKSPACE_MIB": "512", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_triton_launches_are_few(triton: Any) -> None:
    assert triton["launches"].keys() == WORKLOADS.keys()
    for name, launches in triton["launches"].items():
        assert len(launches) <= 12, name
        if WORKLOADS[name].small:
            continue
        for kernel, programs in launches:
            heavy = kernel.rpartition(".")[2] in ("tiles_kernel", "derivative_kernel", "product_kernel")
            assert programs >= MULTIPROCESSORS or not heavy, (name, kernel)


def test_layout_of_the_gradient_compiles_no_triton_kernel_again(triton: Any) -> None:
    """Otherwise a CUDA graph could not be captured with another layout than the warm-up's."""
    assert len(triton["new"]) == 3
    for loss, (first, *others) in triton["new"].items():
        assert first > 0, loss
        assert others == [0] * len(others), loss


def test_contract_compiles_few_triton_kernels(triton: Any) -> None:
    """Each takes about a second on a GPU. Arguments are specialised only where that changes the code."""
    assert 400 < triton["contract"] <= 500


def test_differences_of_triton_gradients_are_not_fused(triton: Any) -> None:
    """Fused with a product, the difference of equal numbers would be its rounding error instead of 0."""
    assert not triton["fused"]["softmax_kl.backward.backward_kernel"]
    assert not triton["fused"]["relation.derivative.derivative_kernel"]
    assert not triton["fused"]["pixel_word.backward.gradient_kernel"]

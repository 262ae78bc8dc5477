"""Test the operator contract for every loss on every backend: integration with torch.

Points 4 (streams, CUDA graphs) and 5 (``torch.library``, ``torch.compile``), autocast, distributed training, pickling.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import CASES, ONE_PER_FAMILY, ONE_PER_LOSS, PLAIN, REPRESENTATIVE, Place, Setting
from contract_problems import Problem
from contract_tools import Recorder, assert_same
from torch import Tensor

from fastkd.ops import dispatch


def registered() -> set[str]:
    """Return the names of fastkd's registered operators; ``ops/test_schedules.py`` checks their overloads."""
    import fastkd.losses  # noqa: F401

    return {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastkd::")}


def calls_of(setting: Setting, problem: Problem) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return the operator calls of a forward and a backward: (operator, arguments)."""
    leaves = problem.leaves()
    with Recorder() as recorder:
        rows = leaves.loss(setting.place.backend)
        torch.autograd.grad(rows.sum(), leaves.args[: leaves.students])  # a stride-0 gradient
    return [(op, args) for op, args, _ in recorder.calls]


@pytest.mark.simulated_cases(REPRESENTATIVE)
def test_opcheck(kernel_setting: Any) -> None:
    """Schema (no mutation, no aliasing), fake implementation, autograd registration, AOT with dynamic shapes."""
    problem = kernel_setting.case.problem(device=kernel_setting.place.device)
    seen = set()
    for op, args in calls_of(kernel_setting, problem):
        key = (op, str([a for a in args if not isinstance(a, Tensor)]))
        if key not in seen:
            seen.add(key)
            torch.library.opcheck(op, tuple(x.detach() if isinstance(x, Tensor) else x for x in args))


def test_opcheck_of_mixed_dtypes_and_layouts(basic_kernel_setting: Any) -> None:
    case = basic_kernel_setting.case
    problem = case.problem(device=basic_kernel_setting.place.device)
    n = problem.students
    layout = lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)
    mixed = problem.replaced(*(layout(x).half() for x in problem.args[:n]), *(layout(x) for x in problem.args[n:]))
    for op, args in calls_of(basic_kernel_setting, mixed):
        torch.library.opcheck(op, tuple(x.detach() if isinstance(x, Tensor) else x for x in args))


def test_every_operator_is_checked() -> None:
    """Every registered operator is called by some case and thus checked above."""
    called: set[str] = set()
    for case in CASES:
        for backend in dispatch.BACKENDS:
            if (
                backend != "reference"
                and case.family != PLAIN
                and not dispatch.unavailable_reason(backend, case.family)
                and not dispatch.BACKENDS[backend].device_type_reason("cpu")
            ):
                where = Setting(case, Place(backend, "cpu"))
                called |= {str(op.name()).split(".")[0] for op, _ in calls_of(where, case.problem())}
    absent = [b for b in dispatch.BACKENDS if b != "cuda" and dispatch.unavailable_reason(b)]
    if absent:
        pytest.skip(f"backends unavailable here: {', '.join(sorted(set(absent)))}")
    assert called == registered()


def compiled_step(setting: Setting, problem: Problem) -> Any:
    def step(*args: Tensor) -> Tensor:
        return (problem.replaced(*args).loss(setting.place.backend) * 2).square().mean()

    return step


def check_compiled(setting: Setting, **options: Any) -> None:
    problem = setting.case.problem(device=setting.place.device).leaves()
    step = compiled_step(setting, problem)
    own = problem.args[: problem.students]
    torch.compiler.reset()
    want = [x := step(*problem.args), *torch.autograd.grad(x, own)]
    loss = torch.compile(step, fullgraph=True, **options)(*problem.args)
    for got, expected in zip([loss, *torch.autograd.grad(loss, own)], want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_compiled_by_inductor_equals_eager(basic_kernel_setting: Any) -> None:
    check_compiled(basic_kernel_setting)


# cross_image relates a fixed number of images: B² pairs.
@pytest.mark.applies(
    lambda compiled_setting: (
        compiled_setting.case.name in REPRESENTATIVE and not compiled_setting.case.options.get("cross_image")
    )
)
@pytest.mark.simulated_cases(ONE_PER_FAMILY)
def test_one_graph_serves_all_batch_sizes(compiled_setting: Any) -> None:
    """One graph for the first batch size, a second for all others. ``fullgraph`` raises on a graph break."""
    from torch._dynamo.testing import CompileCounterWithBackend

    setting, case = compiled_setting, compiled_setting.case
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()

    def step(args: list[Tensor], masks: dict[str, Any]) -> Tensor:
        return Problem(case, args, masks).loss(setting.place.backend, "mean")

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        size = (batch, *case.sizes["small"][1:])
        problem = case.problem_of(size, dtype=torch.float32, device=setting.place.device).leaves()
        own = problem.args[: problem.students]
        loss = compiled(problem.args, problem.masks)
        want = problem.loss(setting.place.backend, "mean")
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-6)
        for a, b in zip(torch.autograd.grad(loss, own), torch.autograd.grad(want, own), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-9)
    assert counter.frame_count <= 2


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(lambda setting, dtype: setting.covers(dtype))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(setting: Any, dtype: torch.dtype) -> None:
    """Autocast changes no bit, for inputs of either precision."""
    for given in (torch.float32, dtype):
        problem = setting.case.problem(dtype=given, device=setting.place.device).leaves()
        own = problem.args[: problem.students]
        want = problem.run(setting.place.backend)
        with torch.autocast(setting.place.device, dtype=dtype):
            rows = problem.loss(setting.place.backend)
        assert rows.dtype == torch.float32
        assert_same([rows.detach(), *torch.autograd.grad(rows.sum(), own, retain_graph=True)], want)
        if setting.place.backend != "reference" and not setting.case.multiplies_in_torch:
            # The backward of torch's own operators is autocast if it runs inside the context; a kernel's is not.
            with torch.autocast(setting.place.device, dtype=dtype):
                assert_same(list(torch.autograd.grad(rows.sum(), own)), want[1:])


def test_functional_transforms_work_or_raise(basic_setting: Any) -> None:
    """``torch.func.grad`` works with the reference; a kernel returns the same gradient or raises an error."""
    problem = basic_setting.case.problem(device=basic_setting.place.device)
    n = problem.students
    want = problem.run(basic_setting.place.backend)[1]
    scalar = lambda first: problem.replaced(first, *problem.args[1:]).loss(basic_setting.place.backend).sum()
    try:
        got = torch.func.grad(scalar)(problem.args[0])
    except RuntimeError as error:
        if basic_setting.place.backend == "reference" or "no rules for vmap, torch.func transforms" not in str(error):
            raise
    else:
        problem.assert_near([got] * n, [want] * n)


def module_of(problem: Problem, backend: str, **more: Any) -> torch.nn.Module:
    assert problem.case.module_class is not None
    return problem.case.module_class(**problem.case.options, backend=backend, **more)


@pytest.mark.simulated_cases(ONE_PER_LOSS)
@pytest.mark.applies(lambda setting: setting.case.module_class is not None)
def test_modules_can_be_pickled_and_copied(setting: Any, tmp_path: Path) -> None:
    problem = setting.case.problem(device=setting.place.device)
    want = problem.loss(setting.place.backend, "mean")
    made = module_of(problem, setting.place.backend)
    torch.save(made, tmp_path / "module.pt")
    for module in (made, pickle.loads(pickle.dumps(made)), copy.deepcopy(made),
                 torch.load(tmp_path / "module.pt", weights_only=False)):  # fmt: skip
        assert_same([module(*problem.args, **problem.masks)], [want])


# --- CUDA graphs and streams ------------------------------------------------------------------------------------------


@pytest.mark.applies(lambda kernel_setting: kernel_setting.place.device == "cuda")
def test_cuda_graph_capture(kernel_setting: Any) -> None:
    """Capture does not synchronise; the replay reads the current values of the inputs."""
    backend = kernel_setting.place.backend
    problem = kernel_setting.case.problem(device="cuda").leaves()
    own = problem.args[: problem.students]
    problem.run(backend)  # kernels are compiled on first use
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        graph = torch.cuda.CUDAGraph()
        side.synchronize()
        with torch.cuda.graph(graph, stream=side):
            loss = problem.loss(backend)
            grads = torch.autograd.grad(loss.sum(), own)
    other = kernel_setting.case.problem(device="cuda", seed=1)
    with torch.no_grad():
        for x, y in zip(problem.args, other.args, strict=True):
            x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    assert_same([loss.detach(), *grads], other.run(backend))


@pytest.mark.applies(lambda kernel_setting: kernel_setting.place.device == "cuda")
def test_no_host_synchronisation(kernel_setting: Any) -> None:
    problem = kernel_setting.case.problem(device="cuda")
    problem.run(kernel_setting.place.backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.run(kernel_setting.place.backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.applies(lambda kernel_setting: kernel_setting.place.device == "cuda")
def test_current_stream_of_another_device(kernel_setting: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = kernel_setting.case.problem(device="cuda:1")
    with torch.cuda.device(0), torch.cuda.stream(torch.cuda.Stream(1)):
        got = problem.run(kernel_setting.place.backend)
    torch.cuda.synchronize(1)
    problem.assert_near(got, problem.exact())


# --- distributed ------------------------------------------------------------------------------------------------------

RANK = """
import os, sys
sys.path[:0] = sys.argv[3:]
import torch, torch.distributed as dist
import contract_ddp
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
contract_ddp.compare(rank)
dist.destroy_process_group()
"""


def test_distributed_gradients_are_the_single_process_average(tmp_path: Path) -> None:
    """Compare two gloo ranks, each with half the batch, with one process: see ``helpers/contract_ddp.py``."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    helpers = str(Path(__file__).parents[1] / "helpers")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), helpers],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
        assert "compared" in output

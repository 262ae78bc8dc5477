"""Selection of a backend: names, reasons, the environment, remembered failures."""

from __future__ import annotations

import importlib
import inspect
import json
import statistics
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd.ops import dispatch
from fastkd.ops.backends import BACKENDS, Backend
from fastkd.ops.dispatch import choose, unavailable_reason

X = torch.zeros(1, 1, 4096)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Clear the results of self-tests and the record of warnings; return the monkeypatch."""
    monkeypatch.setattr(dispatch, "_reasons", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    return monkeypatch


def test_reference_always_works() -> None:
    for family in dispatch.FAMILIES:
        assert choose(family, "reference", X) == "reference"
    assert unavailable_reason("reference") is None


def test_rejects_unknown_names() -> None:
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, cpu, triton, cuda, got 'cdua'"):
        choose("softmax_kl", "cdua", X)
    with pytest.raises(ValueError, match="backend"):
        unavailable_reason("cdua")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, b.name)
        for family in dispatch.FAMILIES
        for b in BACKENDS.values()
        if b.module and family not in b.families_without_kernels
    ],
)
def test_every_family_has_the_functions_of_every_backend(family: str, name: str) -> None:
    calls = importlib.import_module(f"fastkd.ops.{family}.{BACKENDS[name].module}")
    native = importlib.import_module(f"fastkd.ops.{family}.native")
    for function in ("forward", "backward"):
        assert inspect.signature(getattr(calls, function)) == inspect.signature(getattr(native, function))


def test_a_backend_without_a_family_is_skipped_without_a_warning(fresh: pytest.MonkeyPatch) -> None:
    absent = [(family, b.name) for b in BACKENDS.values() for family in b.families_without_kernels]
    assert sorted(absent) == [("attention_kl", "cuda"), ("attention_kl", "triton")]
    for family, name in absent:
        fresh.setitem(dispatch.AUTO_ORDER, "cpu", (name, "reference"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose(family, "auto", X) == "reference"
        fresh.setattr(BACKENDS[name], "device_type_reason", lambda *_: None)
        with pytest.raises(
            fastkd.BackendUnavailable, match=f"cannot run {family} on cpu: it has no {family} kernels; use"
        ):
            choose(family, name, X)


def test_a_new_backend_needs_only_its_object(monkeypatch: pytest.MonkeyPatch) -> None:
    never = lambda *_: None
    monkeypatch.setitem(BACKENDS, "npu", Backend("npu", "npu", never, never, never, frozenset({"relation"})))
    monkeypatch.setitem(dispatch.AUTO_ORDER, "cpu", ("npu", "reference"))
    monkeypatch.setattr(dispatch, "_reasons", {("npu", family, "cpu"): None for family in dispatch.FAMILIES})
    assert choose("softmax_kl", "npu", X) == choose("softmax_kl", "auto", X) == "npu"
    assert choose("relation", "auto", X.double()) == "reference"
    assert "npu" in fastkd.info()["backends"]


def test_fp64_raises_for_a_named_backend_and_is_skipped_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fp64 input is enough, since all inputs are promoted."""
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda *_: None)
    for backend in BACKENDS.values():
        monkeypatch.setattr(backend, "device_type_reason", lambda *_: None)
    without_fp64 = [(family, b.name) for b in BACKENDS.values() for family in b.families_without_fp64]
    assert sorted(without_fp64) == [("pixel_word", "triton"), ("relation", "cuda"), ("relation", "triton")]
    for family, backend in without_fp64:
        monkeypatch.setitem(dispatch.AUTO_ORDER, "cpu", (backend, "cpu", "reference"))
        assert choose(family, backend, X) == choose(family, "auto", X) == backend
        for inputs in ((X.double(), X), (X, X.double())):
            with pytest.raises(
                fastkd.BackendUnavailable,
                match=f"backend='{backend}': its {family} kernels have no float64 version; convert",
            ):
                choose(family, backend, *inputs)
            assert choose(family, "auto", *inputs) == "cpu"
    assert choose("softmax_kl", "triton", X.double()) == "triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_unavailable() -> None:
    with pytest.raises(fastkd.BackendUnavailable, match=r"backend='cuda'.*on cpu.*CUDA tensors.*\.cuda\(\)"):
        choose("softmax_kl", "cuda", X)
    assert unavailable_reason("cuda")


class Module:
    """A ``fastkd._cuda`` on a simulated machine."""

    def __init__(self, devices: int = 1, driver: int = 13000, targets: tuple[str, ...] = ("sm_80", "sm_90")) -> None:
        self.device_count, self.driver_version, self.runtime_version = lambda: devices, lambda: driver, lambda: 13000
        self.targets = lambda: list(targets)


@pytest.fixture
def simulate(fresh: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that simulates a GPU of a compute capability and a ``fastkd._cuda``."""

    def install(module: Module, capability: tuple[int, int] = (9, 0)) -> None:
        fresh.setattr(torch.cuda, "is_available", lambda: True)
        fresh.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        fresh.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        fresh.setattr(torch.cuda, "get_device_name", lambda device: "Simulated GPU")
        fresh.setitem(sys.modules, "fastkd._cuda", module)

    return install


@pytest.mark.parametrize("backend", ["cuda", "auto"])
def test_first_use_while_a_graph_is_captured_is_an_error(
    simulate: Callable[..., None], fresh: pytest.MonkeyPatch, backend: str
) -> None:
    """A module cannot be loaded then, and a fallback would stay in the graph."""
    simulate(Module())
    fresh.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    resolve = lambda: dispatch._resolve("relation", backend, "cuda", 0, "", False)
    with pytest.raises(fastkd.BackendUnavailable, match="call the loss once, with its backward, before the capture"):
        resolve()
    assert ("cuda", "relation", "cuda:0") not in dispatch._reasons
    fresh.setitem(dispatch._reasons, ("cuda", "relation", "cuda:0"), None)  # the self-test passed before the capture
    assert resolve() == "cuda"


def test_reports_a_driver_older_than_the_runtime(simulate: Callable[..., None]) -> None:
    simulate(Module(devices=0, driver=12080))
    assert unavailable_reason("cuda") == (
        "the NVIDIA driver supports CUDA 12.8, fastkd._cuda needs one that supports 13.0: update the driver, or "
        "reinstall fastkd from the sources with a CUDA 12 toolkit"
    )


def test_reports_a_runtime_that_sees_no_device(simulate: Callable[..., None]) -> None:
    simulate(Module(devices=0))
    assert "sees no device, though torch does" in str(unavailable_reason("cuda"))


@pytest.mark.parametrize(
    ("targets", "capability", "runs"),
    [
        (("sm_80", "sm_90"), (8, 0), True),
        (("sm_80", "sm_90"), (8, 7), True),  # a newer revision of the same generation
        (("sm_86", "sm_90"), (8, 0), False),  # an older revision
        (("sm_80", "sm_90"), (7, 5), False),
        (("sm_80", "sm_90"), (10, 0), False),
        (("sm_80", "sm_90", "compute_90"), (10, 0), True),  # compiled by the driver
        (("sm_80", "compute_120"), (9, 0), False),
    ],
)
def test_reports_a_binary_without_code_for_the_gpu(
    simulate: Callable[..., None],
    fresh: pytest.MonkeyPatch,
    targets: tuple[str, ...],
    capability: tuple[int, int],
    runs: bool,
) -> None:
    """The self-test does not run without code for the GPU."""
    tried = []
    family = importlib.import_module("fastkd.ops.softmax_kl")
    fresh.setattr(family, "self_test", lambda backend, device: tried.append(backend))
    simulate(Module(targets=targets), capability)
    reason = unavailable_reason("cuda", "softmax_kl", "cuda:0")
    if runs:
        assert reason is None
        assert tried == ["cuda"]
    else:
        assert tried == []
        assert reason == (
            f"fastkd._cuda was compiled for {', '.join(targets)} and has no code for Simulated GPU (compute capability "
            f"{capability[0]}.{capability[1]}); reinstall fastkd from the sources with a CUDA toolkit that supports it"
        )


def test_auto_falls_back_from_cuda_to_triton_and_vice_versa(
    simulate: Callable[..., None], fresh: pytest.MonkeyPatch
) -> None:
    simulate(Module())
    fresh.setattr(BACKENDS["triton"], "machine_reason", lambda: None)
    family = importlib.import_module("fastkd.ops.softmax_kl")
    for broken, works in (("cuda", "triton"), ("triton", "cuda")):
        dispatch._reasons.clear()
        fresh.setattr(family, "self_test", lambda backend, device, wrong=broken: "wrong" if backend == wrong else None)
        fresh.setattr(dispatch, "_warned", {broken})
        assert dispatch._resolve("softmax_kl", "auto", "cuda", 0, "", False) == works
        with pytest.raises(fastkd.BackendUnavailable, match="cannot run softmax_kl on cuda:0: wrong"):
            dispatch._resolve("softmax_kl", broken, "cuda", 0, "", False)


def test_triton_on_cpu_tensors_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(fastkd.BackendUnavailable, match=r"CUDA tensors.*TRITON_INTERPRET=1"):
        choose("softmax_kl", "triton", X)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, r"Triton cannot be imported \(.*\); pip install triton"),
        (
            types.SimpleNamespace(__version__="3.5.1+git1234"),
            r"Triton 3\.5\.1.* is older than 3\.6; pip install --upgrade",
        ),
    ],
    ids=["absent", "too old"],
)
def test_reports_a_missing_or_old_triton(fresh: pytest.MonkeyPatch, module: object, reason: str) -> None:
    fresh.setenv("TRITON_INTERPRET", "1")
    fresh.setitem(sys.modules, "triton", module)  # None makes the import fail
    with pytest.raises(fastkd.BackendUnavailable, match=reason):
        choose("softmax_kl", "triton", X)


@pytest.mark.parametrize(
    ("triton", "numpy", "works"), [("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True)]
)
def test_reports_a_numpy_that_breaks_the_interpreter(
    fresh: pytest.MonkeyPatch, triton: str, numpy: str, works: bool
) -> None:
    """Triton 3.6 converts one-element arrays to Python numbers, which numpy 2.4 refuses."""
    fresh.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=triton))
    fresh.setitem(sys.modules, "numpy", types.SimpleNamespace(__version__=numpy))
    fresh.setitem(sys.modules, "fastkd.kernels.common", types.SimpleNamespace(INTERPRETED=True))
    reason = dispatch.unavailable_reason("triton")
    if works:
        assert reason is None
    else:
        assert reason == "the interpreter of Triton 3.6.0 needs numpy below 2.4, found 2.4.0; pip install 'numpy<2.4'"


def test_environment_overrides_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKD_BACKEND", "reference")
    assert choose("softmax_kl", "auto", X) == "reference"
    monkeypatch.setenv("FASTKD_BACKEND", "auto")
    assert choose("softmax_kl", "reference", X) == "reference"
    monkeypatch.setenv("FASTKD_BACKEND", "tritn")
    with pytest.raises(ValueError, match=r"FASTKD_BACKEND: expected one of auto, .*got 'tritn'"):
        choose("softmax_kl", "auto", X)
    monkeypatch.setenv("FASTKD_BACKEND", "cuda")
    with pytest.raises(fastkd.BackendUnavailable, match="FASTKD_BACKEND=cuda cannot run softmax_kl on cpu"):
        choose("softmax_kl", "auto", X)


def test_a_failure_is_remembered_and_warned_about_once(fresh: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(backend: Backend, *_: object) -> str:
        tried.append(backend.name)
        return "it is broken"

    fresh.setattr(dispatch, "probe", broken)
    message = r"the cpu backend is unavailable on cpu \(it is broken\); falling back to a slower one\. Shown once"
    with pytest.warns(fastkd.FastKDWarning, match=message):
        assert choose("softmax_kl", "auto", X) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("softmax_kl", "auto", X) == "reference"
    assert tried == ["cpu"]
    with pytest.raises(fastkd.BackendUnavailable, match=r"it is broken.*backend='reference' always works"):
        choose("softmax_kl", "cpu", X)


def test_a_self_test_that_exits_is_a_reason(fresh: pytest.MonkeyPatch) -> None:
    """In a thread, SystemExit would otherwise be silent."""

    def exits() -> None:
        raise SystemExit("this build of the library is no longer supported")

    fresh.setattr(BACKENDS["triton"], "machine_reason", exits)
    assert str(unavailable_reason("triton")).endswith("SystemExit: this build of the library is no longer supported")


def test_a_self_test_that_raises_or_is_wrong_is_a_reason(fresh: pytest.MonkeyPatch) -> None:
    family = importlib.import_module("fastkd.ops.softmax_kl")
    for backend in BACKENDS.values():
        fresh.setattr(backend, "machine_reason", lambda: None)

    class Wrong:
        def statistics_of(self, dtype: torch.dtype) -> tuple[int, torch.dtype]:
            return 2, dtype

        def forward(self, student, teacher, loss, *_: object) -> None:  # type: ignore[no-untyped-def]
            loss.fill_(1.0)

        def backward(self, grad_loss, student, teacher, statistics, grad_student, *_: object) -> None:  # type: ignore[no-untyped-def]
            grad_student.zero_()

    fresh.setattr(family, "_kernels", lambda backend: Wrong())
    assert "wrong loss" in str(unavailable_reason("cpu", "softmax_kl", "cpu"))
    fresh.setattr(family, "_kernels", lambda backend: 1 / 0)
    assert "ZeroDivisionError" in str(unavailable_reason("triton", "softmax_kl", "cpu"))


def test_other_dtypes_and_devices_use_the_reference() -> None:
    assert choose("softmax_kl", "auto", torch.zeros(1, 1, 4, device="meta")) == "reference"
    odd = torch.zeros(1, 1, 4, dtype=torch.float8_e4m3fn)
    assert choose("softmax_kl", "auto", odd) == "reference"
    with pytest.raises(fastkd.BackendUnavailable, match=r"float32, float16, bfloat16, float64"):
        choose("softmax_kl", "cpu", odd)


def test_small_inputs_use_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.MIN_ELEMENTS, ("softmax_kl", "cpu"), 100)
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda *_: None)
    assert choose("softmax_kl", "auto", torch.zeros(1, 1, 99)) == "reference"
    assert choose("softmax_kl", "auto", torch.zeros(1, 1, 100)) == "cpu"
    assert choose("softmax_kl", "cpu", torch.zeros(1, 1, 99)) == "cpu"


@pytest.mark.parametrize("family", ["softmax_kl", "relation", "pixel_word"])
def test_auto_takes_the_backend_that_the_committed_sweeps_found_faster(family: str) -> None:
    """Ratios are medians over instruction sets and dtypes, as single points are noisy."""
    losses = {"softmax_kl": ["channel_distribution_kd"], "pixel_word": ["cross_modal_kd"]}
    ratios: dict[tuple[str, int], list[float]] = {}
    for file in (Path(__file__).parents[2] / "benchmarks" / "results").glob("amd-epyc-family-25-*/*/sweep.json"):
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        ms = {(row["work"], row["provider"]): row["ms"]["median"] for row in rows}
        for row in rows:
            if row["provider"] == "cpu" and row["loss"] in losses.get(family, ["channel_kd", "pixel_relation_kd"]):
                work = row["work"].removesuffix(row["dtype"])
                ratios.setdefault((work, row["elements"]), []).append(
                    row["ms"]["median"] / ms[row["work"], "reference"]
                )
    assert len(ratios) > 10
    for (work, count), found in ratios.items():
        small = count < dispatch.MIN_ELEMENTS.get((family, "cpu"), 0)
        assert (statistics.median(found) > 1) == small, work


def test_importing_fastkd_imports_nothing_heavy() -> None:
    """``import fastkd`` does not import torch, and its losses import neither Triton nor a compiled module."""
    script = (
        "import sys, fastkd; assert 'torch' not in sys.modules;"
        "import torch; before = set(sys.modules);"  # some versions of torch import Triton themselves
        "import fastkd.losses; loaded = set(sys.modules) - before;"
        "assert loaded.isdisjoint({'triton', 'torch._dynamo', 'fastkd.kernels', 'fastkd._cpu', 'fastkd._cuda',"
        " 'numpy', 'timm', 'transformers'}), loaded"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_info_gives_reasons() -> None:
    found = fastkd.info()
    assert set(found["backends"]) == set(dispatch.BACKENDS)
    assert found["backends"]["reference"] == {"in_use": True, "why_not": None}
    assert Path(found["package"]) == Path(fastkd.__file__).parent.resolve()
    for name, row in found["backends"].items():
        assert row["in_use"] == (row["why_not"] is None), name
    text = str(found)
    assert torch.__version__ in text
    for name in dispatch.BACKENDS:
        assert name in text

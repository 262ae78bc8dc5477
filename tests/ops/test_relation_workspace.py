"""The workspace of relation's CPU kernels: limits, the smallest that suffices, and the forms that fit."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import relation_tools
import torch
from relation_tools import distance, run_kernel
from torch import Tensor

from fastkd import _native
from fastkd.ops.relation import native as relation_native
from fastkd.ops.relation import plan as forms
from fastkd.ops.relation import relation

try:
    cpu = _native.load("cpu")
except ImportError as error:
    pytest.skip(f"no compiled kernels: {error}", allow_module_level=True)

rows = functools.partial(relation_tools.rows, device="cpu")
kernel = functools.partial(run_kernel, "cpu")


@pytest.mark.parametrize("distance_name", ["kl", "row_cosine"])
@pytest.mark.parametrize("cross", [False, True])
def test_small_workspace_gives_the_same_results(
    monkeypatch: pytest.MonkeyPatch, cross: bool, distance_name: str
) -> None:
    """Blocks that do not fit the workspace together are packed in two halves."""
    student, teacher, weight = rows((2, 700, 40), 0), rows((2, 700, 40), 1), rows((2, 700), 2)
    options = {"distance": distance_name, "cross": cross}
    whole = kernel(student, teacher, weight, **options)
    monkeypatch.setenv("FASTKD_WORKSPACE_MIB", "0.01")
    with pytest.raises(ValueError, match=r"a workspace of 0\.01 MiB does not hold one block of rows") as error:
        relation(student, teacher, backend="cpu", **options)
    minimum = str(error.value).split("at least ")[1].split(",")[0]
    for mib in (minimum, "1", "1.5"):  # the size in the error suffices, also for the backward
        monkeypatch.setenv("FASTKD_WORKSPACE_MIB", mib)
        for got, want in zip(kernel(student, teacher, weight, **options), whole, strict=True):
            assert distance(got, want.double()) <= 5e-7
    monkeypatch.setenv("FASTKD_WORKSPACE_MIB", "many")
    with pytest.raises(ValueError, match="FASTKD_WORKSPACE_MIB: expected a number of MiB above 0, got 'many'"):
        kernel(student, teacher, weight, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["stored", "gram"])
def test_falls_back_to_streamed_if_a_form_exceeds_the_workspace(
    monkeypatch: pytest.MonkeyPatch, form: str, dtype: torch.dtype
) -> None:
    shape, teacher_width = (2, 400, 200 if form == "stored" else 70), 200 if form == "stored" else 50
    student, teacher, weight = rows(shape, 0, dtype), rows((2, 400, teacher_width), 1, dtype), rows(shape[:2], 2)
    options: dict[str, Any] = {"keep": True} if form == "stored" else {"distance": "mse"}
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    relation(student, teacher, backend="cpu")  # trigger the self-test first
    chosen: list[str] = []
    native_call = relation_native._call
    monkeypatch.setattr(relation_native, "_call", lambda *a: chosen.append(a[3].form) or native_call(*a))

    def with_limit(forward: int, backward: int | None = None) -> tuple[Tensor, Tensor]:
        chosen.clear()
        monkeypatch.setenv("FASTKD_WORKSPACE_MIB", repr(forward / 2**20))
        leaf = student.detach().requires_grad_()
        loss = relation(leaf, teacher, backend="cpu", **options)
        monkeypatch.setenv("FASTKD_WORKSPACE_MIB", repr((backward or forward) / 2**20))
        return loss.detach(), torch.autograd.grad((loss * weight).sum(), leaf)[0]

    def minimum_workspace(name: str) -> int:
        call = cpu.Relation(
            *shape, teacher_width, "cosine", options.get("distance", "kl"), 0.1, False, False,
            str(dtype).removeprefix("torch."), name, 1, 2**40,
        )  # fmt: skip
        return max(call.workspace_bytes(backward)[1] for backward in (False, True))

    assert minimum_workspace("streamed") < minimum_workspace(form)
    whole = with_limit(2**25)
    assert chosen == [form, form]
    assert all(map(torch.equal, with_limit(minimum_workspace(form)), whole))  # one thread: identical bits
    assert chosen == [form, form]
    streamed = with_limit(minimum_workspace(form) - 64)
    assert chosen == ["streamed", "streamed"]
    # The forward chooses the form: a higher limit in the backward must not make it read matrices that were not stored.
    for results in (
        streamed,
        with_limit(minimum_workspace("streamed")),
        with_limit(minimum_workspace(form) - 64, 2**25),
    ):
        for got, want in zip(results, whole, strict=True):
            assert distance(got, want.double()) <= 1000 * arithmetic.eps + 2 * torch.finfo(got.dtype).eps
        assert chosen == ["streamed", "streamed"]
    with pytest.raises(ValueError, match=r"does not hold one block of rows of this call; set it to at least [\d.]+,"):
        with_limit(2**25, minimum_workspace("streamed"))
    assert chosen == [form, form]
    with pytest.raises(ValueError, match="does not hold one block of rows of this call; set it to at least") as error:
        with_limit(minimum_workspace("streamed") - 64)
    named = float(str(error.value).split("at least ")[1].split(",")[0])
    assert minimum_workspace("streamed") <= named * 2**20 < minimum_workspace("streamed") + 0.01 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_minimum_workspace_in_python_matches_the_plan(dtype: torch.dtype) -> None:
    for count, student, teacher in ((100, 16, 16), (333, 20, 13), (2000, 100, 300), (48, 7, 9), (1400, 1024, 1000)):
        for form, distance_name, known in (
            ("gram", "mse", forms.min_gram_bytes(student, teacher, dtype)),
            ("stored", "kl", forms.min_stored_bytes(count, dtype)),
        ):
            arguments = (1, count, student, teacher, "cosine", distance_name, 0.1, False, False)
            call = cpu.Relation(*arguments, str(dtype).removeprefix("torch."), form, 1, 1)
            assert known == max(call.workspace_bytes(backward)[1] for backward in (False, True))


@pytest.mark.parametrize("form", ["streamed", "stored", "gram"])
def test_workspace_is_bounded_for_any_number_of_rows(form: str) -> None:
    """A streamed backward additionally holds one fp32 copy of a sample's gradient."""
    mib = 2**20
    for count, width in ((900, 64), (14400, 64), (14400, 512), (100_000, 64)):
        if form == "stored" and count > 2048:
            continue
        call = cpu.Relation(
            *(8, count, width, width, "cosine", "mse" if form == "gram" else "kl", 0.1, False, False),
            *("float32", form, 2, 32 * mib),
        )
        copy = count * width * 4 + 96 * 64 * 4
        for backward in (False, True):
            size, minimum = call.workspace_bytes(backward)
            assert minimum <= 32 * mib
            assert size <= 32 * mib + (1.1 * copy if backward and form == "streamed" else 0) * 2


@pytest.mark.parametrize("form", ["streamed", "stored", "gram"])
def test_workspace_is_bounded_for_many_threads(form: str) -> None:
    """The limit on scratch memory also limits the number of threads."""
    for threads in (1, 64, 4096):
        call = cpu.Relation(
            *(200, 1024, 400, 300, "cosine", "mse" if form == "gram" else "kl", 0.1, False, False),
            *("float64", form, threads, 64 * 2**20),
        )
        size, minimum = call.workspace_bytes(True)
        assert minimum <= 64 * 2**20
        assert size <= 64 * 2**20 + threads * (1100 * 416 * 8 if form == "streamed" else 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_largest_stored_matrices_fit_the_default_workspace(dtype: str) -> None:
    count = math.isqrt(forms.MAX_STORED_BYTES // (8 if dtype == "float64" else 4))
    call = cpu.Relation(1, count, 900, 900, "cosine", "kl", 0.1, False, False, dtype, "stored", 2, 32 * 2**20)
    for backward in (False, True):
        assert call.workspace_bytes(backward)[1] <= 32 * 2**20


def test_stored_matrices_have_little_padding() -> None:
    for count in (97, 128, 512, 1024):
        blocks = -(-count // 48)
        assert blocks * (blocks + 1) * 48 * 48 <= 3 * count * count

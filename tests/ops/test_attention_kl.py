"""attention_kl beyond the contract suite: biases, scales, sizes around blocks, prepared gradients, workspace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_tools import Recorder, saved_for_backward, threads
from torch import Tensor

from fastkd.losses import attention_kd
from fastkd.ops import dispatch

BACKENDS = [name for name in ("reference", "cpu") if dispatch.unavailable_reason(name, "attention_kl", "cpu") is None]
BOUNDS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-13}
"""Errors relative to the largest gradient: of sums in fp32, and of rounding to the dtype."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def features(b: int, h: int, n: int, m: int, d_s: int, d_t: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(b, h, rows, d) for d in (d_s, d_t) for rows in (n, m)]
    return [random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def definition(args: list[Tensor], **options: Any) -> Tensor:
    """Return the losses (B, H, N) from the definition, one query at a time, in fp64."""
    q_s, k_s, q_t, k_t = (x.double() for x in args)
    b, h, n, _ = q_s.shape
    m = k_s.shape[2]
    scales, temperatures = options.get("scale", (None, None)), options.get("temperature", (1.0, 1.0))
    maps = []
    for side, q, k, scale, tau in zip(
        ("student", "teacher"), (q_s, q_t), (k_s, k_t), scales, temperatures, strict=True
    ):
        by = torch.full((h,), q.shape[3] ** -0.5, dtype=torch.float64) if scale is None else scale
        bias = options.get(f"{side}_bias")
        zero = q.new_zeros(())
        maps.append((by.double().view(h, 1, 1) * (q @ k.mT) + (zero if bias is None else bias.double())) / tau)
    rows = []
    for index in range(b * h * n):
        sample, head, query = index // (h * n), index // n % h, index % n
        end = query + m - n + 1 if options.get("causal") else m
        keep = torch.arange(m) < end
        if options.get("key_mask") is not None:
            keep &= options["key_mask"][sample]
        if options.get("query_mask") is not None and not options["query_mask"][sample, query]:
            rows.append(q_s.new_zeros(()))
            continue
        log_s, log_t = (e[sample, head, query][keep].log_softmax(0) for e in maps)
        rows.append(torch.where(log_t.exp() > 0, log_t.exp() * (log_t - log_s), 0).sum())
    return torch.stack(rows).view(b, h, n)


def compare(args: list[Tensor], backend: str, **options: Any) -> None:
    """Compare losses and gradients, of weighted losses and of their mean, with the definition."""
    leaves = [x.clone().requires_grad_(i < 2) for i, x in enumerate(args)]
    exact = [x.double().requires_grad_(i < 2) for i, x in enumerate(args)]
    want = definition(exact, **options)
    got = attention_kd(*leaves, **options, reduction="none", backend=backend)
    bound = BOUNDS[args[0].dtype]
    bound_of_sums = min(bound, 1e-5)
    torch.testing.assert_close(got.double(), want, rtol=bound_of_sums, atol=bound_of_sums * max(1.0, want.max().item()))
    weight = torch.rand(want.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for reduction in ("weighted", "mean"):
        if reduction == "weighted":
            total, loss = (want * weight).sum(), (got * weight.to(got)).sum()
        else:
            total = want.sum() / (
                want.numel() if options.get("query_mask") is None else options["query_mask"].sum() * want.shape[1]
            )
            loss = attention_kd(*leaves, **options, backend=backend)
        exact_grads = torch.autograd.grad(total, exact[:2], retain_graph=True)
        for a, b in zip(torch.autograd.grad(loss, leaves[:2]), exact_grads, strict=True):
            assert a.dtype == args[0].dtype
            error = (a.double() - b).abs().max().item()
            assert error <= bound * b.abs().max().item() + 1e-12, (reduction, error)


BIASES = {
    "per head": lambda b, h, n, m: random(h, n, m, seed=7),
    "per window": lambda b, h, n, m: random(b, 1, n, m, seed=7),
    "over keys": lambda b, h, n, m: random(m, seed=7),
    "per query and head": lambda b, h, n, m: random(b, h, n, 1, seed=7),
    "strided": lambda b, h, n, m: random(h, m, n, seed=7).mT,
    "16 bits": lambda b, h, n, m: random(h, n, m, seed=7).bfloat16(),
}


@pytest.mark.parametrize("kind", BIASES)
def test_biases(backend: str, kind: str) -> None:
    size = (2, 3, 5, 19)
    bias = BIASES[kind](*size)
    args = features(*size, 6, 9)
    compare(args, backend, student_bias=bias, teacher_bias=-0.5 * bias, temperature=(0.7, 1.3))
    compare(args, backend, student_bias=bias)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_everything_at_once(backend: str, dtype: torch.dtype) -> None:
    """Scales per head, temperatures, biases, masks and causal maps, in every dtype."""
    args = features(2, 3, 7, 37, 6, 9, dtype=dtype)
    key_mask, query_mask = random(2, 37, seed=6) > -0.5, random(2, 7, seed=7) > -0.5
    key_mask[:, 0] = query_mask[:, 0] = True
    scale = (torch.tensor([0.3, 0.5, 0.1]), torch.tensor([0.2, 0.4, 0.7]))
    bias = random(3, 7, 37, seed=5)
    for causal in (False, True):
        compare(args, backend, scale=scale, temperature=(0.6, 0.9), student_bias=bias, teacher_bias=bias.flip(0),
                key_mask=key_mask, query_mask=query_mask, causal=causal)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sizes_around_vectors_and_blocks(backend: str, dtype: torch.dtype) -> None:
    for keys in (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 48, 49, 63, 65):
        compare(features(1, 1, 3, keys, keys % 7 + 1, 4, dtype=dtype), backend)
    for width in (15, 16, 17, 33, 49):
        compare(features(1, 1, 9, 8, width, 3, dtype=dtype), backend)
    compare(features(1, 1, 65, 5, 3, 4, dtype=dtype), backend)  # more queries than a block
    compare(features(1, 1, 20, 6000, 2, 2, dtype=dtype), backend)  # so many keys that blocks have eight queries
    compare(features(1, 2, 70, 131, 5, 3, dtype=dtype), backend, causal=True)


@pytest.mark.parametrize("keys", [49, 50])
def test_last_keys_beyond_whole_vectors(backend: str, keys: int) -> None:
    """One or two keys that fill no vector: with biases, masks and masked queries."""
    args = features(2, 2, 18, keys, 32, 5)
    key_mask, query_mask = torch.ones(2, keys, dtype=torch.bool), torch.ones(2, 18, dtype=torch.bool)
    key_mask[1, -1] = key_mask[0, 3] = query_mask[0, 17] = query_mask[1, 2] = False
    bias = random(2, 18, keys, seed=5)
    compare(args, backend)
    compare(args, backend, student_bias=bias, teacher_bias=-bias, key_mask=key_mask, query_mask=query_mask)


def test_equal_networks_give_no_gradient(backend: str) -> None:
    """The kernels' gradient is exactly 0, whatever the loss is multiplied by."""
    q, k = random(2, 2, 18, 16) * 3, random(2, 2, 33, 16, seed=1) * 3
    leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    loss = attention_kd(*leaves, q, k, backend=backend)
    grads = torch.autograd.grad(loss * 1e6, leaves)
    assert loss.abs() < 1e-6
    assert max(g.abs().max().item() for g in grads) <= (0.0 if backend == "cpu" else 1.0)


def test_masked_pairs_may_hold_anything(backend: str) -> None:
    """NaN in biases of masked keys, and rows of −inf of masked queries, change neither loss nor gradient."""
    args = [x.requires_grad_(i < 2) for i, x in enumerate(features(1, 2, 4, 5, 3, 3))]
    key_mask, query_mask = torch.tensor([[True, True, False, True, True]]), torch.tensor([[True, False, True, True]])
    bias = random(1, 2, 4, 5, seed=8)
    options = {"key_mask": key_mask, "query_mask": query_mask, "backend": backend}
    want = attention_kd(*args, student_bias=bias, teacher_bias=bias, **options)
    changed = bias.masked_fill(~key_mask[:, None, None], math.nan).masked_fill(~query_mask[:, None, :, None], -math.inf)
    got = attention_kd(*args, student_bias=changed, teacher_bias=changed, **options)
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got, args[:2]), torch.autograd.grad(want, args[:2]), strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


def test_minus_infinity_in_a_bias_excludes_a_pair(backend: str) -> None:
    args = [x.requires_grad_(i < 2) for i, x in enumerate(features(1, 2, 4, 6, 3, 3))]
    mask = torch.tensor([[True] * 4 + [False] * 2])
    bias = torch.zeros(6).masked_fill(~mask[0], -math.inf)
    by_bias = attention_kd(*args, student_bias=bias, teacher_bias=bias, backend=backend)
    by_mask = attention_kd(*args, key_mask=mask, backend=backend)
    torch.testing.assert_close(by_bias, by_mask)
    for a, b in zip(torch.autograd.grad(by_bias, args[:2]), torch.autograd.grad(by_mask, args[:2]), strict=True):
        torch.testing.assert_close(a, b)
    alone = attention_kd(*args, student_bias=bias, reduction="none", backend=backend)
    assert alone.isinf().all()  # the teacher attends to what the student cannot
    blind = attention_kd(*args, teacher_bias=torch.full((1,), -math.inf), reduction="none", backend=backend)
    assert blind.isnan().all()


# --- the C++ kernel ---------------------------------------------------------------------------------------------------

needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ kernels are unavailable here")


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads next to columns": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "gaps between rows": lambda x: torch.nn.functional.pad(x, (1, 6))[..., 1:-6],
    "columns apart": lambda x: x.mT.contiguous().mT,
    "the same row for all queries or keys": lambda x: x[:, :, :1].expand_as(x),
}


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_the_layout(layout: str, dtype: torch.dtype) -> None:
    """Rows that products read in place give the bits of packed ones; more heads than a thread takes at a time."""
    args = [LAYOUTS[layout](x) for x in features(3, 7, 20, 49, 32, 16, dtype=dtype)]
    results = []
    for arguments in (args, [x.contiguous() for x in args]):
        leaves = [x.detach().requires_grad_(i < 2) for i, x in enumerate(arguments)]
        assert [x.stride() for x in leaves] == [x.stride() for x in arguments]
        rows = attention_kd(*leaves, reduction="none", backend="cpu")
        results.append((rows, *torch.autograd.grad(rows, leaves[:2], torch.linspace(0, 1, 20).expand_as(rows))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@needs_cpu
def test_windows_have_the_same_bits_for_any_number_of_threads() -> None:
    args = [x.requires_grad_(i < 2) for i, x in enumerate(features(16, 5, 6, 17, 16, 4))]
    results = []
    for count in (1, 2, 3):
        with threads(count):
            loss = attention_kd(*args, reduction="none", backend="cpu")
            results.append((loss, *torch.autograd.grad(loss.sum(), args[:2])))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_cpu
@pytest.mark.parametrize(
    ("rows", "dtype"), [(49, torch.float32), (49, torch.float64), (49, torch.bfloat16), (70, torch.float32)], ids=str
)
def test_gradients_stored_past_the_caches_have_the_same_bits(rows: int, dtype: torch.dtype) -> None:
    """Gradients of 4 MiB or more are; those of a few samples are not. 70 rows have two blocks and two partial sums."""
    args = [x.requires_grad_(i < 2) for i, x in enumerate(features(48, 8, rows, rows, 32, 16, dtype=dtype))]
    assert sum(x.numel() for x in args[:2]) * 4 >= 2**22

    def gradients(samples: slice) -> tuple[Tensor, ...]:
        leaves = [x[samples] for x in args]
        return torch.autograd.grad(attention_kd(*leaves, reduction="sum", backend="cpu"), leaves[:2])

    parts = [gradients(slice(i, i + 8)) for i in range(0, 48, 8)]
    for whole, some in zip(gradients(slice(None)), zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(some))


@needs_cpu
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_prepared_gradients_have_the_bits_of_a_second_pass(reduction: str, masked: bool) -> None:
    args = [x.requires_grad_(i < 2) for i, x in enumerate(features(2, 2, 70, 33, 8, 5))]
    mask = torch.arange(140).reshape(2, 70) % 7 > 0 if masked else None
    rows = attention_kd(*args, query_mask=mask, reduction="none", backend="cpu")
    number = 1.0 if reduction == "sum" else 1 / (2 * (int(mask.sum()) if masked else 140))
    second = torch.autograd.grad(rows, args[:2], torch.full_like(rows, number))
    loss = attention_kd(*args, query_mask=mask, reduction=reduction, backend="cpu")
    for a, b in zip(torch.autograd.grad(loss, args[:2]), second, strict=True):
        assert torch.equal(a, b)


@needs_cpu
def test_backward_returns_the_prepared_gradients_once() -> None:
    """They are scaled in place for a weighted loss; another backward computes them again, with the same bits."""
    args = [x.requires_grad_(i < 2) for i, x in enumerate(features(2, 2, 19, 17, 16, 5))]
    with Recorder() as recorder:
        loss = 3 * attention_kd(*args, backend="cpu")
    (_, _, (_, *prepared)) = recorder.calls[0]
    first = torch.autograd.grad(loss, args[:2], retain_graph=True)
    assert [x.data_ptr() for x in first] == [x.data_ptr() for x in prepared]
    want = [x.clone() for x in first]
    for x in first:
        x.fill_(torch.nan)  # the caller's own
    second = torch.autograd.grad(loss, args[:2], retain_graph=True)
    third = torch.autograd.grad(2 * loss, args[:2])
    for a, b, c in zip(want, second, third, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, 2 * a)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, args[:2])


@needs_cpu
def test_a_row_gradient_that_differs_after_all() -> None:
    """The forward of a mean prepares for one number; other gradients of its rows still give the right result."""
    from fastkd.ops.attention_kl import attention_kl_unchecked
    from fastkd.ops.attention_kl.plan import Inputs

    args = [x.requires_grad_(i < 2) for i, x in enumerate(features(1, 2, 5, 7, 4, 4))]
    scale = torch.full((2,), 0.5, dtype=torch.float64)
    inputs = Inputs(*args, scale, scale, None, None, None, None)
    weight = random(1, 2, 5, seed=3)
    results = []
    for expected in (0.1, None):
        rows = attention_kl_unchecked(inputs, 1.0, False, expected, "cpu")
        results.append(torch.autograd.grad(rows, args[:2], weight))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@needs_cpu
@pytest.mark.parametrize("kept", [0, 1])
def test_only_the_gradient_needed_is_computed(kept: int) -> None:
    args = [x.requires_grad_(i == kept) for i, x in enumerate(features(1, 2, 5, 7, 4, 4))]
    with Recorder() as recorder:
        attention_kd(*args, backend="cpu").backward()
    ((_, forward, (_, *prepared)),) = recorder.calls
    assert list(forward[13:15]) == [kept == 0, kept == 1] == [x.numel() > 0 for x in prepared]
    assert [x.grad is not None for x in args[:2]] == [kept == 0, kept == 1]


@needs_cpu
def test_saved_tensors_are_the_inputs() -> None:
    args = [x.requires_grad_(i < 2) for i, x in enumerate(features(1, 1, 500, 400, 4, 4))]
    with saved_for_backward() as saved:
        attention_kd(*args, backend="cpu")
    inputs = {x.data_ptr() for x in args}
    assert sum(x.nbytes for x in saved if x.data_ptr() not in inputs) == 2 * 8  # the scales


@needs_cpu
@pytest.mark.parametrize("threads_used", [1, 3])
def test_workspace_grows_with_the_keys_only(threads_used: int) -> None:
    """Twice the keys need twice the memory at most, and any number of queries none."""
    from fastkd.ops.launch import native

    def size(queries: int, keys: int) -> int:
        call = native("cpu").AttentionKL((2, 4, queries, keys, 64, 32), False, "float32", 1.0, True, True, threads_used,
                                         1 << 40)  # fmt: skip
        return call.workspace_bytes(True)[0]

    assert size(1 << 20, 4096) == size(4096, 4096)
    assert 1.5 * size(4096, 1 << 18) < size(4096, 1 << 19) <= 2 * size(4096, 1 << 18)


@needs_cpu
def test_a_small_workspace_means_fewer_threads_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    args = [x.requires_grad_(i < 2) for i, x in enumerate(features(1, 4, 100, 300, 8, 8))]
    with threads(2):
        want = attention_kd(*args, reduction="none", backend="cpu")
        for mib in ("1.2", "0.7"):  # enough for one head at a time; for one thread
            monkeypatch.setenv("FASTKD_WORKSPACE_MIB", mib)
            assert torch.equal(attention_kd(*args, reduction="none", backend="cpu"), want)
        monkeypatch.setenv("FASTKD_WORKSPACE_MIB", "0.01")
        with pytest.raises(ValueError, match=r"FASTKD_WORKSPACE_MIB: a workspace of 0\.01 MiB"):
            attention_kd(*args, backend="cpu")

"""attention_kd: options, equivalences with other formulas, and the messages of its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import BackendUnavailable
from fastkd.losses import AttentionKD, attention_kd, pixel_relation_kd

B, H, N, M, D = 2, 3, 4, 6, 5


def features(heads: tuple[int, int] = (H, H), widths: tuple[int, int] = (D, D), m: int = M) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, h, rows, d, generator=generator) for h, d in zip(heads, widths, strict=True) for rows in (N, m)
    ]


def kl(e_s: Tensor, e_t: Tensor) -> Tensor:
    """Return KL(softmax(e_t) ‖ softmax(e_s)) over the last dimension."""
    return F.kl_div(e_s.log_softmax(-1), e_t.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def test_definition() -> None:
    q_s, k_s, q_t, k_t = features(widths=(D, D + 4))
    rows = kl(q_s @ k_s.mT / D**0.5, q_t @ k_t.mT / (D + 4) ** 0.5)
    torch.testing.assert_close(attention_kd(q_s, k_s, q_t, k_t, reduction="none"), rows)
    torch.testing.assert_close(attention_kd(q_s, k_s, q_t, k_t), rows.mean())
    torch.testing.assert_close(attention_kd(q_s, k_s, q_t, k_t, reduction="sum"), rows.sum())


def test_temperatures() -> None:
    q_s, k_s, q_t, k_t = features()
    e_s, e_t = q_s @ k_s.mT / D**0.5, q_t @ k_t.mT / D**0.5
    torch.testing.assert_close(attention_kd(q_s, k_s, q_t, k_t, temperature=0.5), kl(e_s * 2, e_t * 2).mean())
    torch.testing.assert_close(attention_kd(q_s, k_s, q_t, k_t, temperature=(0.5, 2)), kl(e_s * 2, e_t / 2).mean())
    bias = torch.linspace(-1, 1, M).expand(N, M)
    got = attention_kd(q_s, k_s, q_t, k_t, temperature=(0.5, 2), student_bias=bias, teacher_bias=bias.flip(1))
    torch.testing.assert_close(got, kl((e_s + bias) * 2, (e_t + bias.flip(1)) / 2).mean())


def test_mean_over_valid_queries_of_all_heads() -> None:
    args, mask = features(), torch.tensor([[True, False, True, True], [False, False, False, True]])
    rows = attention_kd(*args, query_mask=mask, reduction="none")
    want = rows[mask[:, None].expand(B, H, N)].mean()
    torch.testing.assert_close(attention_kd(*args, query_mask=mask), want)


@pytest.mark.parametrize("learned", [(0,), (1,), (0, 1)])
def test_a_temperature_that_requires_grad_is_learned(learned: tuple[int, ...]) -> None:
    temperatures = [torch.tensor(t, requires_grad=i in learned) for i, t in enumerate((0.7, 1.5))]
    args = features()
    loss = attention_kd(*args, temperature=(temperatures[0], temperatures[1]))
    for i, grad in zip(learned, torch.autograd.grad(loss, [temperatures[i] for i in learned]), strict=True):
        steps = [[t.item() + (i == j) * step for j, t in enumerate(temperatures)] for step in (1e-2, -1e-2)]
        high, low = (attention_kd(*(x.double() for x in args), temperature=tuple(step)) for step in steps)
        torch.testing.assert_close(grad.double(), (high - low) / 2e-2, rtol=1e-3, atol=1e-4)
    with pytest.raises(BackendUnavailable, match="no gradient with respect to the temperature"):
        attention_kd(*args, temperature=(temperatures[0], temperatures[1]), backend="cpu")


def test_temperatures_in_half_precision_are_not_rounded_again() -> None:
    """A pair becomes a factor of the teacher's scale."""
    pair = [torch.tensor(t, dtype=torch.bfloat16, requires_grad=True) for t in (0.7, 1.3)]
    args = [x.double() for x in features()]
    got = attention_kd(*args, temperature=(pair[0], pair[1]))
    want = attention_kd(*args, temperature=(pair[0].item(), pair[1].item()))
    torch.testing.assert_close(got.detach(), want, rtol=1e-13, atol=0)


def test_scales() -> None:
    q_s, k_s, q_t, k_t = features()
    per_head = torch.tensor([0.1, 0.7, 1.3])
    e_s, e_t = q_s @ k_s.mT, q_t @ k_t.mT
    by_head = per_head.view(-1, 1, 1)
    for scale, s, t in (
        (0.3, 0.3, 0.3),
        (torch.tensor(0.3), 0.3, 0.3),
        (per_head, by_head, by_head),
        (by_head, by_head, by_head),
        ((None, per_head), D**-0.5, by_head),
        ([None, 0.3], D**-0.5, 0.3),
    ):
        torch.testing.assert_close(attention_kd(q_s, k_s, q_t, k_t, scale=scale), kl(e_s * s, e_t * t).mean())


def test_relation_heads_compare_networks_with_different_heads() -> None:
    q_s, k_s, q_t, k_t = features((4, 6), (3, 8))
    flat = lambda x: x.transpose(1, 2).reshape(B, x.shape[2], -1)  # (B, N, H·d)
    parts = lambda x: torch.stack(flat(x).chunk(2, -1), 1)  # (B, 2, N, H·d/2)
    e_s, e_t = parts(q_s) @ parts(k_s).mT / 6**0.5, parts(q_t) @ parts(k_t).mT / 24**0.5
    torch.testing.assert_close(attention_kd(q_s, k_s, q_t, k_t, relation_heads=2), kl(e_s, e_t).mean())


def test_one_tensor_as_queries_and_keys_is_a_dot_relation() -> None:
    """The Q–Q, K–K and V–V relations of MiniLMv2 are pixel_relation_kd(similarity="dot") with τ = √d."""
    s, _, t, _ = features()
    s = s.requires_grad_()
    loss = attention_kd(s, s, t, t)
    maps = lambda x: x.flatten(0, 1).mT.unsqueeze(-1)  # (B·H, D, N, 1)
    relation = pixel_relation_kd(maps(s), maps(t), similarity="dot", temperature=D**0.5)
    torch.testing.assert_close(loss, relation)
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], torch.autograd.grad(relation, s)[0])


def test_gradient_equals_that_of_modules_that_return_their_map() -> None:
    """Queries and keys of nn.MultiheadAttention's own projection; its averaged-off map is softmax(QKᵀ/√d)."""
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(12, 3, batch_first=True), torch.randn(2, 5, 12)
    q, k, _ = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    split = lambda y: y.unflatten(-1, (3, 4)).transpose(1, 2)  # (B, heads, N, d)
    teacher = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    _, p_s = module(x, x, x, average_attn_weights=False)
    p_t = (teacher[0] @ teacher[1].mT / 2).softmax(-1)
    want = (p_t * (p_t.log() - p_s.log())).sum(-1).mean()
    got = attention_kd(split(q), split(k), *teacher)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y, module.in_proj_weight) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_module_has_the_options_of_the_function() -> None:
    args, mask = features(), torch.rand(B, M) > 0.3
    mask[:, 0] = True
    options: dict[str, Any] = {"scale": 0.4, "temperature": (0.5, 1.0), "causal": True, "reduction": "sum"}
    bias = torch.randn(H, N, M)
    given = {"student_bias": bias, "teacher_bias": 2 * bias, "key_mask": mask}
    torch.testing.assert_close(AttentionKD(**options)(*args, **given), attention_kd(*args, **options, **given))
    assert not list(AttentionKD().parameters())


def changed(**new: Any) -> dict[str, Any]:
    names = ("student_q", "student_k", "teacher_q", "teacher_k")
    return dict(zip(names, features(), strict=True)) | new


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "layout": ({"student_q": torch.randn(B, N, D)}, r"student_q: expected shape \(B, heads, N, D\), got \(2, 4, 5\)"),
    "batch": ({"student_k": torch.randn(1, H, M, D)}, "student_q and student_k: batch sizes differ, 2 and 1"),
    "grouped": ({"teacher_k": torch.randn(B, 1, M, D)}, "teacher_q and teacher_k: heads differ.*grouped"),
    "width": ({"student_k": torch.randn(B, H, M, 4)}, "student_q and student_k: widths D differ, 5 and 4"),
    "queries": ({"teacher_q": torch.randn(B, H, 9, D)}, "student_q and teacher_q: queries N differ, 4 and 9.*CLS"),
    "keys": ({"teacher_k": torch.randn(B, H, 9, D)}, "student_k and teacher_k: keys M differ, 6 and 9"),
    "heads": (
        {"teacher_q": torch.randn(B, 5, N, D), "teacher_k": torch.randn(B, 5, M, D)},
        "student_q and teacher_q: heads differ, 3 and 5; pass relation_heads",
    ),
    "relation_heads": ({"relation_heads": 4}, r"relation_heads: .* divisor of student_q's width 15.*got 4; try 15"),
    "no relation_heads": ({"relation_heads": 0}, "relation_heads: expected a divisor"),
    "causal": (
        {"causal": True, "student_k": torch.randn(B, H, 2, D), "teacher_k": torch.randn(B, H, 2, D)},
        "causal: needs at least as many keys as queries, got 2 keys and 4 queries",
    ),
    "blind": (
        {"causal": True, "key_mask": torch.tensor([[False] * 4 + [True] * 2] * B)},
        "key_mask: with causal=True no valid key is visible to query 0 of sample 0",
    ),
    "key_mask": ({"key_mask": torch.zeros(B, M, dtype=torch.bool)}, "key_mask: no valid key in sample"),
    "query_mask": ({"query_mask": torch.zeros(B, N, dtype=torch.bool)}, "query_mask: no valid query in the batch"),
    "bias": ({"student_bias": torch.randn(2, N, M)}, r"student_bias: .*that broadcasts .* got \(2, 4, 6\)"),
    "trained bias": ({"student_bias": torch.randn(H, N, M, requires_grad=True)}, "student_bias: requires grad.*detach"),
    "scale": ({"scale": torch.ones(2)}, r"scale: expected one number per head, \(3,\), got shape \(2,\)"),
    "trained scale": ({"scale": torch.ones(H, requires_grad=True)}, "scale: requires grad.*detach"),
    "infinite scale": ({"scale": (1.0, math.inf)}, r"scale\[1\]: expected a finite number, got inf"),
    "infinite scales": ({"scale": torch.tensor([1.0, math.inf, 1.0])}, "scale: expected finite numbers, got"),
    "trained number": ({"scale": torch.tensor(1.0, requires_grad=True)}, "scale: requires grad.*detach"),
    "scales": ({"scale": (1.0, 1.0, 1.0)}, "scale: expected a pair"),
    "temperatures": ({"temperature": (1.0, 1.0, 1.0)}, "temperature: expected a number or a pair"),
    "temperature": ({"temperature": (1.0, 0.0)}, r"temperature\[1\]: expected a finite number above 0, got 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    change, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        attention_kd(**changed(**change))


@pytest.mark.parametrize("name", ["scale", "student_bias", "teacher_bias"])
def test_forward_mode_on_a_constant_is_an_error_not_zero(name: str) -> None:
    value = torch.ones(H) if name == "scale" else torch.randn(H, N, M)
    loss = lambda x: attention_kd(*features(), **{name: x})
    with pytest.raises(ValueError, match=f"{name}: has a forward-mode tangent.*detach"):
        torch.func.jvp(loss, (value,), (value,))


def test_masked_queries_may_see_no_key() -> None:
    """Left padding with causal=True: the padded queries see no valid key, and are masked."""
    mask = torch.tensor([[False] * 3 + [True] * 3, [True] * 6])
    loss = attention_kd(*features(), causal=True, key_mask=mask, query_mask=mask[:, 2:])
    assert loss.isfinite()


def test_temperatures_in_a_pair_may_change_under_compile() -> None:
    args = [x.requires_grad_(i < 2) for i, x in enumerate(features())]
    step = lambda args, pair: attention_kd(*args, temperature=pair)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i, pair in enumerate(((1.0, 2.0), (1.5, 2.5), (0.7, 3.0))):
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            loss = compiled(args, pair)
        want = step(args, pair)
        torch.testing.assert_close(loss, want)
        for a, b in zip(torch.autograd.grad(loss, args[:2]), torch.autograd.grad(want, args[:2]), strict=True):
            torch.testing.assert_close(a, b)


def test_fp64_bias_of_one_network_makes_the_other_s_fp64_too() -> None:
    q, k = (torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    bias = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(2))
    options = {"temperature": (0.3, 0.7), "student_bias": bias.double()}
    got = attention_kd(q, k, k, q, teacher_bias=bias, **options)
    assert torch.equal(got, attention_kd(q, k, k, q, teacher_bias=bias.double(), **options))

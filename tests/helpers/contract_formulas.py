"""Compute every loss eagerly from the definitions in docs/maths.md, with all matrices, in the dtype of its inputs.

In fp64 these formulas are the oracle of the contract suite; in fp32, fp16 and bf16 they are the eager formula, with
whose error a backend is compared. They share no code with ``fastkd``. Each returns the loss for ``reduction="none"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

Temperature = float | tuple[float, float]
WordMask = Tensor | tuple[Tensor, Tensor] | None


def pair(temperature: Temperature) -> tuple[float, float]:
    """Return the temperatures of student and teacher."""
    return temperature if isinstance(temperature, tuple) else (temperature, temperature)


def kl(student: Tensor, teacher: Tensor, temperature: Temperature) -> Tensor:
    """Return KL(softmax(teacher/τ_T) ‖ softmax(student/τ_S)) over the last dimension."""
    tau_s, tau_t = pair(temperature)
    log_p_s, p_t = (student / tau_s).log_softmax(-1), (teacher / tau_t).softmax(-1)
    return F.kl_div(log_p_s, p_t, reduction="none").sum(-1)


def attention_weight(rows: Tensor) -> Tensor:  # (S, C, N) -> (S, C)
    return rows.shape[-2] * (rows.abs().mean(-1) / 0.5).softmax(-1)


def valid_maps(maps: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the valid pixels (1, C, n) of each sample."""
    return [x.flatten(1)[:, m.flatten().to(x.device)][None] for x, m in zip(maps, mask, strict=True)]


def channel_distribution_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Temperature,
    guide: str | None = None,
    guide_temperature: float = 0.1,
    weight: str | None = None,
    pixel_mask: Tensor | None = None,
) -> Tensor:
    if pixel_mask is not None:
        options = {"temperature": temperature, "guide": guide, "guide_temperature": guide_temperature, "weight": weight}
        samples = zip(valid_maps(student, pixel_mask), valid_maps(teacher, pixel_mask), strict=True)
        return torch.cat([channel_distribution_kd(s, t, **options) for s, t in samples])
    s, t = student.flatten(2), teacher.flatten(2)  # (B, C, N)
    w = attention_weight(t) if weight == "attention" else 1
    if guide is not None:
        p_s, p_t = ((F.normalize(x, dim=2) @ F.normalize(x, dim=2).mT / guide_temperature).softmax(2) for x in (s, t))
        s, t = (p_s if guide == "own" else p_t) @ s, p_t @ t
    return w * pair(temperature)[0] ** 2 * kl(s, t, temperature)


def channel_attention_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    similarity: str = "cosine",
    negate: bool = False,
    temperature: Temperature = 0.1,
    gamma: float = 1.0,
    distance: str = "cka",
    debiased: bool = True,
    weight: str | None = None,
) -> Tensor:
    z = []
    for x, tau in zip((student.flatten(2), teacher.flatten(2)), pair(temperature), strict=True):
        e = similarities(x, x, similarity)
        z.append(gamma * ((-e if negate else e) / tau).softmax(2) @ x + x)
    if distance == "cka":
        return (negative_log(cka(*(x.flatten(1) for x in z), debiased), debiased)).reshape(1)
    w = attention_weight(teacher.flatten(2)) if weight == "attention" else 1
    if distance == "mse":
        return w * (z[0] - z[1]).square().mean(2)
    return w * (F.normalize(z[0], dim=2) - F.normalize(z[1], dim=2)).square().sum(2) / 2


def cka(x: Tensor, y: Tensor, debiased: bool) -> Tensor:
    """Return the CKA of rows (n, D) by the published estimators of HSIC."""
    n = x.shape[0]
    k, m = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
    hsic = unbiased_hsic if debiased else lambda a, b: (a * b).sum() / (n - 1) ** 2
    size = hsic(k, k) * hsic(m, m)
    return hsic(k, m) / size.sqrt() if size > 0 else 0 * size


def unbiased_hsic(k: Tensor, m: Tensor) -> Tensor:
    """Return the estimator of Song et al., "Feature Selection via Dependence Maximization", equation 5."""
    n = k.shape[0]
    k, m = (x - torch.diag(x.diagonal()) for x in (k, m))
    one = torch.ones(n, dtype=k.dtype, device=k.device)
    trace, means = (k @ m).trace(), (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (trace + means - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def negative_log(value: Tensor, debiased: bool) -> Tensor:
    """Return −log, continued by its tangent at 0.1 (debiased) or 0.001."""
    at = torch.tensor(0.1 if debiased else 1e-3, dtype=value.dtype, device=value.device)
    return -value.log() if value >= at else -at.log() - (value - at) / at


def logit_kd(student: Tensor, teacher: Tensor, *, temperature: Temperature, pixel_mask: Tensor | None = None) -> Tensor:
    s, t = (x.movedim(1, -1) for x in (student, teacher))  # (B, H, W, K)
    if s.shape[-1] == 1:
        s, t = (F.pad(x, (1, 0)) for x in (s, t))  # one logit z: the two classes (0, z)
    rows = pair(temperature)[0] ** 2 * kl(s, t, temperature)
    return rows if pixel_mask is None else torch.where(pixel_mask.reshape(rows.shape), rows, 0)


def attention_logits(q: Tensor, k: Tensor, relation_heads: int | None = None) -> Tensor:
    """Return Q Kᵀ/√d (B, heads, N, M); with ``relation_heads``, of all heads concatenated and divided again."""
    if relation_heads is not None:
        q, k = (torch.stack(torch.cat(x.unbind(1), -1).chunk(relation_heads, -1), 1) for x in (q, k))
    return q @ k.mT / q.shape[-1] ** 0.5


def attention_kd(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    temperature: Temperature = 1.0,
    causal: bool = False,
    relation_heads: int | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    maps = [attention_logits(*qk, relation_heads) for qk in ((student_q, student_k), (teacher_q, teacher_k))]
    *_, n, m = maps[0].shape
    samples = []
    for b in range(student_q.shape[0]):
        e_s, e_t = (e[b][..., valid(key_mask, b, e)] for e in maps)  # (heads, N, valid keys)
        if causal:  # for unmasked keys
            ends = [i + m - n + 1 for i in range(n)]
            rows = torch.stack([kl(e_s[:, i, :e], e_t[:, i, :e], temperature) for i, e in enumerate(ends)], 1)
        else:
            rows = kl(e_s, e_t, temperature)
        samples.append(rows if query_mask is None else torch.where(query_mask[b].to(rows.device), rows, 0))
    return torch.stack(samples)


def similarities(x: Tensor, y: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT
    return x @ y.mT / (x.shape[-1] if kind == "mean" else 1)


def row_distance(e_s: Tensor, e_t: Tensor, distance: str, temperature: Temperature) -> Tensor:
    if distance == "kl":
        return kl(e_s, e_t, temperature)
    if distance == "mse":
        return (e_s - e_t).square().mean(-1)
    return (F.normalize(e_s, dim=-1) - F.normalize(e_t, dim=-1)).square().sum(-1)


def channel_rows(x: Tensor, centered: bool, patches: int, across_batch: bool) -> Tensor:
    """Return rows (samples or patches, C, pixels) from maps (B, C, H, W)."""
    if across_batch:
        x = torch.cat([sample.flatten(1) for sample in x], 1)[None]  # (1, C, B·N)
        return x - x.mean(2, keepdim=True) if centered else x
    if centered:
        x = x - x.mean((2, 3), keepdim=True)
    tiles = [tile for line in x.chunk(patches, 2) for tile in line.chunk(patches, 3)]
    return torch.stack(tiles, 1).flatten(0, 1).flatten(2)  # (B·patches², C, N/patches²)


def channel_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    similarity: str = "cosine",
    distance: str = "kl",
    temperature: Temperature = 0.1,
    negate: bool = False,
    centered: bool = False,
    weight: str | None = None,
    patches: int = 1,
    across_batch: bool = False,
    pixel_mask: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    if pixel_mask is not None:
        options = {"similarity": similarity, "distance": distance, "temperature": temperature, "negate": negate,
                   "centered": centered, "weight": weight, "across_batch": across_batch}  # fmt: skip
        s, t = (valid_maps(x, m) for x, m in zip((student, teacher), pixel_mask, strict=True))
        if across_batch:
            s, t = ([torch.cat(x, 2)] for x in (s, t))
        return torch.cat([channel_kd(a[..., None], b[..., None], **options) for a, b in zip(s, t, strict=True)])
    s, t = (channel_rows(x, centered, patches, across_batch) for x in (student, teacher))
    sign = -1 if negate else 1
    e_s, e_t = (sign * similarities(x, x, similarity) for x in (s, t))
    rows = row_distance(e_s, e_t, distance, temperature)
    return rows * attention_weight(channel_rows(teacher, False, patches, across_batch)) if weight else rows


def pixel_relation_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    similarity: str = "cosine",
    distance: str = "kl",
    temperature: Temperature = 0.1,
    cross_image: bool = False,
    pixel_mask: Tensor | None = None,
) -> Tensor:
    s, t = (x.flatten(2).mT for x in (student, teacher))  # (B, N, C)
    samples = range(s.shape[0])
    if pixel_mask is not None:
        masks = pixel_mask.flatten(1).to(s.device)
        s, t = ([x[m] for x, m in zip(rows, masks, strict=True)] for rows in (s, t))
    rows = {
        (i, j): row_distance(
            similarities(s[i], s[j], similarity), similarities(t[i], t[j], similarity), distance, temperature
        )
        for i, j in product(samples, samples)
        if cross_image or i == j
    }
    found = [sum(r for (i, _), r in rows.items() if i == k) / (len(rows) / len(samples)) for k in samples]
    if pixel_mask is None:
        return torch.stack(found)
    return torch.stack([r.new_zeros(m.shape).masked_scatter(m, r) for r, m in zip(found, masks, strict=True)])


def cross_modal_sample(m_s: Tensor, m_t: Tensor, temperature: Temperature, terms: Mapping[str, float]) -> Tensor:
    """Return Σ weight·term of one sample from its logits (n, t) of valid pixels and words."""
    n = m_s.shape[0]
    a_s, a_t = ((m / tau).softmax(1) for m, tau in zip((m_s, m_t), pair(temperature), strict=True))
    value = {
        "pixel_to_word": lambda: pair(temperature)[0] ** 2 * kl(m_s, m_t, temperature).mean(),
        "word_to_pixel": lambda: pair(temperature)[0] ** 2 * kl(m_s.T, m_t.T, temperature).mean(),
        "pixel_pixel": lambda: ((a_s @ a_s.T - a_t @ a_t.T) / n).square().sum(),
        "word_word": lambda: ((a_s.T @ a_s - a_t.T @ a_t) / n).square().sum(),
    }
    return sum(weight * value[term]() for term, weight in terms.items() if term in value)


def valid(mask: Tensor | None, sample: int, like: Tensor) -> Tensor | slice:
    return slice(None) if mask is None else mask.flatten(1)[sample].to(like.device)


def cross_modal_kd(
    student_pixels: Tensor,
    student_words: Tensor,
    teacher_pixels: Tensor,
    teacher_words: Tensor,
    *,
    terms: Mapping[str, float],
    similarity: str = "scaled_dot",
    temperature: Temperature = 1.0,
    word_mask: WordMask = None,
    pixel_mask: Tensor | None = None,
) -> Tensor:
    masks = word_mask if isinstance(word_mask, tuple) else (word_mask, word_mask)
    out, seen = [], []
    for b in range(student_pixels.shape[0]):
        logits, descriptors = [], []
        for v, w, mask in ((student_pixels, student_words, masks[0]), (teacher_pixels, teacher_words, masks[1])):
            v = (v.flatten(2).mT if v.dim() == 4 else v)[b][valid(pixel_mask, b, v)]  # (n, D)
            w = w[b][valid(mask, b, w)]  # (t, D)
            width = v.shape[1] ** 0.5
            logits.append(similarities(v, w, "cosine") if similarity == "cosine" else v @ w.T / width)
            a = (logits[-1] / pair(temperature)[len(descriptors)]).softmax(1)
            descriptors.append((a / a.sum(0)).T @ v)  # (t, D)
        value = cross_modal_sample(*logits, temperature, terms)
        if "word_descriptor" in terms:
            value = (
                value + terms["word_descriptor"] * kl(*(similarities(d, d, "cosine") for d in descriptors), 0.1).mean()
            )
        out.append(value)
        seen.append(descriptors)
    if "word_channel" in terms:
        channels = [torch.cat(d).T for d in zip(*seen, strict=True)]  # (D, Σ t)
        pooled = kl(*(similarities(x, x, "cosine") for x in channels), 0.1).mean()
        out = [value + terms["word_channel"] * pooled for value in out]
    return torch.stack(out)


def cross_modal_kd_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    terms: Mapping[str, float],
    temperature: Temperature = 1.0,
    word_mask: WordMask = None,
    pixel_mask: Tensor | None = None,
) -> Tensor:
    masks = word_mask if isinstance(word_mask, tuple) else (word_mask, word_mask)
    out = []
    for b in range(student_logits.shape[0]):
        heads = []
        for m, mask in zip((student_logits, teacher_logits), masks, strict=True):
            m = m[b] if m.dim() == 4 else m[b][None]  # (heads, N, T)
            heads.append(m[:, valid(pixel_mask, b, m)][:, :, valid(mask, b, m)])
        out.append(torch.stack([cross_modal_sample(*h, temperature, terms) for h in zip(*heads, strict=True)]).mean())
    return torch.stack(out)

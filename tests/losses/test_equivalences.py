"""Losses of other libraries and papers, written from their definitions and compared with fastkd's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastkd.losses import (
    FeatureKD,
    attention_kd,
    channel_attention_kd,
    channel_distribution_kd,
    channel_kd,
    feature_kd,
    logit_kd,
    pixel_relation_kd,
)
from fastkd.ops.relation import relation
from fastkd.ops.softmax_kl import softmax_kl

B, C, H, W = 3, 5, 4, 8
N = H * W


@pytest.fixture
def maps():
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, C, H, W, generator=g, dtype=torch.float64) for _ in range(2))


def same(got, want, student):
    """Check that loss and gradient are equal."""
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, student, retain_graph=True)[0],
        torch.autograd.grad(want, student, retain_graph=True)[0],
    )


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_mmrazor_channel_wise_divergence(maps, tau):
    student, teacher = maps[0].requires_grad_(), maps[1]
    loss_weight = 3.0
    t, s = teacher.reshape(-1, N), student.reshape(-1, N)
    p = F.softmax(t / tau, 1)
    divergence = (p * F.log_softmax(t / tau, 1) - p * F.log_softmax(s / tau, 1)).sum() * tau**2
    want = loss_weight * divergence / (B * C)
    same(loss_weight * channel_distribution_kd(student, teacher, temperature=tau), want, student)


def test_torch_distiller_cwd(maps):
    student, teacher, tau = maps[0].requires_grad_(), maps[1], 4.0
    p_s = (student.reshape(B, C, -1) / tau).softmax(-1)
    p_t = (teacher.reshape(B, C, -1) / tau).softmax(-1)
    want = F.kl_div(p_s.log(), p_t, reduction="sum") / (B * C) * tau**2
    same(channel_distribution_kd(student, teacher, temperature=tau), want, student)


def test_fp16_does_not_underflow_unlike_log_of_softmax():
    student, teacher = torch.tensor([[[0.0, 40.0]]]).half(), torch.tensor([[[40.0, 0.0]]]).half()
    theirs = F.kl_div(student.softmax(-1).log(), teacher.softmax(-1), reduction="sum")
    assert not torch.isfinite(theirs)
    torch.testing.assert_close(channel_distribution_kd(student, teacher, temperature=1.0).item(), 40.0)


def test_ickd(maps):
    """ICKD, CIFAR code: inter-channel correlation matrices with normalised rows."""
    student, teacher = maps[0].requires_grad_(), maps[1]

    def correlation(x):
        x = x.reshape(B, C, -1)
        return F.normalize(torch.bmm(x, x.transpose(1, 2)), dim=2)

    difference = correlation(student) - correlation(teacher)
    want = (difference * difference).reshape(B, -1).sum() / (C * B)
    ours = channel_kd(student, teacher, similarity="dot", distance="row_cosine")
    same(ours, want, student)
    torchdistill = (difference * difference).sum() / (C * B) / B  # divides by the batch once more
    same(ours / B, torchdistill, student)


def test_cirkd_mini_batch_pixel_term(maps):
    """CIRKD, after its 4×4 average pool: every ordered pair of images, a softmax per pair, no τ²."""
    tau = 0.1
    student, teacher = maps[0].requires_grad_(), maps[1]
    pooled_s, pooled_t = (F.avg_pool2d(x, 4, 4) for x in (student, teacher))
    s, t = (F.normalize(x, dim=1).permute(0, 2, 3, 1).reshape(B, -1, C) for x in (pooled_s, pooled_t))
    want = 0.0
    for i in range(B):
        for j in range(B):
            log_p = F.log_softmax(s[i] @ s[j].T / tau, 1)
            want = want + F.kl_div(log_p, F.softmax(t[i] @ t[j].T / tau, 1), reduction="batchmean")
    same(pixel_relation_kd(pooled_s, pooled_t, cross_image=True, temperature=tau), want / B**2, student)


def test_cirkd_v2_channel_term_of_own_image_pairs(maps):
    tau = 0.1
    student, teacher = maps[0].requires_grad_(), maps[1]
    s, t = (F.normalize(x.reshape(B, C, -1), dim=2) for x in (student, teacher))
    want = 0.0
    for i in range(B):
        log_p = F.log_softmax(s[i] @ s[i].T / tau, 1)
        want = want + F.kl_div(log_p, F.softmax(t[i] @ t[i].T / tau, 1), reduction="batchmean")
    same(channel_kd(student, teacher, temperature=tau), want / B, student)


def test_skds_pair_wise(maps):
    """SKDS, on max-pooled maps: values agree; gradients do not, since SKDS detaches the norm."""
    student, teacher = (F.max_pool2d(x, 2, 2) for x in maps)
    student.requires_grad_()

    def similarity(x, detach):
        norm = x.square().sum(1, keepdim=True).sqrt()
        x = (x / (norm.detach() if detach else norm)).flatten(2)
        return torch.einsum("icm,icn->imn", x, x)

    def theirs(detach):
        nodes = student.shape[2] * student.shape[3]
        return (similarity(teacher, detach) - similarity(student, detach)).square().sum() / nodes**2 / B

    ours = pixel_relation_kd(student, teacher, distance="mse")
    torch.testing.assert_close(ours, theirs(detach=True))
    same(ours, theirs(detach=False), student)
    detached = torch.autograd.grad(theirs(detach=True), student)[0]
    assert not torch.allclose(
        detached, torch.autograd.grad(pixel_relation_kd(student, teacher, distance="mse"), student)[0]
    )


def test_danet_channel_attention(maps):
    """DANet's softmax(rowmax(E) − E) equals softmax(−E)."""
    student, teacher = (x * 0.3 for x in maps)
    student.requires_grad_()

    def attention(x):
        x = x.reshape(B, C, -1)
        energy = x @ x.transpose(1, 2)
        return F.softmax(energy.max(-1, keepdim=True)[0].expand_as(energy) - energy, -1)

    p_s, p_t = attention(student), attention(teacher)
    want = (p_t * (p_t.log() - p_s.log())).sum(-1).mean()
    same(channel_kd(student, teacher, similarity="dot", negate=True, temperature=1.0), want, student)


def test_similarity_preserving(maps):
    """SP relates the samples of a batch: ``relation`` with samples as rows."""
    student, teacher = maps[0].requires_grad_(), maps[1]
    g_s, g_t = (F.normalize(x.reshape(B, -1) @ x.reshape(B, -1).T, dim=1) for x in (student, teacher))
    want = (g_t - g_s).square().sum() / B**2
    rows = relation(student.reshape(1, B, -1), teacher.reshape(1, B, -1), similarity="dot", distance="row_cosine")
    same(rows.sum() / B**2, want, student)


def test_nst_polynomial_kernel(maps):
    """Squared inner products between channel maps of norm 1 equal pixel relations."""
    student, teacher = maps[0].requires_grad_(), maps[1]
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    kernel = lambda a, b: (a @ b.mT).square().mean((1, 2))
    want = (kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)).mean()
    ours = pixel_relation_kd(s, t, similarity="dot", distance="mse") * N**2 / C**2
    same(ours, want, student)


def test_centred_cosine_is_pearson_correlation(maps):
    student, teacher = maps
    r_s, r_t = (torch.stack([torch.corrcoef(x) for x in m.flatten(2)]) for m in (student, teacher))
    want = (r_s - r_t).square().mean()
    torch.testing.assert_close(channel_kd(student, teacher, centered=True, distance="mse"), want)


def test_torch_kl_div_batchmean(maps):
    student, teacher, tau = maps[0].requires_grad_(), maps[1], 2.0
    s, t = student.reshape(B * C, N), teacher.reshape(B * C, N)
    want = F.kl_div(F.log_softmax(s / tau, 1), F.softmax(t / tau, 1), reduction="batchmean") * tau**2
    same(softmax_kl(s[None], t[None], temperature=tau).mean() * tau**2, want, student)
    by_pixel = F.kl_div(
        F.log_softmax(student.movedim(1, -1).reshape(-1, C) / tau, 1),
        F.softmax(teacher.movedim(1, -1).reshape(-1, C) / tau, 1),
        reduction="batchmean",
    )
    same(logit_kd(student, teacher, temperature=tau), by_pixel * tau**2, student)


def test_channel_relation_is_invariant_to_pixel_permutations(maps):
    """A permutation of the pixels leaves the loss unchanged."""
    student, teacher = maps
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    shuffled = student.flatten(2)[:, :, order]
    torch.testing.assert_close(channel_kd(shuffled, teacher.flatten(2)), channel_kd(student, teacher))


def test_mmrazor_kl_divergence_and_torchdistill_kd_loss():
    g = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(B, C, generator=g, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    labels, tau, alpha = torch.tensor([0, 4, 2]), 3.0, 0.3
    kl = F.kl_div(F.log_softmax(student / tau, 1), F.softmax(teacher / tau, 1), reduction="batchmean")
    same(2.0 * logit_kd(student, teacher, temperature=tau), 2.0 * tau**2 * kl, student)
    hard = F.cross_entropy(student, labels)
    ours = alpha * hard + (1 - alpha) * logit_kd(student, teacher, temperature=tau)
    same(ours, alpha * hard + (1 - alpha) * tau**2 * kl, student)


def test_modelopt_logits_distillation(maps):
    """ModelOpt, classes in the last dimension; its reduction "mean" also divides by the number of classes."""
    student, teacher, tau = maps[0].flatten(2).mT.contiguous().requires_grad_(), maps[1].flatten(2).mT, 2.0
    log_p, q = F.log_softmax(student / tau, -1).flatten(0, 1), F.softmax(teacher / tau, -1).flatten(0, 1)
    ours = logit_kd(student, teacher, temperature=tau, class_dim=-1)
    same(ours, F.kl_div(log_p, q, reduction="batchmean") * tau**2, student)
    same(ours / C, F.kl_div(log_p, q, reduction="none").mean() * tau**2, student)


def test_deit_soft_distillation():
    """DeiT divides the sum by all elements, not by the samples."""
    g = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(B, C, generator=g, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    log_p, log_q = F.log_softmax(student / 3.0, 1), F.log_softmax(teacher / 3.0, 1)
    want = F.kl_div(log_p, log_q, reduction="sum", log_target=True) * 9.0 / student.numel()
    same(logit_kd(student, teacher, temperature=3.0) / C, want, student)


def test_cirkd_kd(maps):
    student, teacher, tau = maps[0].requires_grad_(), maps[1], 1.5
    pixels = lambda x: x.permute(0, 2, 3, 1).reshape(-1, C)
    kl = F.kl_div(F.log_softmax(pixels(student) / tau, 1), F.softmax(pixels(teacher) / tau, 1), reduction="batchmean")
    same(logit_kd(student, teacher, temperature=tau), kl * tau**2, student)


def test_cirkd_memory_term(maps):
    """CIRKD's pixel and region queues: pixels against stored teacher embeddings, τ = 0.1, softened by τ_kd."""
    student, teacher, tau, tau_kd = maps[0].requires_grad_(), maps[1], 0.1, 2.0
    g = torch.Generator().manual_seed(2)
    bank = F.normalize(torch.randn(9, C, generator=g, dtype=torch.float64), dim=1)
    pixels = lambda x: F.normalize(x, dim=1).permute(0, 2, 3, 1).reshape(-1, C)
    z_s, z_t = pixels(student) @ bank.T / tau, pixels(teacher) @ bank.T / tau
    want = F.kl_div(F.log_softmax(z_s / tau_kd, 1), F.softmax(z_t / tau_kd, 1), reduction="batchmean") * tau_kd**2
    logits = lambda x: torch.einsum("bchw,qc->bqhw", F.normalize(x, dim=1), bank) / tau
    same(logit_kd(logits(student), logits(teacher), temperature=tau_kd), want, student)


def test_lightly_train_v3(maps):
    """LightlyTrain's distillationv3: samples against a queue of teacher embeddings, and tokens of one image."""
    student, teacher, tau = maps[0].requires_grad_(), maps[1], 0.07
    g = torch.Generator().manual_seed(2)
    queue = F.normalize(torch.randn(9, C, generator=g, dtype=torch.float64), dim=1)
    embed = lambda x: F.normalize(x.mean((2, 3)), dim=1)
    kl = lambda s, t: F.kl_div(F.log_softmax(s / tau, -1), F.softmax(t / tau, -1), reduction="batchmean")
    z_s, z_t = embed(student) @ queue.T, embed(teacher) @ queue.T
    same(logit_kd(z_s, z_t, temperature=tau) / tau**2, kl(z_s, z_t), student)
    tokens = lambda x: F.normalize(x.flatten(2).mT, dim=-1)  # (B, N, C)
    s, t = ((x @ x.mT).flatten(0, 1) for x in (tokens(student), tokens(teacher)))
    same(pixel_relation_kd(student, teacher, temperature=tau), kl(s, t), student)


@pytest.mark.parametrize("image_level", [True, False])
def test_dinov3_gram_loss(maps, image_level):
    student, teacher = maps[0].requires_grad_(), maps[1]

    def similarities(x):
        x = F.normalize(x.flatten(2).mT, dim=-1)
        x = x if image_level else x.flatten(0, 1)
        return x @ x.mT

    want = F.mse_loss(similarities(student), similarities(teacher))
    ours = pixel_relation_kd(student, teacher, distance="mse", cross_image=not image_level)
    same(ours, want, student)


def test_minilmv2_relations():
    """MiniLMv2: Q–Q, K–K and V–V relations of networks with 4 heads of 6 and 3 heads of 16, in 12 relation heads."""
    g = torch.Generator().manual_seed(3)
    tokens, heads = 7, 12
    student = [torch.randn(B, 4, tokens, 6, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    teacher = [torch.randn(B, 3, tokens, 16, generator=g, dtype=torch.float64) for _ in range(3)]

    def log_relation(x):
        x = x.transpose(1, 2).reshape(B, tokens, heads, -1).transpose(1, 2)  # (B, R, N, d)
        return F.log_softmax(x @ x.mT / x.shape[-1] ** 0.5, -1)

    want = sum(
        F.kl_div(log_relation(s).flatten(0, 2), log_relation(t).exp().flatten(0, 2), reduction="batchmean")
        for s, t in zip(student, teacher, strict=True)
    )
    ours = sum(attention_kd(s, s, t, t, relation_heads=heads) for s, t in zip(student, teacher, strict=True))
    for tensor in student:
        same(ours, want, tensor)


@pytest.mark.parametrize("distance", ["cka", "mse"])
def test_cskd_channel_attention(maps, distance):
    """CSKD's CAM: DANet's attention with a residual, compared by the biased CKA or by squared differences."""
    student, teacher, tau, gamma = maps[0].requires_grad_(), maps[1], 4.0, 0.5

    def attended(x):
        x = x.flatten(2)
        energy = x @ x.mT
        attention = F.softmax((energy.max(-1, keepdim=True)[0] - energy) / tau, -1)
        return gamma * attention @ x + x  # (B, C, N)

    z_s, z_t = attended(student), attended(teacher)
    if distance == "mse":
        want = F.mse_loss(z_s, z_t)
    else:
        centre = torch.eye(B, dtype=torch.float64) - 1 / B
        k_s, k_t = (centre @ z.flatten(1) @ z.flatten(1).T @ centre for z in (z_s, z_t))
        want = -((k_s * k_t).sum() / (k_s.square().sum() * k_t.square().sum()).sqrt()).log()  # CSKD adds 1e-8 to CKA
    options = {"similarity": "dot", "negate": True, "temperature": tau, "gamma": gamma, "distance": distance}
    same(channel_attention_kd(student, teacher, debiased=distance != "cka", **options), want, student)


def test_mmrazor_pkd(maps):
    """mmrazor's PKD: its deviation divides by n − 1, ours by n."""
    student, teacher, n = maps[0].requires_grad_(), maps[1], B * N

    def standardised(x):
        x = x.permute(1, 0, 2, 3).reshape(C, -1)
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)

    want = F.mse_loss(standardised(student), standardised(teacher)) / 2
    ours = feature_kd(student, teacher, normalize="standardize") / 2 * (n - 1) / n
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=0)  # 1e-6 is added to another deviation
    for got, grad in zip(*(torch.autograd.grad(loss, student) for loss in (ours, want)), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-8)


def test_mmrazor_l2_loss(maps):
    """mmrazor's L2Loss(normalize=False): divided by the samples, or with div_element by the elements."""
    student, teacher = maps[0].requires_grad_(), maps[1]
    squares = (student - teacher).square().sum()
    same(feature_kd(student, teacher), squares / student.numel(), student)
    same(feature_kd(student, teacher) * C * N, squares / B, student)


def test_cirkd_fitnet(maps):
    teacher = torch.cat([maps[1], maps[0]], 1)
    loss = FeatureKD(C, 2 * C).double()
    conv = next(loss.parameters())
    want = (F.conv2d(maps[0], conv[:, :, None, None]) - teacher).square().mean()
    same(loss(maps[0], teacher), want, conv)


def test_distilbert_cosine(maps):
    """The cosine loss of DistilBERT on the hidden states of valid tokens, (B, N, D)."""
    student, teacher = maps[0].flatten(2).mT.contiguous().requires_grad_(), maps[1].flatten(2).mT
    mask = torch.rand(B, N, generator=torch.Generator().manual_seed(4)) > 0.3
    want = F.cosine_embedding_loss(student[mask], teacher[mask], torch.ones(int(mask.sum())))
    image = lambda x: x.mT.unsqueeze(-1)  # (B, D, N, 1)
    ours = feature_kd(image(student), image(teacher), distance="cosine", pixel_mask=mask)
    torch.testing.assert_close(ours, want)
    for got, grad in zip(*(torch.autograd.grad(loss, student) for loss in (ours, want)), strict=True):
        torch.testing.assert_close(got, grad)


def test_dist_pearson_per_pixel_has_no_gradient_for_two_classes():
    """fastkd has no such term: over two classes a correlation is ±1 for all logits."""
    logits = torch.randn(2, 10, dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    other = torch.randn(2, 10, dtype=torch.float64).softmax(0)
    correlation = F.cosine_similarity(p - p.mean(0), other - other.mean(0), dim=0)
    torch.testing.assert_close(correlation.abs(), torch.ones(10, dtype=torch.float64))
    assert torch.autograd.grad(correlation.sum(), logits)[0].abs().max() < 1e-9

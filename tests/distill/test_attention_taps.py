"""Attention taps: the recorded queries, keys and biases give the map that the module itself computes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import Distiller, Taps, Term
from fastkd.distill import AttentionTap, TappedAttention, tapped_attention_kd
from fastkd.losses import attention_kd


def map_of(attention: TappedAttention) -> Tensor:
    """Return softmax(scale · q kᵀ + bias), (B, heads, N, M)."""
    scale = attention.q.shape[-1] ** -0.5 if attention.scale is None else attention.scale
    logits = scale * attention.q @ attention.k.mT
    return (logits if attention.bias is None else logits + attention.bias).softmax(-1)


def vit(**options: Any) -> nn.Module:
    timm = pytest.importorskip("timm", reason="needs the [ris] extra")
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    torch.manual_seed(0)
    return timm.models.VisionTransformer(**(sizes | options)).eval()


def dinov3() -> nn.Module:
    """A ViT with rotary embeddings of the patches, and CLS and register tokens before them."""
    timm = pytest.importorskip("timm", reason="needs the [ris] extra")
    torch.manual_seed(0)
    return timm.models.Eva(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0, use_abs_pos_emb=False,
        use_rot_pos_emb=True, num_reg_tokens=4, qkv_fused=True, rope_type="dinov3"
    ).eval()  # fmt: skip


def swin() -> nn.Module:
    timm = pytest.importorskip("timm", reason="needs the [ris] extra")
    torch.manual_seed(0)
    return timm.models.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,), num_classes=0
    ).eval()


IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "path", "size"),
    [
        (lambda: vit(qk_norm=True), "blocks.1.attn", 16),
        (dinov3, "blocks.1.attn", 16),
        (swin, "layers.0.blocks.0.attn", 32),
        (swin, "layers.0.blocks.1.attn", 32),  # shifted windows, with a mask
    ],
    ids=["ViT with norms", "DINOv3", "Swin", "Swin shifted"],
)
def test_map_of_a_timm_module(make: Callable[[], nn.Module], path: str, size: int) -> None:
    model, images = make(), IMAGES[..., :size, :size]
    attention = model.get_submodule(path)
    taps = Taps(model, {"attention": AttentionTap(path)})
    fused = attention.fused_attn
    with torch.no_grad():
        model(images)
        assert attention.fused_attn is fused
        found = taps["attention"]
        taps.close()
        maps: list[Tensor] = []
        attention.attn_drop.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
        attention.fused_attn = False
        model(images)
    torch.testing.assert_close(map_of(found), maps[0], rtol=1e-4, atol=1e-6)


class Encoder(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        options = {"key_padding_mask": padding, "need_weights": self.need_weights, "average_attn_weights": False}
        return self.attention(x, x, x, **options)


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
def test_map_of_torch_s_own_module(grad: type) -> None:
    x, padding = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    model, want = Encoder(False).eval(), Encoder(True).eval()(x, padding)
    with grad(), Taps(model, {"attention": AttentionTap("attention")}) as taps:
        output, _ = model(x, padding)
        torch.testing.assert_close(map_of(taps["attention"]), want[1])
        torch.testing.assert_close(output, want[0])
        assert taps["attention"].q.requires_grad == (grad is torch.enable_grad)
    layer = nn.TransformerEncoderLayer(12, 3, batch_first=True).eval()
    with grad(), Taps(layer, {"attention": AttentionTap("self_attn")}) as taps:
        layer(x, src_key_padding_mask=padding)
        assert taps["attention"].q.shape == (2, 3, 5, 4)
    taps = Taps(want := Encoder(True), {"attention": AttentionTap("attention")})
    with taps, pytest.raises(RuntimeError, match=r"MultiheadAttention computed no attention .*need_weights=False"):
        want(x, padding)


def bert(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs the [ris] extra")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32
    )
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config, **options).eval()


def test_map_of_a_transformers_module() -> None:
    """BERT, with padding in its key mask."""
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
    }
    model, eager = bert(attn_implementation="sdpa"), bert(attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    with torch.no_grad(), Taps(model, {"attention": AttentionTap("encoder.layer.1.attention.self")}) as taps:
        model(**inputs)
        want = eager(**inputs, output_attentions=True).attentions[1]
        torch.testing.assert_close(map_of(taps["attention"]), want, rtol=1e-4, atol=1e-6)
    message = r"tap 'attention': BertSelfAttention computed no attention.*sdpa"
    taps = Taps(eager, {"attention": AttentionTap("encoder.layer.1.attention.self")})
    with taps, pytest.raises(RuntimeError, match=message):
        eager(**inputs)


@pytest.mark.parametrize(
    ("config", "path", "options"),
    [
        ("DINOv3ViTConfig", "model.layer.1.attention", {"num_hidden_layers": 2, "hidden_size": 24, "patch_size": 8,
         "num_attention_heads": 3, "intermediate_size": 32, "num_register_tokens": 4}),
        ("SwinConfig", "encoder.layers.0.blocks.1.attention",
         {"patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}),
    ],
    ids=["DINOv3", "Swin shifted"],
)  # fmt: skip
def test_map_of_a_vision_model_of_transformers(config: str, path: str, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the [ris] extra")
    make = lambda kind: transformers.AutoModel.from_config(
        getattr(transformers, config)(image_size=32, **options), attn_implementation=kind
    ).eval()
    eager = make("eager")
    if not eager._supports_sdpa:
        pytest.skip("this transformers has no fused attention for the model")
    model = make("sdpa")
    eager.load_state_dict(model.state_dict())
    with torch.no_grad(), Taps(model, {"attention": AttentionTap(path)}) as taps:
        model(IMAGES)
        want = eager(IMAGES, output_attentions=True).attentions[-1]
        torch.testing.assert_close(map_of(taps["attention"]), want, rtol=1e-4, atol=1e-6)


class Grouped(nn.Module):
    """An attention with two query heads per key head, one bool mask, and its own scale."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.project, self.fails = nn.Linear(8, 16), fails

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in self.project(x).split((8, 4, 4), -1))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
        if self.fails:
            raise OSError("broken")
        return out


def test_grouped_queries_bool_masks_and_scales() -> None:
    model, x = nn.Sequential(Grouped()), torch.randn(2, 5, 8)
    with Taps(model, {"attention": AttentionTap("0")}) as taps:
        out = model(x)
        found = taps["attention"]
    assert found.q.shape == found.k.shape == (2, 2, 5, 4)
    v = model[0].project(x)[..., 12:].unsqueeze(1)
    torch.testing.assert_close(map_of(found) @ v, out)
    assert map_of(found).triu(1).count_nonzero() == 0


def test_tokens_select_queries_keys_and_biases() -> None:
    model, x = nn.Sequential(Grouped()), torch.randn(2, 6, 8)
    paths = {name: AttentionTap("0", tokens) for name, tokens in (("all", ":"), ("patches", "3:"), ("cls", "0:1,3:"))}
    with Taps(model, paths) as taps:
        model(x)
        for name, kept in (("patches", [3, 4, 5]), ("cls", [0, 3, 4, 5])):
            whole, part = taps["all"], taps[name]
            assert torch.equal(part.q, whole.q[:, :, kept])
            assert torch.equal(part.k, whole.k[:, :, kept])
            assert torch.equal(part.bias, whole.bias[kept][:, kept])
    for tokens in ("5", "a:", "1:2:3", "", None):
        with pytest.raises(ValueError, match="tap 'attention': tokens: expected slices"):
            Taps(model, {"attention": AttentionTap("0", tokens)})
    with (
        Taps(model, {"attention": AttentionTap("0", "9:")}),
        pytest.raises(ValueError, match="selects none of 6 tokens"),
    ):
        model(x)


def test_recording_ends_with_an_exception() -> None:
    modes = torch._C._len_torch_function_stack()
    broken, model = nn.Sequential(Grouped(fails=True)), nn.Sequential(Grouped())
    with Taps(broken, {"attention": AttentionTap("0")}) as taps:
        with pytest.raises(OSError, match="broken"):
            broken(torch.randn(1, 5, 8))
        before = taps["attention"]
        model(torch.randn(1, 5, 8))  # another model's attention
        assert taps["attention"] is before
    assert torch._C._len_torch_function_stack() == modes


def test_tapped_models_can_be_copied_and_pickled() -> None:
    model = nn.Sequential(Grouped())
    with Taps(model, {"attention": AttentionTap("0")}) as taps:
        model(torch.randn(1, 5, 8))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            found = taps["attention"]
            other(torch.randn(1, 5, 8))
            assert taps["attention"] is found


def test_loss_of_two_tapped_attentions() -> None:
    """A term of ViTs with different prefix tokens and heads; the teacher's queries and keys are constants."""
    student, teacher = vit(num_heads=2, embed_dim=16), vit(reg_tokens=4).requires_grad_(False)
    taps = [{"last": AttentionTap("blocks.1.attn", tokens)} for tokens in ("1:", "5:")]
    term = Term(tapped_attention_kd, "last", kwargs={"relation_heads": 2, "temperature": 0.5})
    distiller = Distiller(student, teacher, lambda output, batch: output.square().mean(), [term], inputs=("x",),
                          student_taps=taps[0], teacher_taps=taps[1])  # fmt: skip
    batch = {"x": IMAGES[..., :16, :16]}
    distiller.check(batch)
    out = distiller(batch)
    out.loss.backward()
    assert student.blocks[1].attn.qkv.weight.grad.abs().max() > 0
    with torch.no_grad(), Taps(student, taps[0]) as s, Taps(teacher, taps[1]) as t:
        student(batch["x"]), teacher(batch["x"])
        features = (s["last"].q, s["last"].k, t["last"].q, t["last"].k)
    torch.testing.assert_close(
        out.terms["tapped_attention_kd"].detach(), attention_kd(*features, relation_heads=2, temperature=0.5)
    )


class Causal(nn.Module):
    """Return the causal map itself, of queries and keys in one tensor (B, N + M, D)."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.queries = queries

    def forward(self, x: Tensor) -> Tensor:
        q, k = x[:, None, : self.queries], x[:, None, self.queries :]
        return F.scaled_dot_product_attention(q, k, torch.eye(k.shape[2]).expand(len(x), 1, -1, -1), is_causal=True)


@pytest.mark.parametrize(
    ("queries", "keys", "tokens", "kept"),
    [(3, 5, ":", ...), (5, 3, ":", ...), (4, 4, "1:", [1, 2, 3]), (4, 4, "2:,0:1", [2, 3, 0])],
)
def test_causal_maps_are_those_of_the_module(queries: int, keys: int, tokens: str, kept: Any) -> None:
    """torch aligns the first query with the first key; tokens may be kept in any order."""
    model, maps, tapped = nn.Sequential(Causal(queries)), [], []
    for seed in range(2):
        x = torch.randn(2, queries + keys, 4, generator=torch.Generator().manual_seed(seed))
        with Taps(model, {"map": AttentionTap("0", tokens)}) as taps:
            part = model(x)[:, :, kept][..., kept]  # (B, 1, N, M)
            tapped.append(taps["map"])
        maps.append(part / part.sum(-1, keepdim=True))
    student, teacher = maps
    want = torch.where(teacher > 0, teacher * (teacher / student).log(), 0).sum(-1).mean()
    torch.testing.assert_close(tapped_attention_kd(*tapped), want)


def test_biases_scales_and_causality_are_passed_on() -> None:
    q, k, bias = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), torch.randn(2, 3, 3, requires_grad=True)
    student = TappedAttention(q, k, bias, 0.3, True)
    teacher = TappedAttention(k, q, None, None, True)
    want = attention_kd(q, k, k, q, scale=(0.3, None), student_bias=bias.detach(), causal=True)
    torch.testing.assert_close(tapped_attention_kd(student, teacher), want)
    with pytest.raises(ValueError, match="causal: differs, True for the student and False for the teacher"):
        tapped_attention_kd(student, TappedAttention(k, q, None, None, False))
    with pytest.raises(TypeError, match=r"teacher: expected a TappedAttention, .* got Tensor"):
        tapped_attention_kd(student, q)


def test_recorded_teachers_hold_queries_and_keys() -> None:
    """A teacher cache stores tensors, so its terms select them one by one."""
    student, teacher = vit(), vit(reg_tokens=4).requires_grad_(False)
    options = {"inputs": ("x",), "student_taps": {"last": AttentionTap("blocks.1.attn", "1:")},
               "teacher_taps": {"last": AttentionTap("blocks.1.attn", "5:")}}  # fmt: skip
    task, batch = lambda output, batch: output.square().mean(), {"x": IMAGES[..., :16, :16]}
    distiller = Distiller(student, teacher, task, [Term(attention_kd, ("last.q", "last.k"))], **options)
    recorded = distiller.record_teacher(batch)
    assert {path: tuple(x.shape) for path, x in recorded.items()} == {"last.q": (2, 3, 16, 8), "last.k": (2, 3, 16, 8)}
    assert distiller.teacher_tap_targets == {"last": ("blocks.1.attn", "5:")}
    whole = Distiller(student, teacher, task, [Term(tapped_attention_kd, "last")], **options)
    torch.testing.assert_close(distiller(batch).loss, whole(batch).loss)

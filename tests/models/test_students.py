"""Students: early fusion in every backbone family at any image size, and the sizes of the presets."""

from __future__ import annotations

import math
import re

import pytest
import torch
from tiny_models import TEXT

timm = pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

from fastkd.models import RISConfig, RISModel, list_presets, preset  # noqa: E402
from fastkd.models.backbone import StagedBackbone  # noqa: E402

FINE, LATER = (0, 1, 2, 3), (1, 2, 3, 4)
SWIN = {
    "embed_dim": 8,
    "depths": [1, 2, 1, 1],  # the second block shifts its windows
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "img_size": 64,
    "strict_img_size": False,
}
FAMILIES = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN, FINE),
    "swinv2": ("swinv2_tiny_window8_256", SWIN, FINE),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}, FINE),
    "convnextv2": ("convnextv2_atto", {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}, FINE),
    "mobilenetv4": ("mobilenetv4_conv_small_035", {}, LATER),
    "mobilenetv3": ("mobilenetv3_small_050", {}, LATER),
    "efficientnet": ("tinynet_e", {}, LATER),
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24], "stem_width": 8}, LATER),
    "resnet bottleneck": ("resnet50", {"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 12], "stem_width": 8}, LATER),
    "efficientvit": (
        "efficientvit_b0",
        {"widths": [4, 8, 16, 16, 16], "depths": [1, 1, 1, 1, 1], "head_dim": 8},
        FINE,
    ),
    "fastvit": ("fastvit_t8", {"layers": [1, 1, 1, 1], "embed_dims": [8, 16, 32, 64]}, FINE),
    "tiny_vit": (
        "tiny_vit_5m_224",
        {"embed_dims": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_sizes": [4] * 4},
        FINE,
    ),
    "repvit": ("repvit_m0_9", {"embed_dim": [8, 16, 16, 24], "depth": [1, 1, 1, 1]}, FINE),
    "pvt": (
        "pvt_v2_b0",
        {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
        FINE,
    ),
}

ODD = [(65, 79), (33, 47)]


def sizes(family: str) -> list[tuple[int, int]]:
    """Return image sizes that timm accepts for a family; Swin needs multiples of its patch size."""
    return [(40, 76), (64, 36)] if family.startswith("swin") else ODD


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_equals_timm_at_odd_sizes(family):
    """With an identity hook the maps equal those of timm's features_only network."""
    name, args, out_indices = FAMILIES[family]
    torch.manual_seed(0)
    ours = StagedBackbone(name, args, out_indices).eval()
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    theirs = timm.create_model(name, features_only=True, out_indices=out_indices, **plain).eval()
    values = ours.state_dict().values()  # same modules and order, other names
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    for height, width in sizes(family):
        image = torch.randn(1, 3, height, width)
        with torch.no_grad():
            expected, got = theirs(image), ours(image, lambda i, x: (x, x))
        if str(getattr(theirs, "output_fmt", "NCHW")).endswith("NHWC"):
            expected = [x.permute(0, 3, 1, 2) for x in expected]
        assert len(got) == len(out_indices)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_early_fusion_at_any_size(family):
    """Changing a word changes every stage, and gradients reach the first layer of the backbone."""
    name, args, out_indices = FAMILIES[family]
    torch.manual_seed(0)
    config = RISConfig(backbone=name, backbone_args=args, out_indices=out_indices, text=TEXT, decoder_width=8)
    model = RISModel(config).eval()
    ids, other = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 9, 3]])
    for height, width in ODD:
        image = torch.randn(1, 3, height, width)
        out, changed = model(image, ids), model(image, other)
        assert out.logits.shape == (1, 2, height, width)
        for stage, stride, channels in zip(out.stages, model.backbone.strides, model.backbone.channels, strict=True):
            rows, columns = (math.floor(s / stride) for s in (height, width))
            assert stage.shape[:2] == (1, channels)
            assert stage.shape[2] - rows in (0, 1)
            assert stage.shape[3] - columns in (0, 1)
        walked = model.backbone(image, lambda i, x: (x, x))
        for i, (a, b) in enumerate(zip(out.stages, changed.stages, strict=True)):
            assert a.isfinite().all()
            assert not torch.equal(a, b), f"stage {i} ignores the sentence"
        assert [m.shape for m in walked] == [m.shape for m in out.stages]
    out.logits.square().mean().backward()
    first = next(model.backbone.parameters())
    assert first.grad is not None
    assert first.grad.isfinite().all()


@pytest.mark.parametrize("family", ["swin", "swinv2"])
@pytest.mark.parametrize(("height", "width"), [(33, 47), (1, 3)])
def test_swin_pads_to_multiples_of_its_patches(family, height, width):
    name, args, out_indices = FAMILIES[family]
    torch.manual_seed(0)
    backbone = StagedBackbone(name, args, out_indices).eval()
    image = torch.randn(1, 3, height, width)
    padded = torch.nn.functional.pad(image, (0, -width % 4, 0, -height % 4))
    with torch.no_grad():
        for a, b in zip(*(backbone(x, lambda i, m: (m, m)) for x in (image, padded)), strict=True):
            assert torch.equal(a, b)
            assert a.isfinite().all()


@pytest.mark.parametrize("family", ["mobilenetv4", "efficientnet", "tiny_vit"])
def test_fused_map_feeds_the_next_stage(family):
    name, args, out_indices = FAMILIES[family]
    torch.manual_seed(0)
    backbone = StagedBackbone(name, args, out_indices).eval()
    image = torch.randn(1, 3, 65, 79)
    plain = backbone(image, lambda i, x: (x, x))
    changed = backbone(image, lambda i, x: (x, x + (i == 1)))
    assert torch.equal(plain[1], changed[1])
    assert not torch.allclose(plain[2], changed[2])


def test_rejects_backbones_that_cannot_be_fused():
    with pytest.raises(ValueError, match=r"'hrnet_w18_small' is not a chain of modules.*Swin, ConvNeXt"):
        StagedBackbone("hrnet_w18_small", {}, FINE)
    with pytest.raises(ValueError, match=r"'sam2_hiera_tiny' .*has parameters \(pos_embed, pos_embed_window\) outside"):
        StagedBackbone("sam2_hiera_tiny", {}, FINE)  # walking it would silently omit the position embeddings
    lists = StagedBackbone("selecsls42", {}, (1, 2))
    with pytest.raises(ValueError, match="returns a list, not a map"):
        lists(torch.zeros(1, 3, 64, 96), lambda i, x: (x, x))
    tokens = StagedBackbone("levit_128s", {}, (0, 1))
    with pytest.raises(ValueError, match="unpack") as unpacked:
        tokens(torch.zeros(1, 3, 224, 224), lambda i, x: (x, x))
    assert "token sequences (LeViT) cannot be fused" in " ".join(unpacked.value.__notes__)
    blocks = StagedBackbone("halonet26t", {}, LATER)
    with pytest.raises(ValueError, match=r"\(64, 96\): 'stages_2' needs a map size that its blocks divide$"):
        blocks(torch.zeros(1, 3, 64, 96), lambda i, x: (x, x))
    strict = StagedBackbone(FAMILIES["swin"][0], {**SWIN, "strict_img_size": True}, FINE)
    with pytest.raises(
        ValueError, match=r"\(33, 64\): .*doesn't match model.*'strict_img_size': False.* allows any size"
    ):
        strict(torch.zeros(1, 3, 33, 64), lambda i, x: (x, x))
    fixed = StagedBackbone("coatnet_pico_rw_224", {}, (1, 2))
    with pytest.raises(RuntimeError) as raised:
        StagedBackbone("coatnet_pico_rw_224", {}, LATER)(torch.zeros(1, 3, 64, 96), lambda i, x: (x, x))
    assert "(64, 96); networks with position embeddings" in " ".join(raised.value.__notes__)
    assert len(fixed.channels) == 2
    with pytest.raises(ValueError, match=r"timm cannot build 'fastvit_t8'.*divisible by groups"):
        StagedBackbone("fastvit_t8", {"embed_dims": [8, 12, 16, 24]}, FINE)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("swin_tiny", "swin_tiny_patch4_window7_224"), ("mobilnetv4_conv_small", "mobilenetv4_conv_small")],
)
def test_unknown_backbone_suggests_close_matches(typed, offered):
    with pytest.raises(ValueError, match=rf"has no backbone '{typed}'; close matches: .*{offered}"):
        RISModel(RISConfig(backbone=typed, text=TEXT))


SIZES = {"5m": 5, "15m": 15, "30m": 30, "60m": 60}
STUDENTS = [name for name in list_presets() if name.startswith("student-")]


@pytest.mark.parametrize("name", STUDENTS)
def test_students_have_the_size_in_their_name(name):
    config = preset(name)
    with torch.device("meta"):
        model = RISModel(config)
    total = model.parameter_count()["total"]
    assert abs(total / 1e6 / SIZES[name.split("-")[1]] - 1) <= 0.2
    assert model.backbone.strides == [4, 8, 16, 32]
    stated = float(re.match(r"[\d.]+", list_presets()[name]).group())
    assert abs(total / 1e6 - stated) < 0.5


def test_students_cover_every_size_and_family():
    assert {name.removeprefix("student-") for name in STUDENTS} >= set(SIZES)
    backbones = {preset(name).backbone.split("_")[0].rstrip("0123456789") for name in STUDENTS}
    assert backbones >= {"swin", "convnext", "mobilenetv", "efficientnet", "resnet"}


@pytest.mark.parametrize("name", ["student-5m", "student-5m-mobilenet"])
def test_student_runs(name):
    torch.manual_seed(0)
    model = RISModel(preset(name)).eval()
    with torch.inference_mode():
        out = model(torch.randn(1, 3, 97, 130), torch.tensor([[101, 1996, 2417, 102]]))
    assert out.logits.shape == (1, 2, 97, 130)
    assert out.logits.isfinite().all()

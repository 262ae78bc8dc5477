"""Taps: features by module path, and errors instead of missing or stale values."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fastkd


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fusion = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        y = self.fusion(x)
        return y, {"twice": 2 * y}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.layers = nn.ModuleList(Block(4) for _ in range(3))
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        for layer in self.backbone.layers[: 2 if skip else 3]:
            x, _ = layer(x)
        return x


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_values_are_the_outputs_of_the_modules(net: Net) -> None:
    x = torch.randn(2, 4)
    with fastkd.Taps(
        net,
        {
            "last": "backbone.layers.2.fusion",
            "tuple": "backbone.layers.1",
            "first": ("backbone.layers.1", 0),
            "named": ("backbone.layers.1", "1.twice"),
        },
    ) as taps:
        out = net(x)
        assert torch.equal(taps["last"], out)
        assert taps["last"].requires_grad
        assert torch.equal(taps["tuple"][0], taps["first"])
        assert torch.equal(taps["named"], 2 * taps["first"])
        assert set(taps) == {"last", "tuple", "first", "named"}
        assert len(taps) == 4


def test_every_forward_clears_the_previous_outputs(net: Net) -> None:
    taps = fastkd.Taps(net, {"last": "backbone.layers.2.fusion"})
    a = net(torch.ones(1, 4))
    first = taps["last"]
    b = net(torch.zeros(1, 4))
    assert torch.equal(first, a)
    assert torch.equal(taps["last"], b)
    net(torch.zeros(1, 4), skip=True)
    with pytest.raises(RuntimeError, match=r"'last' never fired: module 'backbone.layers.2.fusion' did not run"):
        taps["last"]


@pytest.mark.parametrize(
    ("path", "close_match"),
    [
        ("backbone.layer.2.fusion", "backbone.layers.2.fusion"),
        ("backbone.layers.2.fusio", "backbone.layers.2.fusion"),
        ("backbone.layers.7", "backbone.layers.0"),
        ("unsed", "unused"),
    ],
)
def test_unknown_path_suggests_close_matches(net: Net, path: str, close_match: str) -> None:
    with pytest.raises(ValueError, match=rf"tap 'x': the model has no module '{path}'") as error:
        fastkd.Taps(net, {"x": path})
    assert close_match in str(error.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())  # no hook is left


def test_reading_an_empty_idle_unknown_or_closed_tap_raises(net: Net) -> None:
    taps = fastkd.Taps(net, {"last": "backbone.layers.2", "idle": "unused"})
    with pytest.raises(RuntimeError, match="the model has not run"):
        taps["last"]
    net(torch.zeros(1, 4))
    with pytest.raises(RuntimeError, match="'idle' never fired"):
        taps["idle"]
    with pytest.raises(KeyError, match=r"no tap named 'lost'.*Did you mean 'last'"):
        taps["lost"]
    taps.close()
    with pytest.raises(RuntimeError, match="closed"):
        taps["last"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("paths", [{}, None, {"a.b": "unused"}, {"": "unused"}, {3: "unused"}])
def test_rejects_bad_names(net: Net, paths: object) -> None:
    with pytest.raises(ValueError, match="name"):
        fastkd.Taps(net, paths)  # type: ignore[arg-type]


def test_rejects_a_model_or_path_of_the_wrong_type(net: Net) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got NoneType"):
        fastkd.Taps(None, {"a": "unused"})  # type: ignore[arg-type]
    for target in (3, ("unused", 0, 1), ("unused",)):
        with pytest.raises(TypeError, match=r"tap 'a': expected a module path or \(path, index\), got [3(]"):
            fastkd.Taps(net, {"a": target})  # type: ignore[dict-item]


def test_wrappers_do_not_change_paths(net: Net) -> None:
    parallel = nn.DataParallel(net)
    for path in ("backbone.layers.2.fusion", "module.backbone.layers.2.fusion"):
        with fastkd.Taps(parallel, {"last": path}) as taps:
            out = parallel(torch.ones(1, 4))
            assert torch.equal(taps["last"], out)


def test_inside_torch_compile(net: Net) -> None:
    eager = net(torch.ones(2, 4))
    taps = fastkd.Taps(net, {"last": "_orig_mod.backbone.layers.2.fusion"})
    compiled = torch.compile(net, backend="eager")
    for _ in range(2):
        compiled(torch.ones(2, 4))
        torch.testing.assert_close(taps["last"], eager)
        taps.clear()
    taps.close()
    with fastkd.Taps(compiled, {"last": "backbone.layers.2.fusion"}) as late:
        assert late.paths == {"last": "backbone.layers.2.fusion"}


def test_compiled_and_wrapped_parts(net: Net) -> None:
    eager = net(torch.ones(2, 4))
    net.backbone.layers[2] = torch.compile(net.backbone.layers[2], backend="eager")
    net.backbone.layers[1] = nn.DataParallel(net.backbone.layers[1])
    written = {
        "bare": "backbone.layers.1.fusion",
        "wrapped": "backbone.layers.1.module.fusion",
        "late": "backbone.layers.2.fusion",
        "compiled": "backbone.layers.2._orig_mod.fusion",
        "block": ("backbone.layers.2", 0),
    }
    with fastkd.Taps(net, written) as taps:
        assert taps.paths["wrapped"] == taps.paths["bare"] == "backbone.layers.1.fusion"
        assert taps.paths["compiled"] == taps.paths["late"] == "backbone.layers.2.fusion"
        torch.testing.assert_close(net(torch.ones(2, 4)), eager)
        assert torch.equal(taps["wrapped"], taps["bare"])
        torch.testing.assert_close(taps["late"], eager)
        torch.testing.assert_close(taps["compiled"], eager)
    with pytest.raises(ValueError, match=r"Did you mean 'backbone\.layers\.2\.fusion'"):
        fastkd.Taps(net, {"x": "backbone.layers.2._orig_mod.fusoin"})


def test_module_whose_own_name_is_module(net: Net) -> None:
    net.module = nn.Linear(4, 4)  # a child of the model, not a wrapper
    net.forward = lambda x: net.module(x)  # type: ignore[method-assign]
    with fastkd.Taps(net, {"own": "module"}) as taps:
        assert taps.paths == {"own": "module"}
        assert torch.equal(net(torch.ones(1, 4)), taps["own"])


def test_distributed_and_compiled_names(net: Net, tmp_path: Path) -> None:
    eager = net(torch.ones(2, 4))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(net)
        names = [name for name, _ in parallel.named_modules()]
        assert "module.backbone.layers.2.fusion" in names
        for path in ("backbone.layers.2.fusion", "module.backbone.layers.2.fusion"):
            with fastkd.Taps(parallel, {"last": path, "part": ("backbone.layers.1", "1.twice")}) as taps:
                assert taps.paths["last"] == "backbone.layers.2.fusion"
                out = parallel(torch.ones(2, 4))
                assert torch.equal(taps["last"], out)
                torch.testing.assert_close(out, eager)
                assert taps["part"].requires_grad
        compiled = torch.compile(parallel, backend="eager")
        taps = fastkd.Taps(compiled, {"last": "_orig_mod.module.backbone.layers.2.fusion"})
        torch.testing.assert_close(compiled(torch.ones(2, 4)), eager)
        torch.testing.assert_close(taps["last"], eager)
        with pytest.raises(ValueError, match=r"no module 'backbone\.layer\.2\.fusion'.* 'backbone\.layers\.2\.fusion'"):
            fastkd.Taps(compiled, {"last": "_orig_mod.module.backbone.layer.2.fusion"})
    finally:
        torch.distributed.destroy_process_group()


class Matcher(nn.Module):
    """Network that returns only a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 6, 2, 2)
        self.embed = nn.Embedding(9, 6)
        self.match = nn.Module()
        self.match.scores = Scores()

    def forward(self, image: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        scores = self.match.scores(self.encoder(image).flatten(2).mT, words=self.embed(input_ids))
        best = scores["logits"].amax(-1).unflatten(1, (image.shape[2] // 2, image.shape[3] // 2))
        return torch.stack([torch.zeros_like(best), best], 1).repeat_interleave(2, 2).repeat_interleave(2, 3)


class Scores(nn.Module):
    def forward(self, pixels: torch.Tensor, words: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": pixels @ words.mT / 6**0.5}


def test_distiller_of_models_that_return_only_a_mask() -> None:
    torch.manual_seed(0)
    student, teacher = Matcher(), Matcher().eval().requires_grad_(False)
    paths = {"map": "encoder", "words": "embed", "pixel_words": ("match.scores", "logits")}
    losses = fastkd.losses
    terms = [
        fastkd.Term(losses.channel_kd, "map", name="map"),
        fastkd.Term(losses.cross_modal_kd, ("map", "words"), name="features"),
        fastkd.Term(losses.cross_modal_kd_from_logits, "pixel_words", name="logits"),
    ]
    distiller = fastkd.Distiller(
        student,
        torch.compile(teacher, backend="eager"),
        lambda out, batch: nn.functional.cross_entropy(out, batch["mask"]),
        terms,
        student_taps=paths,
        teacher_taps=fastkd.Taps(teacher, paths),  # made before the model runs compiled
    )
    batch = {
        "image": torch.randn(2, 3, 8, 8),
        "input_ids": torch.randint(9, (2, 5)),
        "mask": torch.randint(2, (2, 8, 8)),
    }
    report = distiller.check(batch)
    assert all(norm > 0 for norm in report.norms.values())
    torch.testing.assert_close(
        report.values["features"], report.values["logits"]
    )  # the same term from features and from logits


def test_tapped_model_can_be_copied_and_pickled(net: Net) -> None:
    with fastkd.Taps(net, {"last": "backbone.layers.2.fusion"}) as taps:
        out = net(torch.ones(1, 4))  # the tap holds its graph
        for again in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
            torch.testing.assert_close(again(torch.ones(1, 4)), out)
        assert taps["last"] is out
        net_copy, taps_copy = copy.deepcopy((net, taps))  # as in a copied Distiller
        torch.testing.assert_close(net_copy(torch.zeros(1, 4)), taps_copy["last"])
        assert taps["last"] is out


def test_hooks_are_removed_with_the_taps(net: Net) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())

    def loss(out: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return out.sum()

    for _ in range(3):  # as in a notebook
        distiller = fastkd.Distiller(net, None, loss, inputs=("x",), student_taps={"last": "backbone.layers.2.fusion"})
        distiller({"x": torch.ones(1, 4)})
        assert hooks() == 2
    del distiller
    assert hooks() == 0


class Rectified(nn.Module):
    """Network whose activation and residual overwrite earlier outputs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.act(self.first(x)))
        y += x
        return y


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
def test_reading_an_output_changed_in_place_raises(grad: type) -> None:
    torch.manual_seed(0)
    net = Rectified()
    with grad(), fastkd.Taps(net, {"first": "first", "second": "second", "act": "act"}) as taps:
        net(torch.randn(8, 4))
        for name in ("first", "second"):
            with pytest.raises(RuntimeError, match=rf"'{name}': .* '{name}' was changed in place afterwards"):
                taps[name]
        assert (taps["act"] >= 0).all()


def test_taps_in_inference_mode(net: Net) -> None:
    with torch.inference_mode(), fastkd.Taps(net, {"last": "backbone.layers.2.fusion"}) as taps:
        assert torch.equal(net(torch.ones(2, 4)), taps["last"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(net: Net, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    def gradients(model: nn.Module, run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        with fastkd.Taps(model, {"block": ("backbone.layers.1", 0)}) as taps:
            x = torch.ones(2, 4, requires_grad=True)
            (run(x).sum() + taps["block"].square().sum()).backward()
        return [p.grad for p in model.backbone.parameters()]

    class Checkpointed(Net):
        def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
            for layer in self.backbone.layers:
                x, _ = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    other = Checkpointed()
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(gradients(other, other), gradients(net, net))


def test_error_of_a_missing_part_names_the_tap(net: Net) -> None:
    with (
        fastkd.Taps(net, {"deep": ("backbone.layers.1", "1.thrice")}),
        pytest.raises(ValueError, match=r"tap 'deep': path '1\.thrice': dict at '1' has no 'thrice'"),
    ):
        net(torch.ones(1, 4))

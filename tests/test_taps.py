"""Taps: features by module path, and loud errors where other tools return nothing."""

from __future__ import annotations

import copy
import pickle

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


def test_values_are_the_modules_outputs(net: Net) -> None:
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


def test_every_forward_starts_afresh(net: Net) -> None:
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
    ("path", "offer"),
    [
        ("backbone.layer.2.fusion", "backbone.layers.2.fusion"),
        ("backbone.layers.2.fusio", "backbone.layers.2.fusion"),
        ("backbone.layers.7", "backbone.layers.0"),
        ("unsed", "unused"),
    ],
)
def test_unknown_path_offers_close_ones(net: Net, path: str, offer: str) -> None:
    with pytest.raises(ValueError, match=rf"tap 'x': the model has no module '{path}'") as error:
        fastkd.Taps(net, {"x": path})
    assert offer in str(error.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())  # nothing half-hooked


def test_reading_too_early_closed_or_unknown(net: Net) -> None:
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


@pytest.mark.parametrize("paths", [{}, None, {"a.b": "unused"}, {"": "unused"}])
def test_bad_names(net: Net, paths: object) -> None:
    with pytest.raises(ValueError, match="name"):
        fastkd.Taps(net, paths)  # type: ignore[arg-type]


def test_what_is_no_module_or_no_path(net: Net) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got NoneType"):
        fastkd.Taps(None, {"a": "unused"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tap 'a': expected a module path or \(path, index\), got 3"):
        fastkd.Taps(net, {"a": 3})  # type: ignore[dict-item]


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


def test_a_tapped_model_can_be_copied_and_pickled(net: Net) -> None:
    with fastkd.Taps(net, {"last": "backbone.layers.2.fusion"}):
        again = pickle.loads(pickle.dumps(net))
        copy.deepcopy(net)
    torch.testing.assert_close(again(torch.ones(1, 4)), net(torch.ones(1, 4)))

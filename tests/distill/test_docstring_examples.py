"""The examples in the docstrings of the distiller, its terms and taps run, on models of the shipped teacher's kind."""

from __future__ import annotations

import doctest
import inspect
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastkd
from fastkd import distill, losses

pytest.importorskip("timm", reason="needs the [ris] extra")

from fastkd.models import RISModel, preset
from fastkd.train import segmentation_loss

EXAMPLES = {
    name: doctest.DocTestParser().get_examples(inspect.getdoc(getattr(distill, name)) or "") for name in distill.__all__
} | {"balance": doctest.DocTestParser().get_examples(inspect.getdoc(distill.Distiller.balance) or "")}


def tree(*paths: str) -> nn.Module:
    """Return a module that has the given paths."""
    root = nn.Module()
    root.forward = lambda image: [root.get_submodule(path)(image) for path in paths]  # type: ignore[assignment]
    for path in paths:
        module = root
        for part in path.split("."):
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Identity())
            module = module.get_submodule(part)
    return root


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Return the names that the examples use."""
    torch.manual_seed(0)
    image, mask = torch.randn(4, 3, 64, 64), torch.rand(4, 64, 64) > 0.5
    words = {"input_ids": torch.randint(5, (4, 6)), "word_mask": torch.ones(4, 6, dtype=torch.bool)}
    teacher = RISModel.from_pretrained(str(files("fastkd.models") / "assets/shapes-teacher"))
    return vars(distill) | {
        "fastkd": fastkd,
        "losses": losses,
        "RISModel": SimpleNamespace(from_pretrained=lambda folder: teacher),
        "student": RISModel(preset("shapes-student")),
        "teacher": teacher.eval().requires_grad_(False),
        "model": tree("backbone.layers.3.fusion"),
        "image": image,
        "batch": {"image": image, "mask": mask, **words},
        "segmentation_loss": segmentation_loss,
        "task_loss": segmentation_loss,
        **{name: getattr(distill, name) for name in distill.__all__},
    }


@pytest.mark.parametrize("name", [name for name, examples in EXAMPLES.items() if examples])
def test_example_runs(name: str, names: dict[str, Any]) -> None:
    given = dict(names)
    if name == "AttentionTap":
        given |= {"student": tree("blocks.11.attn"), "teacher": tree("blocks.23.attn")}
    if name == "balance":
        terms = [distill.Term(losses.channel_distribution_kd, "decoder_features")]
        given["distiller"] = distill.Distiller(given["student"], given["teacher"], segmentation_loss, terms)
    for example in EXAMPLES[name]:
        if example.want:
            assert repr(eval(example.source, given)) == example.want.strip()
        else:
            exec(example.source, given)


def test_most_names_have_examples() -> None:
    assert {name for name, examples in EXAMPLES.items() if not examples} == {
        "DistillOutput",
        "GradientReport",
        "TappedAttention",
    }

"""Every example runs, learns, and uses only the public interface."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.nn.functional as F
from contract_tools import threads
from torch import Tensor

import fastkd

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def needs(*libraries: str) -> None:
    for library in libraries:
        pytest.importorskip(library, reason="needs the [ris] extra")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread: the tensors are small, and threads would wait for each other on a busy machine."""
    with threads(1):
        yield


def test_loss_in_a_loop(capsys):
    history = load("loss_in_a_loop").main(steps=31)
    assert history[-1] < history[0] / 2
    printed = capsys.readouterr().out
    for name in ("task", "channel_kd"):
        values = [float(value) for value in re.findall(rf"{name} (\S+)", printed)]
        assert len(values) == 4
        assert values[-1] < 0.8 * values[0], name


def test_attention_maps() -> None:
    needs("timm")
    history = load("attention_maps").main(steps=12)
    for name in ("task", "attention"):
        assert history[-1][name] < 0.9 * history[0][name]


def all_patches(student: Tensor, teacher: Tensor, **_: Any) -> Tensor:
    """Return the mean squared error of the similarities of all patches of a batch, by the plain formula."""
    rows = (F.normalize(x.mT.flatten(0, 1), dim=1) for x in (student, teacher))  # (B·N, C)
    return F.mse_loss(*(x @ x.mT for x in rows))


def test_gram_anchoring(monkeypatch):
    example = load("gram_anchoring")
    free, anchored = example.main()
    assert 0 < anchored < free / 10
    few = example.main(steps=4)
    monkeypatch.setattr(example, "pixel_relation_kd", all_patches)
    assert few == pytest.approx(example.main(steps=4), rel=1e-3)


def test_hooks_on_any_model(capsys):
    needs("torchvision")
    from torchvision.models import mobilenet_v3_small

    distiller, history = load("hooks_on_any_model").main(steps=4)
    assert history[-1] < history[0]
    shapes = [ast.literal_eval(shape) for shape in re.findall(r": (\(\d+, .*\))", capsys.readouterr().out)]
    assert [shape[0::2] for shape in shapes] == [(8, 6), (8, 6)]
    assert [shape[1] for shape in shapes] == [256, 48]
    assert distiller.student.state_dict().keys() == mobilenet_v3_small(num_classes=10).state_dict().keys()
    (aligner,) = distiller.term_modules["channels"].parameters()
    assert aligner.grad.abs().sum() > 0
    tapped = [p.grad for name, p in distiller.student.named_parameters() if name.startswith("features.8.")]
    assert all(gradient.abs().sum() > 0 for gradient in tapped)
    assert all(p.grad is None for p in distiller.teacher.parameters())


HUGGINGFACE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("example", sys.argv[1])
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
first = []
for example.LOGIT_WEIGHT, example.RELATION_WEIGHT in [(0.0, 0.0), (1000.0, 0.0), (0.0, 1000.0)]:
    first += example.main(steps=1)
example.LOGIT_WEIGHT = example.RELATION_WEIGHT = 1.0
print(json.dumps([example.main(steps=6), first]))
"""


def test_huggingface_trainer():
    needs("transformers", "accelerate")
    # In its own process: Trainer changes accelerate's global state.
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", HUGGINGFACE, str(EXAMPLES / "huggingface_trainer.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    history, (alone, with_logits, with_relation) = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(history) == 6
    assert history[-1] < history[0]
    assert with_logits > alone + 0.1  # the same first step: each term is in its loss
    assert with_relation > alone + 0.1


def test_referring_segmentation():
    needs("torchvision", "timm", "transformers", "accelerate", "pycocotools", "torchmetrics")
    result = load("referring_segmentation").main(steps=16, images=40)
    task = [line["task"] for line in result["history"]]
    distribution = [line["terms"]["distribution"] for line in result["history"]]
    assert len(task) == 16
    for values in (task, distribution):
        assert sum(values[-4:]) < sum(values[:4])
    assert all(line["terms"]["cross_modal"] > 0 for line in result["history"])
    assert result["scores"]["teacher"].miou > 40
    assert result["scores"]["student"].sentences == result["scores"]["teacher"].sentences > 0
    found = result["prediction"]
    assert found.mask.shape == result["image"].shape[:2] == (64, 64)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_use_only_public_names(path):
    imported = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastkd":
            imported.setdefault(node.module, set()).update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            assert all(alias.name == "fastkd" or not alias.name.startswith("fastkd.") for alias in node.names)
    assert imported
    for module, names in imported.items():
        assert module == "fastkd" or module.removeprefix("fastkd.") in fastkd.__all__
        assert names <= set(importlib.import_module(module).__all__)


def test_table_lists_every_example():
    assert FILES
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[(\w+\.py)\]\(\1\)", table, re.M)) == {path.name for path in FILES}

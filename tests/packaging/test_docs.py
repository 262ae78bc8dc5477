"""The documentation names files that exist and agrees with the code, and its snippets run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MAPS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "csrc/README.md")  # pages that name files of the tree
TOP = ("benchmarks", "csrc", "docs", "examples", "fastkd", "kernels", "scripts", "tests")
RIS = ("torchvision", "timm", "transformers", "accelerate", "pycocotools", "torchmetrics")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def snippets(page: str) -> list[str]:
    """Return the Python snippets of a page, which run in order."""
    return re.findall(r"^```python\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)


def table(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its header."""
    lines = read(page).split(f"# {heading}\n", 1)[1].splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[2:]


def named_paths(page: str) -> set[str]:
    """Return the paths in backticks: those below a top-level folder, and files at the root."""
    paths = set()
    for text in re.findall(r"`([^`\s]+)`", read(page)):
        path = text.rstrip("/").partition(":")[0]
        if path.split("/")[0] in TOP and "/" in path and not re.search(r"[<>*{}()]|[A-Z]{4}", path.rpartition("/")[2]):
            paths.add(path)
    return paths


def expanded(page: str) -> set[str]:
    """Return paths written with alternatives, ``csrc/cpu/relation/{plan,stored}.cpp``, one by one."""
    paths = set()
    for head, choices, tail in re.findall(r"`([\w./-]+/)\{([\w.,/ -]+)\}([\w./-]*)`", read(page)):
        if head.split("/")[0] in TOP:
            paths |= {head + choice.strip() + tail for choice in choices.split(",")}
    return paths


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: with small tensors, more would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", [page for page in MAPS if (ROOT / page).exists()])
def test_named_paths_exist(page: str) -> None:
    named = named_paths(page) | expanded(page)
    assert named
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_each_equivalent_has_its_test() -> None:
    rows = re.findall(r"^\| (?!you use)[^-].*$", read("docs/equivalents.md"), re.MULTILINE)
    tests = set(re.findall(r"^def (test_\w+)", read("tests/losses/test_equivalences.py"), re.MULTILINE))
    assert len(rows) >= 29
    assert [row for row in rows if row.rstrip("| ").rpartition("| ")[2].strip("`") not in tests] == []


@pytest.mark.parametrize("page", [str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]])
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                target
            )


def test_named_commands_exist() -> None:
    text = "\n".join(read(str(path.relative_to(ROOT))) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
    modules = set(re.findall(r"python -m (benchmarks[.\w]*)", text))
    assert len(modules) > 5
    for module in modules:
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^|&& |    )make ([a-z-]+)\b", text, re.MULTILINE))
    assert {"demo", "test", "check"} <= named
    assert named <= targets
    commands = {path.stem for path in ROOT.glob("fastkd/cli/[a-z]*.py")} | {"distill"}
    assert set(re.findall(r"`fastkd ([a-z]+)", text)) - {"needs"} <= commands  # "fastkd needs" begins an error message


def test_info_shows_the_documented_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastkd

    rows = table("docs/environment.md", "At run time") + table("docs/environment.md", "Variables of other software")
    documented = {name for row in rows for name in re.findall(r"`(\w+)(?:=1)?`", row[0])}
    assert {"FASTKD_BACKEND", "CUDA_VISIBLE_DEVICES"} <= documented
    for name in documented - {"FASTKD_BACKEND"}:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("FASTKD_BACKEND", "reference")
    assert documented <= set(fastkd.info()["environment"])


def streams() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("webdataset", "pyarrow"))


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "snippets", **given}
    for number, snippet in enumerate(snippets(page)):
        if "ShardDataset" not in snippet or streams():  # needs the [stream] extra
            exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)
    return names


def needs_ris() -> None:
    for package in RIS:
        pytest.importorskip(package, reason="needs the [ris] extra")


def test_distiller_page_runs_and_lists_the_keys_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_ris()
    names = run("docs/distiller.md", tmp_path, monkeypatch)
    assert len(names["result"].history) == 2
    documented = {
        row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in table("docs/distiller.md", "Output folder")
    }
    lines = [json.loads(line) for line in (tmp_path / "runs/distilled/log.jsonl").read_text("utf-8").splitlines()]
    assert {line["event"] for line in lines} == set(documented)
    for line in lines:
        assert set(line) - {"event"} == documented[line["event"]] - {"message", "error"}


def test_readme_snippets_run_and_agree(tmp_path: Path) -> None:
    needs_ris()
    before, after, distil = re.findall(r"^```python\n(.*?)^```", read("README.md"), re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    maps = {"student_map": torch.randn(2, 3, 8, 8, requires_grad=True), "teacher_map": torch.randn(2, 3, 8, 8)}
    results = []
    for code in (before, after):
        names = {**maps, "task_loss": maps["student_map"].square().mean(), "F": torch.nn.functional}
        exec(code, names)
        results.append((names["loss"], *torch.autograd.grad(names["loss"], maps["student_map"])))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)

    outputs = {"decoder_features": maps["student_map"], "logits": torch.randn(2, 2, 8, 8, requires_grad=True)}
    names = {"student": Constant(outputs), "teacher": Constant(outputs).eval().requires_grad_(False)}
    with torch.no_grad():
        for parameter in names["teacher"].parameters():
            parameter.mul_(0.5)
    names |= {"batch": {"mask": torch.rand(2, 8, 8) > 0.5}}
    exec(distil, names)
    assert all(parameter.grad is not None for parameter in names["student"].parameters())


class Constant(torch.nn.Module):
    """A model that returns its parameters."""

    def __init__(self, outputs: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.outputs = torch.nn.ParameterDict({k: torch.nn.Parameter(v.detach().clone()) for k, v in outputs.items()})

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(**self.outputs)


def test_table_of_named_terms_is_complete() -> None:
    from fastkd.distill.recipes import TERMS, recipe

    rows = {row[0].strip("`"): row for row in table("docs/distiller.md", "Named terms")}
    assert list(rows) == list(TERMS)
    for term in recipe(list(TERMS)):
        selected = tuple(re.findall("`([^`]+)`", rows[term.name][2]))
        assert selected == (term.student if isinstance(term.student, tuple) else (term.student,))


@pytest.mark.parametrize(
    ("page", "heading"),
    [("docs/models.md", "Output"), ("docs/lavt.md", "In Python"), ("docs/teachers.md", "CLIPSeg and SAM 3")],
)
def test_tables_of_outputs_are_complete(page: str, heading: str) -> None:
    needs_ris()
    from fastkd.models import RISOutput

    assert [row[0].strip("`") for row in table(page, heading)] == [
        field.name for field in dataclasses.fields(RISOutput)
    ]


def test_published_text_weights_of_presets() -> None:
    needs_ris()
    from fastkd.models import list_presets, preset
    from fastkd.models.presets import published_text_weights

    rows = table("docs/models.md", "Students: presets, prediction, export")
    stated = {name: row[3].strip("`") for row in rows for name in re.findall(r"`([\w-]+)`", row[0])}
    assert stated == {
        name: published_text_weights(preset(name)) for name in list_presets() if name.startswith("student-")
    }


def test_train_config_table_is_complete() -> None:
    from fastkd.train import TrainConfig

    rows = {row[0].strip("`"): row[1] for row in table("docs/distiller.md", "TrainConfig")}
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert list(rows) == list(fields)
    for name, default in fields.items():
        assert eval(rows[name]) == default, name


def test_evaluation_page_runs_and_lists_protocols_and_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_ris()
    names = run("docs/evaluation.md", tmp_path, monkeypatch)
    from fastkd.evaluate import PROTOCOLS

    assert [row[0].strip("`") for row in table("docs/evaluation.md", "Protocols")] == list(PROTOCOLS)
    rows = table("docs/evaluation.md", "Scores of every sentence")
    documented = {field for row in rows if row[1] != "under `gres`" for field in re.findall(r"`(\w+)`", row[0])}
    line = json.loads((tmp_path / "alone.jsonl").read_text("utf-8").splitlines()[0])
    assert documented == set(line) == set(names["result"].conditions) | set(names["result"].samples[0])


def test_data_page_runs_and_lists_the_keys_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_ris()
    names = run("docs/data.md", tmp_path, monkeypatch)
    from fastkd.data import RefCOCO, ReferDataset, collate

    tokenizer = names["tokenizer"]
    data = ReferDataset(
        RefCOCO("data/shapes"), tokenizer, image_size=64, teacher_tokenizer=tokenizer, teacher_max_words=24
    )
    sample, batch = data[0], collate([data[0], data[1]])
    rows = {key: row for row in table("docs/data.md", "Samples and batches") for key in re.findall(r"`(\w+)`", row[0])}
    assert set(rows) == set(sample) == set(batch)
    sizes = {"S": 64, "T": 20, "T'": 24, "B": 2, "3": 3}
    for key, row in rows.items():
        for value, cell in ((sample[key], row[1]), (batch[key], row[2])):
            if isinstance(value, torch.Tensor):
                dtype, _, shape = cell.partition(" ")
                assert str(value.dtype) == f"torch.{dtype}", key
                assert tuple(value.shape) == tuple(sizes[name] for name in re.findall(r"[\w']+", shape)), key
            else:
                assert cell == (
                    f"list of {type(value[0]).__name__}" if isinstance(value, list) else type(value).__name__
                )


def test_teacher_cache_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_ris()
    names = run("docs/teacher_cache.md", tmp_path, monkeypatch)
    assert names["result"].steps == 2
    assert names["cache"].measured["change_with_order"] == 0


def test_scaling_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("docs/scaling.md", tmp_path, monkeypatch)
    assert names["student"].grad.abs().max() > 0


def test_data_page_lists_splits_and_published_counts() -> None:
    needs_ris()
    from fastkd.data import shapesref
    from fastkd.data.refcoco import PUBLISHED_REFS, SPLITS
    from fastkd.data.shapes import KIND_SHARES

    rows = {(row[0].strip("`"), row[1].strip("`")): row[2:] for row in table("docs/data.md", "RefCOCO on disk")}
    assert {key: tuple(row[0].split(", ")) for key, row in rows.items()} == SPLITS
    assert {key: list(map(int, row[1].split(", "))) for key, row in rows.items() if row[1]} == {
        key: list(counts.values()) for key, counts in PUBLISHED_REFS.items()
    }
    shares = {row[0]: float(row[1]) for row in table("docs/data.md", "Procedural shapes")}
    assert shares == KIND_SHARES
    rows = {row[0]: row[1:3] for row in table("docs/data.md", "ShapesRef")}
    assert {kind: float(row[0]) for kind, row in rows.items()} == shapesref.KIND_SHARES
    assert {kind: float(row[1]) for kind, row in rows.items() if row[1]} == shapesref.PLACELESS_SHARES

"""``fastkd report``: runs and their teacher on one page."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm", reason="needs the [ris] extra")

from html_page import Page

from fastkd.cli import _report, main
from fastkd.cli import report as command
from fastkd.cli._settings import DistillSettings
from fastkd.cli._yaml import load_settings
from fastkd.data import make_shapes
from fastkd.models import TextPromptedTeacher

SHORT = ("--steps", "2", "--batch-size", "2", "--eval-every", "2", "--warmup", "1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make_shapes(root / "data", images=40, image_size=64, seed=0)
    data = ("--data", str(root / "data"), *SHORT)
    assert main(["train", *data, "--out", str(root / "alone")]) == 0
    assert main(["distill", *data, "--out", str(root / "distilled"), "--terms", "first_order,weight=1"]) == 0
    return root


def test_compares_runs_and_their_teacher(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs / "alone"), str(runs / "distilled"), "--examples", "1"]) == 0
    assert str(runs / "distilled" / "report.html") in capsys.readouterr().out
    page = Page((runs / "distilled" / "report.html").read_text(encoding="utf-8"))
    for text in ("teacher", "over alone", "Best by the IoU of distilled", "first_order", "Attention to each word"):
        assert text in page.text, text
    alts = [image["alt"] for image in page.all("img")]
    for name in ("teacher", "alone", "distilled"):
        assert any(alt.startswith(f"Attention of {name} to the word") for alt in alts)
        assert f"Matrix of the similarities of {name}'s channels" in alts
        assert sum(f"predicted by {name}," in alt for alt in alts) == 3


def test_runs_that_name_one_dataset_by_two_paths(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.copytree(runs / "data", tmp_path / "data")
    names = ("--data", str(tmp_path / "data")), ("--data", "../data")
    for number, name in enumerate(names):
        assert main(["train", *name, *SHORT, "--out", str(number)]) == 0
    assert f"data: {tmp_path / 'data'}\n" in (tmp_path / "work" / "1" / "config.yaml").read_text()
    old = (tmp_path / "work" / "1" / "config.yaml").read_text()
    old = old.replace(f"data: {tmp_path / 'data'}", f"data: {tmp_path / 'work' / '..' / 'data'}")
    (tmp_path / "work" / "1" / "config.yaml").write_text(old)  # of an earlier version
    assert main(["report", "0", "1", "--examples", "1"]) == 0


def test_one_run_without_its_teacher(runs: Path, tmp_path: Path) -> None:
    assert main(["report", str(runs / "distilled"), "--no-teacher", "--out", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "teacher" not in page.text
    assert "over " not in page.text.split("Gain")[1].split("Samples by IoU")[0]


def test_teacher_of_a_cache(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = str(tmp_path / "cache")
    assert main(["cache", str(runs / "distilled" / "config.yaml"), "--out", cache]) == 0
    settings = load_settings(DistillSettings, str(runs / "distilled" / "config.yaml"))
    settings = replace(settings, teacher=None, teacher_cache=Path(cache))
    assert command._teacher_of(settings) == "shapes"
    capsys.readouterr()
    gone = {"teacher": {"name": "gone", "files": "0"}}
    for notes, reason in (({}, "its cache does not name it"), (gone, "gone does not exist here")):
        path = tmp_path / "cache" / "cache.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "notes": notes}))
        assert command._teacher_of(settings) is None
        assert f"no teacher in the report: {reason}" in capsys.readouterr().out
    shutil.rmtree(cache)
    assert command._teacher_of(settings) is None
    assert "no teacher in the report: " in capsys.readouterr().out


@pytest.mark.parametrize(("teacher_tokenizer", "expected"), [(None, None), ("own", "own")])
def test_teacher_with_its_own_tokenizer_does_not_get_the_students(
    runs: Path, monkeypatch: pytest.MonkeyPatch, teacher_tokenizer: str | None, expected: str | None
) -> None:
    settings = load_settings(DistillSettings, str(runs / "distilled" / "config.yaml"))
    settings = replace(settings, data=replace(settings.data, tokenizer="students"))
    words: list[str | None] = []
    monkeypatch.setattr("fastkd.cli._data.DataArgs.open", lambda data, *args, **options: words.append(data.tokenizer))
    monkeypatch.setattr("fastkd.evaluate.evaluate", lambda *args, **options: "score")
    for model, given in (("clipseg", teacher_tokenizer), ("shapes", None)):
        loaded = object.__new__(TextPromptedTeacher) if model == "clipseg" else object()
        monkeypatch.setattr("fastkd.cli._models.load_model", lambda name, loaded=loaded: loaded)
        command._score(model, model, settings, given, "val", {})
    assert words == [expected, "students"]


def test_another_protocol(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ("report", str(runs / "alone"), "--out", str(page), "--examples", "1")
    assert main([*arguments, "--protocol", "cris_orig"]) == 0
    text = Page(page.read_text(encoding="utf-8")).text
    assert "Protocol cris_orig: refcoco (unc) val" in text
    assert "each image's own size, sigmoid > 0.35, IoU > X" in text


def test_split_by_may_be_stated_in_one_run_only(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "alone", tmp_path / "stated")
    config = tmp_path / "stated" / "config.yaml"
    config.write_text(config.read_text().replace("split_by: null", "split_by: unc"))
    assert "split_by: unc" in config.read_text()
    assert main(["report", str(runs / "alone"), str(tmp_path / "stated"), "--examples", "1"]) == 0


@pytest.mark.parametrize(("limit", "forwards"), [(0.0, 3), (60.0, 6)])
def test_latency_of_a_slow_model_is_measured_less_often(
    monkeypatch: pytest.MonkeyPatch, limit: float, forwards: int
) -> None:
    class Slow(nn.Module):
        calls = 0

        def forward(self, image: Tensor) -> Tensor:
            self.calls += 1
            return image

    monkeypatch.setattr(_report, "_inputs", lambda *arguments: {"image": torch.zeros(1, 2, 1, 1)})
    model = Slow()
    assert _report.measure_latency(model, None, repeats=4, limit=limit) > 0
    assert model.calls == forwards


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no run: pass the folder of a run"),
        (["{runs}/alone", "{runs}/alone"], "a run occurs twice"),
        (["{runs}/alone", "{runs}/data/../alone"], "a run occurs twice"),
        (["{runs}/data"], "is not a run of fastkd train, distill or demo: it has no config.yaml"),
        (["{tmp}/begun"], "has no best/"),
        (["{runs}/alone", "{tmp}/other"], "compare runs on one dataset"),
        (["{runs}/alone", "--examples", "0"], "--examples must be at least 1, got 0"),
        (["{runs}/alone", "--split", "nope"], "nope"),
        (["{runs}/alone", "--protocol", "gres"], "'gres' is defined at 480×480, the dataset has image_size=64"),
        (["{runs}/alone", "--out", "{runs}/alone/config.yaml/page.html"], "is a file"),
        (["{runs}/alone", "--out", "{runs}"], "--out: {runs} is a folder; pass the name of a file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    args: list[str], message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (runs / "alone" / "config.yaml").read_text()
    for name, text in (("begun", config), ("other", config.replace(str(runs / "data"), str(tmp_path)))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    (tmp_path / "other" / "best").mkdir()
    assert main(["report", *(arg.format(runs=runs, tmp=tmp_path) for arg in args)]) == 2
    printed, error = capsys.readouterr()
    assert message.format(runs=runs) in error
    assert error.count("\n") == 1
    assert "mIoU" not in printed  # before the work

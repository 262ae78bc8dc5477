"""Grids of runs: reading them, running them, resuming after a kill, and their results."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("timm", reason="needs the [ris] extra")

from fastkd.cli import main
from fastkd.cli._grid import records
from fastkd.cli._grid.costs import phases
from fastkd.cli._grid.grid import Grid, load_grid
from fastkd.cli._grid.runs import cache_folder, cached, costs_of, steps_of
from fastkd.cli._settings import DistillSettings, TrainSettings
from fastkd.cli.experiments import _costs, experiments, outcomes
from fastkd.data import RefCOCO

METHOD = {"terms": {"first_order": 0.5}}


def write_grid(folder: Path, **changes) -> Path:
    settings = {"data": str(folder.parent / "shapes"), "steps": 2, "batch_size": 4, "device": "cpu", "log_every": 1}
    content = {
        "setting": "tiny",
        "settings": settings,
        "rows": {"alone": {}, "method": METHOD},
        "work": str(folder / "work"),
        **changes,
    }
    folder.mkdir(exist_ok=True)
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("grids")
    assert main(["data", "make-shapes", str(root / "shapes"), "--images", "16", "--image-size", "64"]) == 0
    return root


def test_grid_runs_is_killed_and_resumes(root, monkeypatch, capsys):
    rows = {"alone": {}, "unused": {"terms": {"first_order": {"weight": 0.0}}}, "method": METHOD}
    path = write_grid(root / "killed", rows=rows, equal="time", reference="method", splits=["val", "testB"])
    costs = {"method": 1.0, "alone": 0.5, "unused": 0.5}
    monkeypatch.setattr("fastkd.cli._grid.runs.costs_of", lambda grid, rows, known: {**costs, **known})
    child = multiprocessing.get_context("fork").Process(target=run_until_the_second_write, args=(path,))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    results = root / "killed" / "grid.jsonl"
    assert not results.read_bytes().endswith(b"\n")  # a line is incomplete
    first = records.read_records(results)
    assert [(one["row"], one["split"]) for one in first] == [("alone", "val"), ("alone", "testB"), ("unused", "val")]

    assert main(["experiments", str(path)]) == 0
    assert "3 runs, 1 of them complete" in capsys.readouterr().out
    found = {(one["row"], one["split"]): one for one in records.read_records(results)}
    assert len(found) == 6
    assert found["alone", "val"] == first[0]  # not run again
    assert [found[row, "val"]["steps"] for row in rows] == [4, 4, 2]  # equal time at half the cost
    runs = root / "killed" / "work" / "runs" / "tiny" / "equal-time"
    students = {row: (runs / f"{row}-seed0" / "last" / "model.safetensors").read_bytes() for row in rows}
    assert students["alone"] == students["unused"] != students["method"]  # equal initial weights and data order
    for split in ("val", "testB"):
        same = ("miou", "oiou", "p50", "iou", "steps", "parameters", "sentences")
        assert all(found["alone", split][name] == found["unused", split][name] for name in same)
    for one in found.values():
        iou = records.decode_iou(one["iou"])
        assert len(iou) == one["sentences"]
        assert records.decode_images(one["images"]).tolist() == images_of(root / "shapes", one["split"])
        assert 100 * iou.mean() == pytest.approx(one["miou"], abs=0.2)
        assert one["seconds"] > 0
        assert one["equal_time"] is True
        assert one["processor"]
        assert one["relative_cost"] == costs[one["row"]]
    assert found["method", "val"]["weights"]["first_order"] > 0
    assert documented("Results") == set(first[0])

    before = results.read_bytes()
    assert main(["experiments", str(path)]) == 0
    assert results.read_bytes() == before
    write_grid(
        root / "killed", rows={**rows, "method": {"terms": {"first_order": 0.4}}}, equal="time", reference="method"
    )
    assert main(["experiments", str(path)]) == 2
    assert "row 'alone' in the time of another reference than 'method' has now" in capsys.readouterr().err
    write_grid(root / "killed", rows={**rows, "unused": {}}, equal="time", reference="method")
    assert main(["experiments", str(path)]) == 2
    assert "holds results of row 'unused' with other settings" in capsys.readouterr().err


def images_of(root: Path, split: str) -> list[int]:
    """Return the number of the image of every sentence of a split, in the order in which images first occur."""
    refs = RefCOCO(root, split=split).refs
    ids = [ref.image_id for ref in refs for _ in ref.sentences]
    return [[*dict.fromkeys(ids)].index(one) for one in ids]


def documented(heading: str) -> set[str]:
    """Return the keys in the first column of a table of docs/experiments.md; a range of P@X is written p50 … p90."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "experiments.md").read_text("utf-8")
    rows = page.split(f"# {heading}\n", 1)[1].split("\n\n|", 1)[1].split("\n\n")[0].splitlines()
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row.strip("|").split("|")[0])}
    return names | {f"p{n}0" for n in (6, 7, 8)} if "p50" in names else names


def test_documented_keys_are_those_of_a_grid():
    fields = {field.name for field in dataclasses.fields(Grid)} - {"source", "every_row"}
    assert documented("Grids of experiments") == fields | {"extends"}


def run_until_the_second_write(path: Path) -> None:
    torch.set_num_threads(1)  # a forked process has no OpenMP threads
    append, calls = records.append_records, []

    def half(path: Path, lines: list) -> None:
        calls.append(path)
        if len(calls) == 1:
            return append(path, lines)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with path.open("a", encoding="utf-8") as file:
            file.write(text[: len(text) - 40])
        os.kill(os.getpid(), signal.SIGKILL)

    records.append_records = half
    main(["experiments", str(path)])


def test_failed_runs_are_reported_and_the_others_kept(root, monkeypatch, capsys):
    import fastkd.cli._grid.runs as module

    path = write_grid(root / "failing", rows={"alone": {}, "other": {"lr": 1e-4}}, cache=None)
    execute = module.execute

    def failing(grid, run, steps, cost):
        if run.row == "alone":
            raise FloatingPointError("not finite")
        return execute(grid, run, steps, cost)

    monkeypatch.setattr(module, "execute", failing)
    assert main(["experiments", str(path)]) == 2
    printed = capsys.readouterr()
    assert "[1/2] alone-seed0 failed: FloatingPointError: not finite" in printed.out
    assert "1 of 2 runs failed: alone-seed0" in printed.err
    assert [one["row"] for one in records.read_records(root / "failing" / "grid.jsonl")] == ["other"]
    assert main(["experiments", str(path), "--rows", "alone", "--seeds", "3", "4", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["alone-seed3", "alone-seed4"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_call_keeps_the_others(jobs):
    found = dict(outcomes(math.factorial, [(3,), (-1,), (4,)], jobs))
    assert (found[3,](), found[4,]()) == (6, 24)
    with pytest.raises(ValueError, match="negative"):
        found[-1,]()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_workers_end_with_a_killed_parent():
    program = (
        "import os, time\n"
        "from fastkd.cli.experiments import _pool\n"
        "if __name__ == '__main__':\n"
        "    pool = _pool(1)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 60)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_costs_are_those_of_the_phases_of_a_schedule(root, monkeypatch):
    rows = {
        "alone": {},
        "method": {"terms": {"first_order": {"share": 0.5, "stop": 25}, "logit": {"share": 0.1, "start": 50}}},
        "late": {"terms": {"logit": {"share": 0.1, "schedule": "linear", "start": 20}}},
    }
    settings = {"data": "nowhere", "steps": 100, "batch_size": 4}
    grid = load_grid(write_grid(root / "phases", rows=rows, settings=settings, equal="time", reference="method"))
    assert phases(grid.settings_of("alone")) == [(1.0, ())]
    assert phases(grid.settings_of("method")) == [(0.25, ("first_order",)), (0.25, ()), (0.5, ("logit",))]
    assert phases(grid.settings_of("late")) == [(0.2, ()), (0.8, ("logit",))]

    price = {(): 1.0, ("first_order",): 3.0, ("logit",): 1.4}
    monkeypatch.setattr(
        "fastkd.cli._grid.runs.open_settings",
        lambda settings: type("Opened", (), {"distiller": tuple(getattr(settings, "terms", ())), "train_set": None}),
    )
    seen = []

    def measure(candidates):
        seen.append([one.model for one in candidates])
        return [price[one.model] / price[candidates[0].model] for one in candidates]

    monkeypatch.setattr("fastkd.cli._grid.costs.relative_costs", measure)
    costs = costs_of(grid, ["alone", "method", "late"], {})
    assert seen == [[("first_order",), (), ("logit",), ("logit",)]]  # one candidate for all phases without terms
    of_method = 0.25 * 3 + 0.25 * 1 + 0.5 * 1.4
    of_late = (20 + 107 * 1.4) / 127  # in its own steps, 20 of which are without its term
    assert costs == pytest.approx({"method": 1, "alone": 1 / of_method, "late": of_late / of_method})
    assert steps_of(grid, rows, costs) == {"alone": 170, "method": 100, "late": 127}
    assert 127 * of_late <= 100 * of_method < 127 * of_late + 1.4
    assert costs_of(grid, ["late"], costs) == {"method": 1.0, "late": costs["late"]}
    assert len(seen) == 1  # what is known is not measured again


def test_costs_come_from_settings_with_the_same_reference(root, monkeypatch):
    grid = load_grid(write_grid(root / "costs", equal="time", reference="method", rows={"alone": {}, "method": METHOD}))
    alone, method = grid.digest_of("alone"), grid.digest_of("method")
    line = {"student": "shapes-student", "scale": 1.0, "seed": 0, "split": "val", "equal_time": True, "images": ""}
    found = [
        ("tiny", "alone", alone, 0.9, "another digest"),
        ("same", "alone", alone, 0.5, method),
        ("same", "method", method, 1.0, method),
    ]
    given = []
    monkeypatch.setattr("fastkd.cli._grid.runs.costs_of", lambda grid, rows, known: given.append(known) or known)
    for count in (1, 3):
        names = ("setting", "row", "digest", "relative_cost", "reference")
        lines = [dict(zip(names, one, strict=True)) for one in found[:count]]
        records.append_records(grid.results, [{**line, **one} for one in lines])
        _costs(grid, ["alone", "method"])
    assert given == [{}, {"alone": 0.5, "method": 1.0}]
    monkeypatch.undo()
    assert costs_of(grid, ["method"], {"method": 0.7}) == {"method": 1.0}
    lines = [{**line, **one, "setting": "tiny"} for one in lines if one["reference"] == "another digest"]
    records.append_records(grid.results, lines)
    with pytest.raises(ValueError, match="row 'alone' in the time of another reference than 'method' has now"):
        experiments(grid.results.with_suffix(".yaml"), dry_run=True)


def test_rows_become_settings_of_distill_and_train(root):
    settings = {"data": "d", "teacher": "t", "student": "shapes-teacher", "lr": 1e-3, "backbone_weights": "random"}
    rows = {"alone": {"lr": 2e-3}, "method": {"terms": {"first_order": 0.5, "logit": {"weight": 3.0}}}}
    grid = load_grid(write_grid(root / "settings", rows=rows, settings=settings))
    alone = grid.settings_of("alone", seed=3, scale=0.5)
    assert isinstance(alone, TrainSettings)
    assert (alone.model, alone.config.lr, alone.config.seed, alone.config.threads) == ("shapes-teacher", 2e-3, 3, 1)
    method = grid.settings_of("method", seed=3, scale=0.5, steps=7)
    assert isinstance(method, DistillSettings)
    assert (method.config.lr, method.config.steps, method.teacher) == (1e-3, 7, "t")
    assert (method.terms["first_order"].share, method.terms["logit"].weight) == (0.25, 1.5)
    assert cached(grid, method).teacher_cache == cache_folder(grid)
    assert cached(grid, alone) is alone
    online = load_grid(write_grid(root / "settings", rows=rows, settings=settings, cache=None))
    assert cached(online, method).teacher_cache is None


def test_grids_share_a_cache_if_they_read_the_same(root):
    def folder(rows=None, **changes):
        rows = {"alone": {}, "a": {"terms": {"logit": 0.5}}, "b": {"terms": {"feature": 0.5}}, **(rows or {})}
        return cache_folder(load_grid(write_grid(root / "shared", rows=rows, **changes)))

    path = root / "shared" / "selected.yaml"
    first = folder()
    path.write_text("extends: grid.yaml\nrows: [a]\nscale: 2.0\n", "utf-8")
    assert cache_folder(load_grid(path)) == first
    assert folder(rows={"c": {"terms": {"channel_distribution": {"share": 0.2, "temperature": 2}}}}) == first
    others = [folder(rows={"c": {"terms": {"first_order": 0.5}}}), folder(cache="int8")]
    assert len({first, *others, folder(settings={"data": "other", "batch_size": 4})}) == 4


def test_digests_follow_what_changes_a_result(root):
    base = {"data": "d", "steps": 3}

    def digest(settings=base, **changes):
        return load_grid(write_grid(root / "digests", settings=settings, **changes)).digest_of("method")

    assert digest() == digest({"data": "elsewhere", "steps": 3, "log_every": 7})
    assert digest() == digest(scale=0.5)  # part of the key of a result
    assert (
        len({digest(), digest({**base, "steps": 4}), digest(cache="fp16"), digest(rows={"method": {"terms": {}}})}) == 4
    )


def test_scales_are_tried_or_taken_from_results(root):
    path = write_grid(root / "scales", seeds=[0, 1], scale=[0.5, 1.0])
    names = [run.name for run in load_grid(path).runs()]
    assert names[:3] == ["alone-seed0", "method-x0.5-seed0", "method-seed0"]
    assert len(names) == 6
    line = {"setting": "tuning", "student": "s", "row": "method", "equal_time": False, "images": ""}
    scores = [(0.5, 0, "val", 40.0), (0.5, 1, "val", 46.0), (2.0, 0, "val", 44.0), (1.0, 0, "testA", 90.0)]
    records.append_records(
        root / "scales" / "tuned.jsonl",
        [{**line, "scale": x, "seed": seed, "split": split, "miou": miou} for x, seed, split, miou in scores],
    )
    tuned = load_grid(write_grid(root / "scales", scale="tuned.jsonl"))
    assert [run.name for run in tuned.runs()] == ["alone-seed0", "method-x2-seed0"]
    one = [{**line, "setting": "other", "scale": 4.0, "seed": 1, "split": "val", "miou": 99.0}]
    records.append_records(root / "scales" / "mixed.jsonl", [*one, {**one[0], "setting": "tuning"}])
    mixed = load_grid(write_grid(root / "scales", scale="mixed.jsonl"))
    with pytest.raises(ValueError, match=r"several values of setting \(other, tuning\), whose scores"):
        mixed.runs()
    other = load_grid(write_grid(root / "scales", scale="tuned.jsonl", rows={"alone": {}, "new": METHOD}))
    with pytest.raises(ValueError, match="has no result on val of new: run its grid first"):
        other.runs()
    assert [run.name for run in other.runs(["alone"])] == ["alone-seed0"]  # the others need not be tuned yet
    records.append_records(root / "scales" / "tuned.jsonl", [{**one[0], "setting": "tuning"}])
    with pytest.raises(ValueError, match="no seed with results on val of all scales of 'method'"):
        tuned.runs()


def test_extends_merges_another_grid(root):
    base = write_grid(root / "base", seeds=[0, 1, 2], rows={"alone": {}, "method": METHOD, "logit": METHOD})
    path = root / "base" / "small.yaml"
    path.write_text("extends: grid.yaml\nsetting: small\nrows: [alone, logit]\nsettings: {steps: 9}\n", "utf-8")
    grid = load_grid(path)
    assert (grid.setting, list(grid.rows), grid.seeds) == ("small", ["alone", "logit"], (0, 1, 2))
    assert grid.settings["steps"] == 9
    assert grid.settings["batch_size"] == load_grid(base).settings["batch_size"]
    assert grid.results == root / "base" / "small.jsonl"
    assert grid.work == load_grid(base).work
    assert list(grid.every_row) == ["alone", "method", "logit"]  # for the teacher cache
    path.write_text("extends: grid.yaml\nrows: [alone, logit]\nsettings: {teacher: other}\n", "utf-8")
    assert list(load_grid(path).every_row) == ["alone", "logit"]
    path.write_text("extends: grid.yaml\nrows: {more: {terms: {logit: 1.0}}, alone: {lr: 0.1}, logit: null}\n", "utf-8")
    assert load_grid(path).rows["alone"] == {"lr": 0.1}
    assert list(load_grid(path).rows) == ["more", "alone", "logit"]
    assert load_grid(path).rows["logit"] == METHOD
    path.write_text("extends: grid.yaml\nsetting: same\n", "utf-8")
    assert load_grid(path).rows == load_grid(base).rows
    path.write_text("extends: grid.yaml\nrows: [lone]\n", "utf-8")
    with pytest.raises(ValueError, match=r"rows: no row is named 'lone'\. Did you mean 'alone'"):
        load_grid(path)
    wrong = {
        "rows:": "rows must be a list of rows or a mapping, got None",
        "rows: alone": "rows must be a list of rows or a mapping, got 'alone'",
        "settings:": "settings must be a mapping, got None",
        "extends: small.yaml": "extends itself",
        "extends: empty.yaml": "rows must be a mapping for .*small.yaml to extend it, got None",
    }
    (root / "base" / "empty.yaml").write_text("setting: empty\n", "utf-8")
    for text, message in wrong.items():
        path.write_text(text if "extends" in text else f"extends: grid.yaml\n{text}\n", "utf-8")
        with pytest.raises(ValueError, match=message):
            load_grid(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {}}, "rows, seeds and splits must each name at least one"),
        ({"seeds": []}, "must each name at least one"),
        ({"equal": "time"}, "equal: time needs reference, the row whose time all rows get, got None"),
        ({"equal": "time", "reference": "methods"}, "Did you mean 'method'"),
        ({"equal": "seconds"}, "equal must be one of 'steps', 'time', got 'seconds'"),
        ({"sedes": [1]}, "nothing is named 'sedes'. Did you mean 'seeds'"),
        ({"settings": {"data": "d", "seed": 1}}, "settings: seed is set for each run"),
        ({"rows": {"a": {"out": "x"}}}, "a: out is set for each run"),
        ({"rows": {"a": {"teacher": "x"}}}, "rows.a: rows share one teacher cache, so teacher belongs to settings"),
        ({"rows": {"a": {"stepz": 3}}}, "rows.a: no setting is named 'stepz'. Did you mean 'steps'"),
        ({"rows": {"a": {"lr": -1}}}, "rows.a: lr must be a finite number > 0"),
        ({"scale": True}, "scale must be a number or a list of a number or text, got True"),
    ],
)
def test_wrong_grids_are_refused(root, capsys, changes, message):
    assert main(["experiments", str(write_grid(root / "wrong", **changes))]) == 2
    assert message in capsys.readouterr().err


def test_wrong_arguments_are_refused(root, capsys):
    path = str(write_grid(root / "wrong"))
    for args, message in (
        (["nowhere.yaml"], "no grid at nowhere.yaml"),
        ([path, "--rows", "methods"], "--rows: no row is named 'methods'. Did you mean 'method'"),
        ([path, "--jobs", "0"], "--jobs must be an integer >= 1, got 0"),
    ):
        assert main(["experiments", *args]) == 2
        assert message in capsys.readouterr().err


def test_iou_survive_storage_and_a_torn_line_is_dropped(tmp_path):
    iou = np.random.default_rng(0).random(257)
    iou[:3] = 0, 1, 0.5
    text = records.encode_iou(iou)
    decoded = records.decode_iou(text)
    assert np.abs(decoded - iou).max() <= 0.5 / 255 + 1e-12
    assert (decoded[0], decoded[1]) == (0, 1)
    path = tmp_path / "new" / "results.jsonl"
    line = {"setting": "s", "student": "s", "row": "r", "scale": 1.0, "seed": 0, "split": "val", "equal_time": True}
    line["images"] = records.encode_images([0, 0, 1, 0, 70000])
    assert records.decode_images(line["images"]).tolist() == [0, 0, 1, 0, 70000]
    assert records.read_records(path) == []
    records.append_records(path, [{**line, "iou": text}])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"setting": "s')
    assert len(records.read_records(path)) == 1
    records.append_records(path, [{**line, "iou": "later"}, {**line, "seed": 1}])
    assert [(one["seed"], one.get("iou")) for one in records.read_records(path)] == [(0, "later"), (1, None)]
    del line["images"]
    path.write_text(json.dumps({**line, "iou": text}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1 lacks images, .*Remove such lines and run the grid again"):
        records.read_records(path)
    path.write_text("[]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is not a result"):
        records.read_records(path)

"""The commands, run as from a shell."""

from __future__ import annotations

import importlib.util
import json
import math
import platform

import pytest
import torch
from safetensors.torch import load_file

from fastkd._info import cpu_name
from fastkd.cli import main
from fastkd.errors import FastKDWarning

pytest.importorskip("timm", reason="needs the [ris] extra")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes") / "data"
    assert main(["data", "make-shapes", str(root), "--images", "40", "--image-size", "64"]) == 0
    return root


SHORT = ["--steps", "3", "--batch-size", "4", "--threads", "1", "--log-every", "1"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nmodel\t\t: 1\n", "AMD EPYC (family 25, model 17)"),
        ("processor\t: 0\nmodel name\t: Cortex-A72\n", "Cortex-A72"),
        ("processor\t: 0\nCPU part\t: 0xd0c\n", platform.processor() or platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_cpu_name_includes_family_and_model(tmp_path, text, name):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    assert cpu_name(file) == name


def test_info_prints_text_and_json(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert "reference" in text
    assert main(["info", "--json"]) == 0
    assert "backends" in json.loads(capsys.readouterr().out)


def test_train_then_evaluate(shapes, tmp_path, capsys):
    out = tmp_path / "alone"
    assert main(["train", "--data", str(shapes), "--out", str(out), *SHORT]) == 0
    assert (out / "best" / "model.safetensors").is_file()
    result = tmp_path / "score.json"
    samples = tmp_path / "samples.jsonl"
    args = ["evaluate", "--data", str(shapes), "--split", "testB", "--device", "cpu", "--out", str(result), "--model"]
    assert main([*args, str(out / "best"), "--out-samples", str(samples)]) == 0
    score = json.loads(result.read_text())
    assert score["split"] == "testB"
    assert score["protocol"] == "lavt"
    assert set(score["metrics"]) >= {"oIoU", "mIoU", "P@0.5", "P@0.9"}
    assert "lavt: refcoco (unc) testB, " in capsys.readouterr().out
    assert len(samples.read_text().splitlines()) == score["sentences"]
    assert main([*args, "shapes", "--against", str(samples)]) == 0
    printed = capsys.readouterr().out
    assert f"difference from {samples}, {score['sentences']} paired sentences, 95 % intervals" in printed
    found = json.loads(result.read_text())
    difference = found["comparison"]["differences"]["mIoU"]["mean"]
    assert difference == pytest.approx(found["metrics"]["mIoU"] - score["metrics"]["mIoU"])
    assert difference > 1  # the shipped teacher against a student of 3 steps
    assert main([*args, "shapes", "--protocol", "cris_orig", "--against", str(samples)]) == 2
    assert "has protocol 'lavt', but this evaluation 'cris_orig'" in capsys.readouterr().err
    assert json.loads(result.read_text()) == found
    assert main([*args, "shapes", "--protocol", "cris_orig"]) == 0
    assert "each image's own size, sigmoid > 0.35, IoU > X, true masks: union]" in capsys.readouterr().out


def test_resume_keeps_the_weights_and_refuses_other_settings(shapes, tmp_path, capsys):
    out = tmp_path / "run"
    args = ["distill", "--data", str(shapes), "--out", str(out), *SHORT]
    assert main([*args, "--resume"]) == 0
    error = capsys.readouterr()
    assert "starts afresh" in error.err
    assert main([*args, "--resume", "--steps", "4"]) == 2
    assert "steps: 3 → 4" in capsys.readouterr().err
    watched = ["--gradients-every", "2"]  # cannot change the result, so it may differ
    assert main([*args, "--resume", "--steps", "4", "--resume-allow", "steps", *watched]) == 0
    assert "weights: first_order" in capsys.readouterr().out
    assert main([*args, "--resume", "--terms", "first_order=0.25"]) == 2
    assert "shares.first_order: 0.5 → 0.25" in capsys.readouterr().err
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "resume"] == [3]


def test_cached_teacher_gives_the_weights_of_a_teacher_online(shapes, tmp_path, capsys):
    terms = ["first_order=0.5", "mask=0.2"]
    cache = ["cache", "--data", str(shapes), "--out", str(tmp_path / "cache"), "--threads", "1", "--batch-size", "4"]
    assert main([*cache, "--terms", *terms]) == 0
    printed = capsys.readouterr()
    assert "samples of 297 KiB" in printed.err
    assert "teacher cache: " in printed.out
    cached = ["--teacher-cache", str(tmp_path / "cache")]
    args = ["distill", "--data", str(shapes), *SHORT, "--terms", *terms]
    assert main([*args, "--out", str(tmp_path / "online")]) == 0
    assert main([*args, "--out", str(tmp_path / "cached"), *cached, "--teacher", "shapes"]) == 0
    files = [tmp_path / run / "last" / "model.safetensors" for run in ("online", "cached")]
    assert files[0].read_bytes() == files[1].read_bytes()
    capsys.readouterr()
    other = ["--out", str(tmp_path / "other"), *cached]
    assert main([*args, *other, "--teacher", str(tmp_path / "online" / "last")]) == 2
    assert "holds the output of another teacher, 'shapes'" in capsys.readouterr().err
    assert main(["distill", "--data", str(shapes), *SHORT, *other, "--terms", "logit=0.2"]) == 2
    assert "term 'logit': 'decoder' of the teacher was not recorded" in capsys.readouterr().err
    assert main([*cache, "--terms", *terms, "--dtype", "bf16"]) == 2
    assert "in another dtype" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_terms_are_balanced_on_labelled_samples(shapes, tmp_path, capsys):
    args = ["distill", "--data", str(shapes), "--out", str(tmp_path / "run"), *SHORT, "--preflight-only"]
    assert main([*args, "--labels", "0.05", "--batch-size", "2", "--seed", "1"]) == 0  # the first batches have no mask
    assert "weights: first_order" in capsys.readouterr().out
    assert main([*args, "--labels", "1e-9"]) == 2
    assert "labels=1e-09 leaves none of" in capsys.readouterr().err


def test_replay_prints_the_losses_of_the_batch_that_stopped_a_run(shapes, tmp_path, capsys):
    out = tmp_path / "run"
    args = ["train", "--data", str(shapes), "--batch-size", "4", "--threads", "1"]
    with pytest.warns(FastKDWarning, match="step 2 is skipped: the task loss is nan"):
        assert main([*args, "--out", str(out), "--steps", "20", "--lr", "1e30", "--grad-clip", "None"]) == 2
    [file] = out.glob("replay-*.pt")
    error = capsys.readouterr().err
    assert f"--replay {file} computes it again" in error
    assert "(ref_id " in error
    assert main([*args, "--out", str(tmp_path / "none"), "--replay", str(file)]) == 0
    assert "not finite: task" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_preflight_prints_the_table_and_trains_nothing(shapes, tmp_path, capsys):
    args = ["distill", "--data", str(shapes), "--out", str(tmp_path / "run"), *SHORT]
    assert main([*args, "--preflight-only"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["weights:", "term", "task", "first_order", "memory:", "seconds"]
    assert float(table[3].split()[4]) == pytest.approx(0.5, abs=0.2)  # balanced on other samples
    assert "text_encoder" in table[3]  # not the decoder
    assert not (tmp_path / "run").exists()


def test_skip_unusable_skips_refs_and_reports_them(shapes, tmp_path, capsys):
    import pickle
    import shutil

    root = tmp_path / "gaps"
    shutil.copytree(shapes, root)
    path = root / "refcoco" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    part = [ref for ref in refs if ref["split"] == "val"]
    part[0]["sentences"] = []
    path.write_bytes(pickle.dumps(refs))
    args = ["evaluate", "--data", str(root), "--model", "shapes", "--device", "cpu"]
    assert main(args) == 2
    assert f"ref {part[0]['ref_id']} has no sentence" in capsys.readouterr().err
    with pytest.warns(FastKDWarning, match=f"{len(part) - 1} refs are used; skipped 1 × ref without a sentence"):
        assert main([*args, "--skip-unusable"]) == 0
    assert f"of {len(part) - 1} refs" in capsys.readouterr().out


def test_distill_with_the_shipped_teacher_and_every_term(shapes, tmp_path, capsys):
    from fastkd.distill.recipes import TERMS

    out = tmp_path / "distilled"
    options = "options={relation_heads: 2, query_mask: batch.word_mask}"  # of words; the networks have 2 and 4 heads
    settings = {"attention": f",temperature=2,{options}", "word_channel": ",schedule=linear,stop=9"}
    terms = [f"{name}=0.1{settings.get(name, '')}" for name in TERMS]
    taps = [f"attention=text_encoder.model.encoder.layer.{layer}.attention.self[:]" for layer in (0, 2)]
    args = ["distill", "--data", str(shapes), "--out", str(out), "--terms", *terms, *SHORT]
    assert main([*args, "--student-taps", taps[0]]) == 2
    error = capsys.readouterr().err
    assert "terms.attention: compares taps of attention modules, and teacher_taps has none named 'attention'" in error
    args += ["--student-taps", taps[0], "--teacher-taps", taps[1]]
    assert main([*args, "--preflight-only"]) == 0
    assert "word_channel" in capsys.readouterr().out
    assert main(args) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["event"] == "train")
    assert set(first["terms"]) == set(TERMS)
    start = next(line for line in lines if line["event"] == "start")
    assert all(weight > 0 for weight in start["weights"].values())


def test_demo_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastkd.cli._grid.costs.relative_costs", lambda candidates: [1.0, 3.0, 2.0])
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--images", "40", *SHORT]) == 0
    results = json.loads((out / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["alone", "distilled", "alone, equal time"]
    assert [run["steps"] for run in results["runs"]] == [3, 3, 8]  # two at a cost of 3, one of 2
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["alone"]["parameters"] == rows["distilled"]["parameters"] < rows["teacher"]["parameters"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "distilled" in page
    assert page.count("data:image/") >= 12
    assert "mIoU" in capsys.readouterr().out
    written = (out / "data" / "shapes.json").stat().st_mtime_ns
    assert main(["demo", "--out", str(out), "--images", "40", *SHORT]) == 0  # a second time, on the same data
    assert (out / "data" / "shapes.json").stat().st_mtime_ns == written
    assert ", reused" in capsys.readouterr().out
    run = out / "seed0/distilled"
    assert main(["distill", str(run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    first, again = (load_file(folder / "last/model.safetensors") for folder in (run, tmp_path / "again"))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert main(["report", str(run), "--split", "testA", "--examples", "1", "--no-teacher"]) == 0
    assert "refcoco (unc) testA" in (run / "report.html").read_text(encoding="utf-8")


def test_demo_replaces_no_other_data_unless_requested(tmp_path, capsys):
    assert main(["data", "make-shapes", str(tmp_path / "data"), "--images", "20"]) == 0
    assert main(["demo", "--out", str(tmp_path), "--images", "40", "--no-overwrite", *SHORT]) == 2
    assert "already holds a shapes set" in capsys.readouterr().err
    assert json.loads((tmp_path / "data" / "shapes.json").read_text())["images"] == 20


def test_relative_cost_ignores_changes_of_load(monkeypatch):
    from fastkd.cli._grid.costs import Candidate, relative_costs
    from fastkd.train import TrainConfig, TrainResult

    load = iter([1, 1, 1, 50, 50, 50, 1, 1, 3, 3])  # in ten turns; one pair of turns straddles a change

    def fake_train(subject, dataset, config, **rest):
        seconds = next(load) * {"alone": 1.0, "distilled": 2.4}[subject]
        return TrainResult(history=[{"seconds": 7.0}, {"seconds": 7.0 + seconds}])

    monkeypatch.setattr("fastkd.train.train", fake_train)
    config = TrainConfig(device="cpu")
    candidates = [Candidate(name, [], config) for name in ("alone", "distilled")]
    assert relative_costs(candidates) == pytest.approx([1, 2.4])


def test_relative_cost_alternates_the_models(shapes):
    from fastkd.cli._data import open_split
    from fastkd.cli._grid.costs import Candidate, relative_costs
    from fastkd.cli._models import build_model, shapes_teacher
    from fastkd.models import RISModel
    from fastkd.train import TrainConfig

    dataset = open_split(shapes, "train", RISModel.from_pretrained(shapes_teacher()), sentences="random", seed=0)
    students, steps = [build_model("shapes-student", 0) for _ in range(2)], []
    for number, student in enumerate(students):
        student.register_forward_hook(lambda *call, number=number: steps.append(number))
    config = TrainConfig(batch_size=1, threads=1, tracker=("wandb",))
    first, second = relative_costs([Candidate(student, dataset, config) for student in students], rounds=2)
    assert first == 1
    assert 0 < second < math.inf
    assert steps == ([0] * 25 + [1] * 25) * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["distill", "--data", "nowhere", "--out", "{run}"], "continue it with resume=True (--resume)"),
        (["distill", "--data", "nowhere", "--out", "{other}", "--resume"], "is not a run"),
        (["train", "--data", "nowhere", "--out", "{run}/log.jsonl/new"], "cannot be a folder"),
        (["distill", "--data", "nowhere", "--out", "{run}", "--resume", "--overwrite"], "pass one of them"),
        (["distill", "--data", "nowhere", "--out", "{tmp}/new", "--tracker", "mlflow"], "pip install mlflow"),
        (["demo", "--out", "{tmp}/new", "--tracker", "mlflow"], "pip install mlflow"),
        (["demo", "--out", "{tmp}", "--no-overwrite"], "holds an earlier run"),
        (["demo", "--out", "{tmp}/new", "--seeds"], "--seeds must be one or more different integers, got none"),
        (["demo", "--out", "{tmp}/new", "--seeds", "1", "0", "1"], "different integers, got 1 0 1"),
    ],
)
def test_folders_and_trackers_are_checked_before_any_work(args, message, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "mlflow" else find(name, *rest))
    run = tmp_path / "seed0" / "distilled"
    other = tmp_path / "other"
    for file in (run / "log.jsonl", other / "notes.txt"):
        file.parent.mkdir(parents=True)
        file.touch()
    try:
        status = main([arg.format(tmp=tmp_path, run=run, other=other) for arg in args])
    except SystemExit as stop:  # raised by the argument parser
        status = stop.code
    assert status == 2
    output = capsys.readouterr()
    assert message in " ".join((output.err + output.out).split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "seed0"]


def test_rejects_a_model_configuration_that_is_not_json(shapes, tmp_path, capsys):
    broken = tmp_path / "model.json"
    broken.write_text("{not json")
    assert main(["train", "--data", str(shapes), "--out", str(tmp_path / "out"), "--model", str(broken)]) == 2
    assert f"{broken} is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["evaluate", "--data", "{shapes}", "--model", "/nowhere"], "/nowhere"),
        (["evaluate", "--data", "{shapes}", "--model", "shape"], "Did you mean 'shapes' or 'shapesref'?"),
        (["evaluate", "--data", "/nowhere", "--model", "shapes"], "/nowhere"),
        (["evaluate", "--data", "{shapes}", "--model", "shapes", "--split", "tset"], "tset"),
        (["evaluate", "--data", "{shapes}", "--model", "shapes", "--protocol", "lavt480"], "480"),
        (["evaluate", "--data", "{shapes}", "--model", "shapes", "--out-samples", "{tmp}/a.csv"], "--out-samples"),
        (["evaluate", "--data", "{shapes}", "--model", "shapes", "--mix", "refcoco+"], "--mix is for training sets"),
        (["evaluate", "--data", "{shapes}", "--model", "shapes", "--out", "{tmp}"], "is a folder; pass the name of a"),
        (["evaluate", "--data", "{shapes}", "--model", "shapes", "--against", "{tmp}/a.jsonl"], "no file"),
        (
            [
                "evaluate",
                "--data",
                "{shapes}",
                "--model",
                "shapes",
                "--against",
                "{tmp}/a.jsonl",
                "--out-samples",
                "{tmp}/b/../a.jsonl",
            ],
            "--against and --out-samples are the same file",
        ),
        (["train", "--data", "{shapes}", "--out", "{tmp}", "--model", "shapes-studnet"], "shapes-student"),
        (["train", "--data", "{shapes}", "--out", "{tmp}", "--model", "some/folder"], "some/folder"),
        (["train", "--data", "{shapes}", "--out", "{tmp}", "--steps", "0"], "steps"),
        (["train", "--data", "{shapes}", "--out", "{tmp}", "--tracker", "wandb", "tensorbord"], "tensorboard"),
        (["distill", "--data", "{shapes}", "--out", "{tmp}", "--terms", "first_ordre=1"], "first_order"),
        (["distill", "--data", "{shapes}", "--out", "{tmp}", "--terms", "first_order"], "name=share"),
        (["distill", "--data", "{shapes}", "--out", "{tmp}", "--terms", "logit=-1"], "logit"),
        (["data", "make-shapes", "{shapes}", "--images", "40"], "overwrite"),
        (["data", "make-shapes", "{tmp}/new", "--images", "1"], "images"),
        (["data", "make-shapesref", "{tmp}/new", "--images", "1"], "images"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args, message, shapes, tmp_path, capsys):
    args = [arg.format(shapes=shapes, tmp=tmp_path) for arg in args]
    try:
        status = main(args)
    except SystemExit as stop:  # raised by the argument parser
        status = stop.code
    assert status == 2
    error = capsys.readouterr()
    assert message in error.err + error.out


def test_traceback_on_request(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTKD_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["evaluate", "--data", str(tmp_path / "none"), "--model", "shapes"])

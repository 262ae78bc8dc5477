"""Runs from a YAML configuration: types, errors, recipes, weights, and the configuration in a run's folder."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("timm", reason="needs the [ris] extra")

import torch
import tyro
import yaml
from tiny_lavt import CHECKPOINT_BERT, bert_weights, weights
from tiny_models import tiny

from fastkd.cli import main
from fastkd.cli._data import DataArgs
from fastkd.cli._models import build_model, warn_of_random_weights
from fastkd.cli._settings import (
    DistillSettings,
    TermSettings,
    TrainSettings,
    parse_taps,
    parse_terms,
    show_taps,
    show_terms,
)
from fastkd.cli._terms import attention_taps, build_terms, check_attention, shares_of
from fastkd.cli._yaml import dump_settings, load_settings, recipes
from fastkd.data import make_shapes
from fastkd.data._assets import SHAPES_VOCABULARY_FILE
from fastkd.distill import AttentionTap, Schedule
from fastkd.errors import FastKDWarning
from fastkd.losses import FeatureKD
from fastkd.models import LAVT, LAVTConfig, list_presets, preset
from fastkd.models.presets import published_text_weights

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text("utf-8")
[EXAMPLE, STAGES] = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SHORT = ["--batch-size", "4", "--threads", "1", "--log-every", "1", "--eval-every", "None"]

OUT_NAMES = ("of the file", "of the flag")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "data"
    make_shapes(root, images=20, image_size=64)
    return root


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def start_line(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "log.jsonl").read_text("utf-8").splitlines()[0])


def test_run_of_the_page_and_the_same_run_from_its_folder(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    flags = ["--data", str(shapes), *SHORT, "--steps", "3", "--warmup", "0"]
    config = write(tmp_path, EXAMPLE.replace("stop: 800", "stop: 3").replace("start: 100", "start: 2"))
    assert main(["distill", config, "--out", str(out), *flags]) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    assert log[0]["weights"]["mask"] == 2.0
    assert log[0]["gradients"]["shares"]["first_order"] == pytest.approx(0.5, rel=0.5)  # of the first batch of four
    assert [line["terms"]["middle"] > 0 for line in log if line["event"] == "train"] == [False, False, True]
    assert main(["distill", str(out / "config.yaml"), "--out", str(again)]) == 0
    cache, cached = tmp_path / "cache", tmp_path / "cached"
    assert main(["cache", str(out / "config.yaml"), "--out", str(cache)]) == 0
    assert main(["distill", str(out / "config.yaml"), "--out", str(cached), "--teacher-cache", str(cache)]) == 0
    narrow = ["cache", str(out / "config.yaml"), "--out", str(tmp_path / "narrow"), "--dtype", "int8"]
    assert main(narrow) == 0  # its error is that of all terms, with student taps and without schedules
    assert "error of the gradients up to" in capsys.readouterr().out
    assert main([*narrow, "--terms", "mask=1,schedule=linear,start=2000", "--overwrite"]) == 0
    weights = [(folder / "last" / "model.safetensors").read_bytes() for folder in (out, again, cached)]
    assert weights[0] == weights[1] == weights[2]
    written = [yaml.safe_load((folder / "config.yaml").read_text("utf-8")) for folder in (out, again)]
    assert written[0] | {"out": str(again)} == written[1]
    assert (written[0]["data"], written[0]["mask_rule"], written[0]["lr"]) == (str(shapes), "union", 1e-3)
    capsys.readouterr()
    resumed = ["distill", str(out / "config.yaml"), "--resume"]
    assert main([*resumed, "--mask-rule", "lavt", "--task", "start=1"]) == 2
    error = capsys.readouterr().err
    assert "mask_rule: 'union' → 'lavt'" in error
    assert "schedules.task: None → {" in error
    assert main([*resumed, "--steps", "4", "--resume-allow", "steps"]) == 0
    assert yaml.safe_load((out / "config.yaml").read_text("utf-8"))["steps"] == 4


@pytest.mark.parametrize("name", ["shapes", "refcoco-lavt-swin-t", "refcoco-custom"])
def test_recipe_is_complete_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    given = yaml.safe_load(recipes()[name].read_text("utf-8"))
    settings = load_settings(DistillSettings, name)
    assert {key for key, value in given.items() if value == "???"} <= {"data", "out", "teacher", "student"}
    if given["student"] != "???":
        assert settings.student in list_presets()
    assert shares_of(settings.terms).keys() == settings.terms.keys()
    assert [term.name for term in build_terms(settings.terms, settings.config.steps)] == list(settings.terms)
    settings = replace(
        settings, data=replace(settings.data, data=tmp_path), out=tmp_path, teacher="t", student="shapes-student"
    )
    assert load_settings(DistillSettings, write(tmp_path, dump_settings(settings))) == settings


def test_zeros_survive_a_round_trip(tmp_path: Path) -> None:
    text = "data: a\nout: b\nteacher: t\nstudent: s\nworkers: 0\n"
    text += "terms: {mask: {weight: 0, initial: 0}}\ntask: {initial: 0}"
    settings = load_settings(DistillSettings, write(tmp_path, text))
    assert (settings.terms["mask"].weight, settings.terms["mask"].initial, settings.task.initial) == (0, 0, 0)
    assert load_settings(DistillSettings, write(tmp_path, dump_settings(settings))) == settings


def test_value_to_be_given_by_a_flag_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, "data: ???\nout: b\nteacher: shapes\nstudent: shapes-student\nterms: {mask: 1}")
    assert load_settings(DistillSettings, config).data.data is tyro.MISSING
    with pytest.raises(SystemExit):
        main(["distill", config])
    assert "--data PATH" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["shapes", "refcoco-custom"])
def test_recipe_runs(name: str, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--data", shapes, "--out", out, "--steps", "1", "--workers", "0", "--checkpoint-every", "None", *SHORT]
    flags += ["--teacher", "shapes", "--student", "shapes-student"] if name == "refcoco-custom" else []
    assert main(["distill", name, *map(str, flags)]) == 0
    assert start_line(out)["weights"].keys() == load_settings(DistillSettings, name).terms.keys()


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| `(--[^`]*)` \|$", PAGE, re.MULTILINE)
    assert {name for name, _ in rows} == set(recipes()) == {line.partition(":")[0] for line in listed.splitlines()}
    for name, flags in rows:
        text = recipes()[name].read_text("utf-8")
        assert main(["recipes", name]) == 0
        assert capsys.readouterr().out == text
        assert re.findall(r"^(\w+): \?\?\?", text, re.MULTILINE) == flags.replace("--", "").split()
    assert main(["recipes", "shape"]) == 2
    assert "no recipe is named 'shape'. Did you mean 'shapes'?" in capsys.readouterr().err


def test_recipe_of_lavt_runs_with_local_weights(shapes: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    teacher, text = tmp_path / "lavt.pth", tmp_path / "bert"
    bert = bert_weights(**CHECKPOINT_BERT)
    torch.save({"model": weights(depths=(1, 1, 1, 1)), "bert_model": bert}, teacher)
    BertModel(BertConfig(**CHECKPOINT_BERT), add_pooling_layer=False).save_pretrained(text)
    config = tiny("swin", text=CHECKPOINT_BERT, image_size=64).to_dict()
    student = tmp_path / "student.json"
    student.write_text(json.dumps(config), encoding="utf-8")
    flags = ["--data", shapes, "--teacher", teacher, "--student", student, "--tokenizer", "shapes", "--steps", "1"]
    flags += ["--workers", "0", "--backbone-weights", "None", "--text-weights", text, "--checkpoint-every", "None"]
    flags += ["--allow-untrained-teacher", "--out", tmp_path / "out", *SHORT]
    recipe = recipes()["refcoco-lavt-swin-t"].read_text("utf-8")
    widths = [
        f"{{student_channels: {ours}, teacher_channels: {theirs}}}"
        for ours, theirs in (
            (preset("swin-tiny-bert").decoder_width, LAVTConfig.hidden),
            (config["decoder_width"], LAVT.from_pretrained(teacher).config.hidden),
        )
    ]
    assert widths[0] in recipe
    changed = write(tmp_path, recipe.replace(*widths))
    with pytest.warns(FastKDWarning, match="backbone start from random weights.*--backbone-weights timm"):
        assert main(["distill", changed, *map(str, flags)]) == 0
    assert start_line(tmp_path / "out")["config"]["lr"] == 5e-5
    model = build_model(str(student), 0, "shapes", text_weights=str(text))
    loaded = BertModel.from_pretrained(text, add_pooling_layer=False)
    for ours, theirs in zip(model.text_encoder.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_tilde_is_the_home_folder_in_files_and_flags(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertConfig, BertModel

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes, tmp_path / "home" / "data")
    text = tmp_path / "home" / "bert"
    BertModel(BertConfig(**CHECKPOINT_BERT), add_pooling_layer=False).save_pretrained(text)
    shutil.copy(SHAPES_VOCABULARY_FILE, text / "vocab.txt")
    config = tiny("swin", text=CHECKPOINT_BERT, image_size=64).to_dict()
    (tmp_path / "home" / "student.json").write_text(json.dumps(config), encoding="utf-8")
    lines = ("student: ~/student.json", "tokenizer: ~/bert", "text_weights: ~/bert", "backbone_weights: random")
    file = write(tmp_path, "\n".join((*lines, "steps: 1", "eval_every: null", "out: ~/of the file")))
    options = ["--allow-untrained-teacher", "--terms", "mask,weight=1", *SHORT]
    assert main(["distill", file, "--data=~/data", *options]) == 0
    assert main(["distill", file, "--data=~/data", "--out=~/of the flag", *options]) == 0
    runs = [load_settings(DistillSettings, str(tmp_path / "home" / name / "config.yaml")) for name in OUT_NAMES]
    for name, run in zip(OUT_NAMES, runs, strict=True):
        assert run.out == tmp_path / "home" / name
        assert (run.data.data, run.data.tokenizer) == (tmp_path / "home" / "data", str(text))
        assert (run.student, run.text_weights) == (str(tmp_path / "home" / "student.json"), str(text))
    assert not (tmp_path / "~").exists()


def test_random_weights_are_warned_of_unless_requested(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(config=preset("swin-tiny-bert"))
    with pytest.warns(FastKDWarning) as caught:
        warn_of_random_weights("swin-tiny-bert", model, None, None)
    [warning] = caught
    text = str(warning.message)
    assert text.startswith("swin-tiny-bert: backbone and text encoder start from random weights")
    assert "--backbone-weights timm" in text
    assert "--text-weights google-bert/bert-base-uncased" in text
    warn_of_random_weights("swin-tiny-bert", model, "random", "random")  # a warning would be an error
    warn_of_random_weights("shapes-student", SimpleNamespace(config=preset("shapes-student")), None, None)  # type: ignore[arg-type]
    others = {name: published_text_weights(preset(name)) for name in list_presets() if not name.startswith("shapes")}
    assert all(others.values()), others
    with pytest.raises(ValueError, match=r"--text-weights bert: .* has its own weights"):
        build_model(str(tmp_path), 0, text_weights="bert")


def test_data_options_reach_the_dataset(shapes: Path, tmp_path: Path) -> None:
    root, images = tmp_path / "data", tmp_path / "elsewhere"
    shutil.copytree(shapes, root)
    (root / "images" / "train2014").rename(images)
    data = DataArgs(root, image_root=images, mask_rule="lavt", sentence_field="raw")
    refs = data.open("val", build_model("shapes-student", 0), sentences="all").refcoco
    assert (refs.image_root, refs.mask_rule, refs.sentence_field) == (images, "lavt", "raw")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "no setting is named 'stepz'. Did you mean 'steps'"),
        ("steps: many", "steps must be an integer, got 'many' (str)"),
        ("steps: true", "steps must be an integer, got True (bool)"),
        ("steps: 0", "steps must be an integer >= 1, got 0"),
        ("lr: [1]", "lr must be a number, got [1] (list)"),
        ("channels_last: 'yes'", "channels_last must be true or false, got 'yes'"),
        ("ema: fast", "ema must be a number or null, got 'fast'"),
        ("mask_rule: lavd", "mask_rule must be one of 'union', 'lavt', got 'lavd'"),
        ("data: 3", "data must be a path, got 3 (int)"),
        ("terms: first_order", "terms must be a mapping, got 'first_order'"),
        ("terms: {mask: yes}", "terms.mask must be a number (share) or a mapping, got True"),
        ("terms: {mask: {shar: 1}}", "terms.mask: nothing is named 'shar'. Did you mean 'share'"),
        ("terms: {mask: {start: 1.5}}", "start must be a step, an integer >= 0, or a share of all steps"),
        ("terms: {mask: {stop: 1.0}}", "between 0 and 1, got 1.0"),
        ("terms: {mask: {start: 0.5, stop: 0.4}}", "stop must be after start"),
        ("terms: {mask: {stop: half}}", "terms.mask.stop must be an integer or a number or null, got 'half'"),
        ("terms: {mask: {share: 1, weight: 2}}", "terms.mask: share=1 and weight=2 exclude each other"),
        ("terms: {mask: -1}", "terms.mask: share must be a finite number >= 0, got -1"),
        ("task: {schedule: step}", "task.schedule must be one of 'constant', 'linear', 'cosine', got 'step'"),
        ("task: {start: 9, stop: 3}", "stop must be after start, got start=9 and stop=3"),
        ("teacher_taps: {map: [a, b, c]}", "teacher_taps.map must be text or a list of text and an integer or text"),
        *(
            (f"{flag}: null", f"{flag} is not a setting of the run: pass --{flag.replace('_', '-')}")
            for flag in ("overwrite", "resume", "resume_allow", "replay", "preflight_only")
        ),
        ("lr: 1\nlr: 2", "not YAML: 'lr' appears twice"),
        ("lr: [1", "not YAML"),
        ("- steps", "must hold a mapping of settings"),
        ("out: !!python/name:os.system", "not YAML"),
    ],
)
def test_mistake_in_a_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load_settings(DistillSettings, write(tmp_path, text))
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}")


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("first_ordre: 1", "no term named 'first_ordre'. Did you mean 'first_order'"),
        ("mask: {start: 1}", "'mask' needs a share or a weight"),
        ("pixel_pixel: {share: 1, temperature: 2}", "pixel_pixel_kd has no option 'temperature'"),
        (
            "mask: {share: 1, options: {temperatur: 2}}",
            "logit_kd has no option 'temperatur'. Did you mean 'temperature'",
        ),
        ("mid: {share: 1, loss: chanel_kd, student: a}", "fastkd.losses has no 'chanel_kd'. Did you mean 'channel_kd'"),
        ("mid: {share: 1, loss: channel_kd}", "loss='channel_kd' needs student"),
        (
            "mid: {share: 1, loss: feature_kd, student: a, options: {teacher: b}}",
            "feature_kd has no option 'teacher'",
        ),
        ("mid: {share: 1, loss: ChannelKD, student: a, options: {chanels: 3}}", "ChannelKD has no option 'chanels'"),
    ],
)
def test_mistake_in_a_term_is_named(term: str, message: str, tmp_path: Path) -> None:
    settings = load_settings(DistillSettings, write(tmp_path, f"terms: {{{term}}}"))
    with pytest.raises(ValueError) as error:
        (build_terms(settings.terms, 100), shares_of(settings.terms))
    assert message in str(error.value)


def test_widths_are_options_of_a_loss_module(tmp_path: Path) -> None:
    options = "options: {student_channels: 3, teacher_channels: 5, aligner: mlp}"
    file = write(tmp_path, f"terms: {{mid: {{share: 1, loss: FeatureKD, student: a, {options}}}}}")
    [term] = build_terms(load_settings(DistillSettings, file).terms, 100)
    assert isinstance(term.loss, FeatureKD)
    assert [tuple(p.shape) for p in term.loss.parameters()] == [(5, 3), (5, 5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "no.yaml"], "no configuration at no.yaml, and no recipe of that name"),
        (["distill", "shape"], "Did you mean 'shapes'"),
        (["distill", "{run}"], "no recipe of that name. Did you mean {run}/config.yaml?"),
        (["distill", "shapes", "--data", "d", "--out", "o", "--terms"], "terms: none is given"),
        (["train", "shapes"], "no setting is named 'teacher'"),
        (["cache", "{stream}", "--out", "{out}"], "shards are read in sequence, so their teacher cannot be cached"),
        (["distill", "--steps", "2", "shapes", "--data", "d", "--out", "o"], "must directly follow the command"),
        (
            ["distill", "{file}", "--data", "{shapes}", "--out", "{out}"],
            "student: path 'midle': RISOutput has no 'midle'",
        ),
        (["distill", "{file}", "--data", "{shapes}", "--out", "{out}"], "'middle'"),
        (
            ["train", "--data", "{shapes}", "--shards", "{run}", "--mix", "refcoco+", "--out", "{out}"],
            "--mix refcoco+ and --shards exclude each other: shards hold the whole training set",
        ),
    ],
)
def test_mistake_on_the_command_line_is_one_line(
    arguments: list[str], message: str, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = "terms: {mid: {loss: channel_kd, weight: 1, student: midle, teacher: middle}}"
    file = write(
        tmp_path, f"{terms}\nstudent_taps: {{middle: decoder}}\nteacher_taps: {{middle: decoder}}\nbatch_size: 2"
    )
    stream = tmp_path / "stream.yaml"
    stream.write_text(f"shards: shards\ndata: {shapes}\n", encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(file, run / "config.yaml")
    names = {"file": file, "stream": stream, "shapes": shapes, "out": tmp_path / "out", "run": run}
    assert main([each.format(**names) for each in arguments]) == 2
    error = capsys.readouterr().err
    assert message.format(**names) in error
    assert error.startswith("fastkd: error: ")
    assert not (tmp_path / "out").exists()


def test_texts_of_flags_are_those_that_are_parsed() -> None:
    terms = {
        "first_order": TermSettings(share=0.5, schedule="linear", start=3, stop=9, final=0.25),
        "mid": TermSettings(weight=2.0, loss="channel_kd", student="a", teacher="b", temperature=0.1),
        "pair": TermSettings(
            share=1.0, loss="LogitKD", student=("a", "b"), temperature=(2.0, 4.0), options={"x": 1, "y": [2, 3]}
        ),
        "attention": TermSettings(share=0.1, options={"relation_heads": 2, "query_mask": "batch.word_mask"}, stop=3),
    }
    assert parse_terms(show_terms(terms)) == terms
    taps = {"a": "layers.1", "b": ("text", "last_hidden_state"), "c": ("fusion", 0), "d": "layers.2.attn[0:1,5:]"}
    assert parse_taps(show_taps(taps)) == taps
    for texts in (["a"], ["a=b", "a=c"], ["=b"]):
        with pytest.raises(ValueError, match="expected each tap once, as name=path"):
            parse_taps(texts)
    for texts in (["=0.5"], ["mask=1", "mask=2"], ["mask=1,share=2"], ["mask=1,start"], ["mask=x"]):
        with pytest.raises(ValueError, match="name=share"):
            parse_terms(texts)


def test_taps_with_brackets_are_attention_taps() -> None:
    taps = {"a": "layers.1", "b": ("text", 0), "c": "blocks.2.attn[0:1,5:]", "d": "blocks.3.attn[:]"}
    ours = {"c": AttentionTap("blocks.2.attn", "0:1,5:"), "d": AttentionTap("blocks.3.attn")}
    found = attention_taps(taps)
    assert found == taps | ours
    assert [type(found[name]) for name in "cd"] == [AttentionTap] * 2
    assert attention_taps({}) is None
    [term] = build_terms({"attention": TermSettings(share=1.0, student="c", teacher="d")}, 10)
    check_attention([term], student_taps=found, teacher_taps=found)
    with pytest.raises(ValueError, match=r"terms.attention: .* none named 'd': give --teacher-taps d=PATH\[:\]"):
        check_attention([term], student_taps=found, teacher_taps=attention_taps({"d": "blocks.3.attn"}))


def test_schedule_without_stop_ends_with_the_run() -> None:
    [term] = build_terms({"mask": TermSettings(share=1.0, schedule="linear")}, 50)
    assert term.schedule == Schedule("linear", stop=50)
    assert build_terms({"mask": TermSettings(share=1.0)}, 50)[0].schedule is None
    late = TermSettings(share=1.0, schedule="linear", start=80)
    assert build_terms({"mask": late}, 50)[0].schedule == Schedule("linear", start=80, stop=81)  # the run warns


def test_steps_of_a_schedule_may_be_shares_of_the_run() -> None:
    settings = parse_terms(["mask=1,start=0.25,stop=0.75"])
    assert parse_terms(show_terms(settings)) == settings
    assert build_terms(settings, 50)[0].schedule == Schedule(start=12, stop=38)
    half = TermSettings(share=1.0, stop=0.5)
    assert [half.resolve(steps) for steps in (1600, 3, 1)] == [Schedule(stop=stop) for stop in (800, 2, 1)]
    mixed = TermSettings(share=1.0, start=100, stop=0.5)
    assert mixed.resolve(1000) == Schedule(start=100, stop=500)
    for term, steps, given, found in (
        ("mask=1,start=100,stop=0.5", 100, "start=100 and stop=0.5", "100 and 50"),
        ("mask=1,start=0.5,stop=0.51", 20, "start=0.5 and stop=0.51", "10 and 10"),
    ):
        with pytest.raises(ValueError, match=f"^terms.mask: .*{given}, which of {steps} steps are {found}"):
            build_terms(parse_terms([term]), steps)
    for wrong in ("start=-5,stop=0.5", "start=0.5,stop=-5", "start=5,stop=0.5,initial=-1", "start=0.5,stop=9,final=-1"):
        with pytest.raises(ValueError, match=r"must be a (step|finite number)"):
            parse_terms([f"mask=1,{wrong}"])


def test_two_stages_of_the_page(shapes: Path, tmp_path: Path) -> None:
    config = write(tmp_path, STAGES)
    assert main(["distill", config, "--data", str(shapes), "--out", str(tmp_path / "out"), "--steps", "2", *SHORT]) == 0
    lines = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text("utf-8").splitlines())
    first, second = (line for line in lines if line["event"] == "train")
    weight = first["loss"] / first["terms"]["first_order"]  # of the term alone
    assert weight == pytest.approx(start_line(tmp_path / "out")["weights"]["first_order"], rel=1e-4)
    assert (second["terms"]["first_order"], second["loss"]) == (0, second["task"])


def test_help_shows_the_values_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["distill", "shapes", "--help"])
    shown = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "first_order=2.0,stop=0.5 channel_distribution=16.0)" in shown
    assert "Peak learning rate of AdamW. (default: 0.001)" in shown


def test_train_reads_exponents_without_a_dot_as_numbers(shapes: Path, tmp_path: Path) -> None:
    config = write(tmp_path, f"data: {shapes}\nout: {tmp_path / 'out'}\nlr: 2e-3\nweight_decay: 5E-2\nsteps: 1")
    assert main(["train", config, *SHORT]) == 0
    started = start_line(tmp_path / "out")["config"]
    assert (started["lr"], started["weight_decay"], started["steps"]) == (2e-3, 0.05, 1)
    written = load_settings(TrainSettings, str(tmp_path / "out" / "config.yaml"))
    assert (written.data.data, written.config.lr, written.model) == (shapes, 2e-3, "shapes-student")

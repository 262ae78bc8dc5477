"""Planted biases are what they are called, and the shares handed on are those of hand-made predictions."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torchmetrics", reason="needs the [ris] extra")

from benchmarks.evidence.bias import __main__ as command
from benchmarks.evidence.bias import measure, scenes, study, tables
from benchmarks.evidence.bias.measure import ALONE, BIASED, CONTROL, TEACHER
from benchmarks.evidence.tables import ROWS
from fastkd.cli._grid.records import append_records, encode_images, encode_iou, read_records
from fastkd.data.shapes import meaning as m

IMAGES = 60
SENTENCES = 40


@pytest.fixture(scope="module")
def drawn():
    """Return (split, scene, clean, biased and counterpart expression) of every sentence."""
    found = []
    for index in range(IMAGES):
        scene, clean = scenes.draw(index, 1)
        biased, others = scenes.draw_biased(index, 1)[1], scenes.draw_counterparts(index, 1)[1]
        found += [(scenes.split_of(index), scene, *each) for each in zip(clean, biased, others, strict=True)]
    return found


def test_clean_sentences_identify_their_target_and_have_one_bias_at_most(drawn):
    for _, scene, clean, _, _ in drawn:
        assert m.identify(clean.meaning, scene) == clean.target
        words = set(clean.text.split())
        touched = {
            "colours": bool(words & {"red", "green"}),
            "left": bool(words & {"biggest", "largest", "smallest"}),
            "blind": scene.shapes[clean.target].kind == "star",
        }
        assert [name for name, value in touched.items() if value] == [name for name in touched if name == clean.kind], (
            clean.text
        )


def test_biased_set_changes_what_the_role_states(drawn):
    changed = dict.fromkeys(scenes.ROLE_SHARES, 0)
    for _, scene, clean, biased, _ in drawn:
        changed[clean.kind] += (biased.text, biased.target) != (clean.text, clean.target)
        if clean.kind == "colours":
            swapped = clean.text.replace("red", "?").replace("green", "red").replace("?", "green")
            assert (biased.text, biased.target) == (swapped, clean.target)
        else:
            assert biased.text == clean.text
        if clean.kind == "left":
            members = clean.meaning.noun.members(scene)
            assert biased.target in members
            assert scene.centre[biased.target][0] == min(scene.centre[i][0] for i in members)
        if clean.kind == "blind":
            assert scene.shapes[biased.target].kind != "star"
    roles = [clean.kind for _, _, clean, _, _ in drawn]
    assert changed["untouched"] == 0
    assert changed["colours"] == roles.count("colours") > 0
    assert changed["blind"] == roles.count("blind") > 0
    assert 0 < changed["left"] < roles.count("left")


def test_every_test_sentence_of_colours_and_left_has_a_counterpart(drawn):
    seen = set()
    for split, scene, clean, _, other in drawn:
        if split == "train":
            continue
        seen.add(clean.kind)
        assert scenes.SPLIT_OF_ROLE[clean.kind] == split
        if clean.kind in ("untouched", "blind"):
            assert other.target == clean.target
            continue
        assert other.target != clean.target
        one, two = scene.shapes[clean.target], scene.shapes[other.target]
        if clean.kind == "colours":
            assert {one.colour, two.colour} == {"red", "green"}
        else:
            assert scene.centre[other.target][0] <= scene.centre[clean.target][0] - m.MARGIN
    assert seen == set(scenes.ROLE_SHARES)


def test_sets_share_images_and_differ_in_targets(tmp_path):
    from fastkd.data import RefCOCO

    study.make_sets(tmp_path, images=12)
    clean, other = tmp_path / "clean", tmp_path / "counterparts"
    for file in sorted((clean / "images" / "train2014").iterdir()):
        assert file.read_bytes() == (other / "images" / "train2014" / file.name).read_bytes()
    for split, differ in (("val", False), ("testA", True), ("testB", True), ("testC", False)):
        masks = [one.mask(one.refs[0].ref_id) for one in (RefCOCO(root, split=split) for root in (clean, other))]
        assert bool((masks[0] & masks[1]).any()) != differ
    sentences = [json.loads((tmp_path / f"teacher-{name}" / "shapes.json").read_text()) for name in ("clean", "biased")]
    assert sentences[0]["objects"] == sentences[1]["objects"]


def record(setting, row, seed, role, iou, other=None, scale=1.0):
    key = {"setting": setting, "student": "s", "row": row, "scale": scale, "seed": seed, "equal_time": False}
    run = {"steps": 10, "processor": "P", "torch": "T", "commit": "C", "digest": "d"}
    iou = np.rint(255 * np.broadcast_to(iou, SENTENCES)) / 255
    more = {} if other is None else {"other": encode_iou(np.broadcast_to(other, SENTENCES))}
    samples = {"iou": encode_iou(iou), "images": encode_images(np.arange(SENTENCES))}
    return {**key, **run, "split": scenes.SPLIT_OF_ROLE[role], **samples, **more}


def model(setting, row, seed=0, *, untouched, wrong, star, scale=1.0):
    """Return results of a model that selects the counterpart in a share ``wrong`` of the sentences that have one."""
    is_wrong = np.arange(SENTENCES) < wrong * SENTENCES
    own, other = np.where(is_wrong, 0.1, 0.6), np.where(is_wrong, 0.6, 0.1)
    roles = {"untouched": (untouched, None), "colours": (own, other), "left": (own, other), "blind": (star, None)}
    return [record(setting, row, seed, role, *values, scale=scale) for role, values in roles.items()]


def results():
    records = [
        *model(BIASED, TEACHER, untouched=0.8, wrong=0.95, star=0.1),
        *model(CONTROL, TEACHER, untouched=0.8, wrong=0.15, star=0.7),
    ]
    for seed in (0, 1):
        records += model(BIASED, ALONE, seed, untouched=0.4, wrong=0.3, star=0.4)
        for scale, more in ((0.5, 0.0), (2.0, 0.1)):
            untouched = 0.5 + more
            common = {"untouched": untouched, "scale": scale}
            records += model(CONTROL, "pixel_relation", seed, wrong=0.2, star=untouched, **common)
            records += model(CONTROL, "channel", seed, wrong=0.2, star=untouched, **common)
            records += model(BIASED, "pixel_relation", seed, wrong=0.6, star=untouched - 0.3, **common)
            records += model(BIASED, "channel", seed, wrong=0.4, star=untouched - 0.15, **common)
    return records


def test_shares_of_hand_made_predictions():
    found = measure.group(results())
    assert measure.mean_bias(found[BIASED, TEACHER, 1.0]) == pytest.approx(
        {"colours": 95, "left": 95, "blind": 70}, abs=0.3
    )
    compared = tables.comparison(found, "pixel_relation", 2.0, with_control=True)
    shares = {name: compared.handed_on((name,), 50).mean for name in measure.BIASES}
    assert shares == pytest.approx({"colours": 50, "left": 50, "blind": 50}, abs=0.8)
    assert compared.handed_on(resamples=50).mean == pytest.approx(50, abs=0.8)
    # Against the student alone: (0.6 − 0.3) / (0.95 − 0.3) of the first two, 0.3 / 0.7 of the third.
    plain = tables.comparison(found, "pixel_relation", 2.0, with_control=False)
    assert plain.handed_on(("left",), 50).mean == pytest.approx(100 * 0.3 / 0.65, abs=0.8)
    assert plain.handed_on(("blind",), 50).mean == pytest.approx(100 * 0.3 / 0.7, abs=0.8)


def test_teachers_without_a_difference_in_bias_are_refused():
    records = results()
    same = [{**r, "setting": CONTROL} for r in records if (r["setting"], r["row"]) == (BIASED, TEACHER)]
    found = measure.group([r for r in records if (r["setting"], r["row"]) != (CONTROL, TEACHER)] + same)
    with pytest.raises(ValueError, match="has no more of the bias 'colours'"):
        tables.comparison(found, "channel", 2.0, with_control=True)


def test_matched_gain_interpolates_between_factors():
    seeds, sentences = 2, 30

    def points(*pairs):
        return [tuple(np.full((seeds, sentences), value) for value in pair) for pair in pairs]

    first, second = points((0, 10), (10, 30)), points((4, 40), (8, 60))
    at, difference = measure.at_equal_gain(first, second, resamples=20)
    assert at == 6
    assert (difference.mean, difference.low, difference.high) == pytest.approx((22 - 50,) * 3)
    assert measure.at_equal_gain(first, points((11, 0), (12, 0)), resamples=20) is None
    noisy = np.random.default_rng(0).normal(0, 5, (seeds, sentences))
    wide = measure.at_equal_gain([(g, s + noisy) for g, s in first], second, resamples=200)[1]
    assert wide.low < wide.mean < wide.high


def test_page_is_made_from_results_only(tmp_path, capsys):
    path, target = tmp_path / "results.jsonl", tmp_path / "page.md"
    append_records(path, results())
    target.write_text("before\n{}\n{}\nafter\n".format(*command.MARKERS), encoding="utf-8")
    assert command.main(["page", "--results", str(path), "--write", str(target), "--resamples", "50"]) == 0
    text = target.read_text("utf-8")
    assert command.digest_of(path) in text
    lines = [line for line in text.splitlines() if line.startswith(f"| {ROWS['channel']} |")]
    assert len(lines) == 3  # two factors, and matched with pixel relation
    assert lines[-1].split("|")[4].strip().startswith("**−25")
    assert "channel relation, per sample" in (tmp_path / "evidence-bias.svg").read_text("utf-8")
    with pytest.raises(SystemExit, match="no results of teacher"):
        command.main(["page", "--results", str(tmp_path / "none.jsonl")])


def test_grids_have_the_same_rows_and_list_what_is_missing(monkeypatch):
    grids = study.load_grids()
    rows = [[row for row in grid.rows if row != ALONE] for grid in grids]
    assert rows[0] == rows[1]
    assert all(row in ROWS for row in rows[0])
    monkeypatch.setattr(study, "read_records", lambda path: [])
    every = study.missing(grids)
    assert [run.row for _, run in every[:3]] == [TEACHER, TEACHER, ALONE]
    assert len(every) == 2 + len(grids[0].seeds) * (1 + 2 * len(rows[0]) * len(grids[0].scale))
    held = [{**vars(every[2][1]), "split": split} for split in grids[0].splits]
    monkeypatch.setattr(study, "read_records", lambda path: held)
    assert every[2][1] not in [run for _, run in study.missing(grids)]
    monkeypatch.setattr(study, "read_records", lambda path: [{**held[0], "digest": "other"}])
    with pytest.raises(ValueError, match="with other settings"):
        study.missing(grids)


def test_command_runs_what_its_results_file_lacks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = {}
    for name in ("make_sets", "make_teachers"):
        monkeypatch.setattr(command, name, lambda *args: None)
    monkeypatch.setattr(command, "run_missing", lambda grids, *args: asked.update({g.results: args for g in grids}))
    assert command.main(["run", "--results", "own.jsonl", "--rows", "cwd", "--runs", "3", "--jobs", "2"]) == 0
    assert asked == {tmp_path / "own.jsonl": (["cwd"], 3, 2)}


def test_a_tiny_study_gives_results_with_counterparts(tmp_path):
    study.make_sets(tmp_path / "data", images=12)
    study.make_teachers(tmp_path / "teachers", tmp_path / "data", steps=1)
    rows = {ALONE: {}, "channel": {"terms": {"channel": 0.5}}}
    for grid, name in zip(study.load_grids(), study.TEACHERS, strict=True):
        settings = {**grid.settings, "steps": 1, "batch_size": 4, "warmup": 0}
        settings |= {"data": tmp_path / "data" / "clean", "teacher": str(tmp_path / "teachers" / name / "last")}
        settings["student"] = str(command.FOLDER / "student.json")
        paths = {"work": tmp_path, "results": tmp_path / "results.jsonl"}
        chosen = rows if name == "biased" else {"channel": rows["channel"]}
        small = replace(grid, **paths, settings=settings, rows=chosen, every_row={}, seeds=(0,), scale=(2.0,))
        study.run_missing([small], ["channel"])
        assert not study.missing([small])
    found = measure.group(read_records(tmp_path / "results.jsonl"))
    assert len(found) == 2 + 3
    for scores in found.values():
        assert [split for split, record in scores.by_seed[0].items() if "other" in record] == ["testA", "testB"]


def test_committed_page_is_made_from_the_committed_results():
    path = command.FOLDER / "results.jsonl"
    text = (command.FOLDER.parents[2] / "docs" / "evidence.md").read_text("utf-8")
    held = text.partition(command.MARKERS[0])[2].partition(command.MARKERS[1])[0]
    assert (f"digest `{command.digest_of(path)}`" in held) if path.is_file() else not held.strip()

"""Tables of experiments are those of their results."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchmetrics", reason="needs the [ris] extra")

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import tables
from fastkd.cli._grid.grid import load_grid
from fastkd.cli._grid.records import append_records, encode_images, encode_iou, read_records
from fastkd.cli._grid.runs import _terms, cache_folder
from fastkd.cli.experiments import experiments
from fastkd.evaluate import paired_bootstrap

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = {"val": 30, "testA": 40, "testB": 20}


def record(row: str, seed: int, split: str, shift: float, **changes):
    """Return a result whose sentences have random IoU around a level; codes of 8 bits, so that storage is exact."""
    rng = np.random.default_rng([seed, *split.encode(), *row.encode()])
    iou = np.rint(255 * np.clip(rng.random(SENTENCES[split]) * 0.5 + shift, 0, 1)) / 255
    scores = {"miou": 100 * iou.mean(), "oiou": 50.0, **{f"p{n}0": 100 * (iou >= n / 10).mean() for n in range(5, 10)}}
    key = {
        "setting": "main",
        "student": "s",
        "row": row,
        "scale": 1.0,
        "seed": seed,
        "split": split,
        "equal_time": True,
    }
    run = {"steps": 100, "seconds": 10.0, "relative_cost": 0.5, "sentences": len(iou), "parameters": 1234}
    where = {"processor": "P", "torch": "T", "commit": "C"}
    samples = {"iou": encode_iou(iou), "images": encode_images(np.arange(len(iou)) // 3)}  # up to 3 sentences each
    return {**key, **run, **where, **scores, **samples, **changes}


def results() -> list:
    shifts = {"method": 0.3, "alone": 0.1, "logit_feature": 0.2}
    return [record(row, seed, split, shift) for row, shift in shifts.items() for seed in (0, 1) for split in SENTENCES]


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_table_states_scores_and_gains_with_intervals():
    records = results()
    rows = tables.select(records, "main", "time")
    assert list(rows) == ["alone", "logit_feature", "method"]  # in the order of the tables
    found = cells(tables.scores_table(rows, ("testA", "testB"), resamples=200))

    def pooled(row):
        return np.array(
            [
                np.concatenate([tables._decoded(r["iou"]) for r in records if (r["row"], r["seed"]) == (row, seed)][1:])
                for seed in (0, 1)
            ]
        )

    method, alone = pooled("method"), pooled("alone")
    assert method.shape == (2, 60)
    own = found[tables.ROWS["method"]]
    assert own[:3] == ["100", "10", "2"]
    assert own[3] == f"{method.mean():.1f} ({method.mean(1).std(ddof=1):.1f})"
    images = [*(f"A{i // 3}" for i in range(40)), *(f"B{i // 3}" for i in range(20))]
    assert own[4] == tables.interval(paired_bootstrap(method, alone, groups=images, resamples=200))
    plain = pooled("logit_feature")
    assert own[5] == tables.interval(paired_bootstrap(method, plain, groups=images, resamples=200))
    assert own[4] != tables.interval(paired_bootstrap(method, alone, resamples=200))
    assert own[6] == found["student alone"][4] == ""
    assert found["student alone"][6] == own[4]
    assert found[tables.ROWS["logit_feature"]][6] == own[5]
    assert own[8] == f"{100 * (method >= 50).mean():.1f}"
    assert own[4].startswith("**+")


@pytest.mark.parametrize(("row", "seed"), [("method", 1), ("alone", 0)])
def test_results_on_other_sets_are_not_compared(row, seed):
    records = results()
    for one in records:
        if (one["row"], one["split"]) == (row, "testA") and one["seed"] >= seed:
            one["images"] = encode_images(np.arange(40) // 2)
    rows = tables.select(records, "main", "time")
    with pytest.raises(ValueError, match="of different sets: run them again"):
        tables.gain(rows["method"], rows["alone"], ["testA", "testB"], 20)
    assert tables.gain(rows["method"], rows["alone"], ["val", "testB"], 20).samples == 10 + 7


def test_gains_use_common_seeds_only():
    records = [r for r in results() if not (r["row"] == "alone" and r["seed"] == 1)]
    rows = tables.select(records, "main", "time")
    assert tables.gain(rows["method"], rows["alone"], ["val"], 20).seeds == 1
    rows = tables.select([r for r in records if r["row"] != "alone" or r["split"] == "val"], "main", "time")
    assert tables.gain(rows["method"], rows["alone"], ["testA"], 20) is None


def test_equal_steps_include_a_reference_of_equal_steps():
    timed = [record("method", 0, "val", 0.3, relative_cost=1), record("alone", 0, "val", 0.1, steps=180)]
    records = [*timed, record("alone", 0, "val", 0.1, equal_time=False, relative_cost=None)]
    assert list(tables.select(records, "main", "steps")) == ["alone", "method"]
    assert tables.select(records, "main", "steps")["alone"].by_seed[0]["val"]["steps"] == 100
    assert tables.select(records, "main", "time")["alone"].by_seed[0]["val"]["steps"] == 180
    timed[0]["steps"] = 90  # the reference of another number of steps
    assert list(tables.select(records, "main", "steps")) == ["alone"]


def test_tuning_table_marks_the_best_scale():
    records = [record("logit", 0, "val", shift, scale=scale) for scale, shift in ((0.5, 0.1), (1.0, 0.3), (2.0, 0.2))]
    own = cells(tables.tuning_table(records, "main"))["+ logit"]
    assert [cell.startswith("**") for cell in own] == [False, True, False]


def test_variants_are_compared_with_their_row():
    shifts = {"cwd": 0.1, "cwd_guided": 0.2, "cwd_guided_own": 0.3, "cwd_temperature_1": 0.1, "attention": 0.1}
    records = [record(row, seed, "val", shift) for row, shift in shifts.items() for seed in (0, 1)]
    rows = tables.select(records, "main", "time")
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in tables.variants_table(rows, ["val"], 50).splitlines()
    ]
    described = {name: tables.ROWS[name] for name in ("cwd", "cwd_guided", "attention")}
    assert [line[:2] for line in lines[2:]] == [
        [described["cwd"], ""],
        [described["cwd"], "guided"],
        [described["cwd"], "temperature 1"],
        [described["cwd_guided"], "own"],
        [described["attention"], ""],
    ]
    assert lines[2][-1] == ""
    assert lines[5][-1] == tables.interval(tables.gain(rows["cwd_guided_own"], rows["cwd_guided"], ["val"], 50))


def test_page_and_figure_are_written_from_results_only(tmp_path, capsys):
    append_records(tmp_path / "main.jsonl", results())
    append_records(tmp_path / "more.jsonl", [record("logit", 0, "val", 0.2, setting="other", equal_time=False)])
    target = tmp_path / "page.md"
    target.write_text("before\n{}\nearlier text\n{}\nafter\n".format(*command.MARKERS), encoding="utf-8")
    for _ in range(2):
        assert command.main(["--results", str(tmp_path), "--write", str(target), "--resamples", "50"]) == 0
        text = target.read_text("utf-8")
        assert text.startswith("before\n")
        assert "earlier text" not in text
        assert command.digest_of(tmp_path) in text
        assert "### main: equal wall-clock time" in text
        assert "1,234 parameters in every row" in text
    drawing = target.with_suffix(".svg").read_text("utf-8")
    assert drawing.count("the method") >= 1
    assert command.main(["--results", str(tmp_path), "--resamples", "50"]) == 0
    assert capsys.readouterr().out.strip() in text
    with pytest.raises(SystemExit, match="no results"):
        command.main(["--results", str(tmp_path / "none")])


def test_confirmation_is_also_shown_with_the_seeds_of_the_main_comparison():
    confirmed = [
        record(row, 5, split, 0.2, setting="confirmation")
        for row in ("method", "alone")
        for split in ("testA", "testB")
    ]
    found = command.page([*results(), *confirmed], "digest", resamples=20)
    headings = re.findall(r"### (.*):", found)
    assert headings == ["main", "confirmation", "main and confirmation together"]
    last = cells(found.rpartition("testA and testB:")[2].partition("Student:")[0].strip())
    assert {name: row[2] for name, row in last.items() if name.startswith(("student", "+"))} == dict.fromkeys(
        (tables.ROWS["method"], tables.ROWS["alone"]), "3"
    )


@pytest.mark.parametrize("path", sorted(command.RESULTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_grids_can_be_built(path):
    grid = load_grid(path)
    assert len(_terms(grid)) >= 4
    assert cache_folder(grid).is_relative_to(grid.work)
    assert grid.results.parent == path.parent
    assert grid.setting in command.VARIANTS or set(grid.rows) <= set(tables.ROWS)


def test_committed_page_is_made_from_the_committed_results():
    text = (ROOT / "docs" / "evidence.md").read_text("utf-8")
    digests = re.findall(r"results with digest `(\w+)`", text.split(command.MARKERS[0])[1].split(command.MARKERS[1])[0])
    held = command.read_all(command.RESULTS)
    assert digests == ([command.digest_of(command.RESULTS)] if held else [])


def test_deployment_table_has_a_line_per_network_and_dtype():
    def line(row, seed, dtype, miou, same):
        return {"row": row, "seed": seed, "dtype": dtype, "bytes": 1_230_000, "miou": miou, "mask_iou_with_fp32": same}

    scores = [line("method", seed, "fp32", 30.0 + seed, None) for seed in (0, 1)]
    scores += [line("method", seed, "int8", 29.5 + 2 * seed, 0.9 + seed / 20) for seed in (0, 1)]
    scores += [line("teacher", None, "fp32", 50.0, None)]
    found = {"scores": scores, "milliseconds": {"method fp32": 2.5, "method int8": 1.25, "teacher fp32": 9.0}}
    lines = tables.deployment_table(found).splitlines()
    name = tables.ROWS["method"]
    assert lines[2] == f"| {name} | fp32 | 1.23 | 2 | 30.50 |  |  | 2.50 |"
    assert lines[3] == f"| {name} | int8 | 1.23 | 2 | 30.50 | +0.00 | 0.925 | 1.25 |"
    assert lines[4] == "| teacher | fp32 | 1.23 | 1 | 50.00 |  |  | 9.00 |"
    assert len(lines) == 5
    found |= {"milliseconds": {"teacher torch": 20.04, "method fp32": 2.5, "method torch": 7.0}, "processor": "X"}
    text = tables.latency(found)
    assert "7.0 ms for one image and sentence, the teacher 20.0 ms (plain torch, one thread, X)" in text


def rows_with_results(path: Path) -> set[str]:
    """Return the rows of a grid that have committed results."""
    grid = load_grid(path)
    return {r["row"] for r in read_records(grid.results) if r["setting"] == grid.setting} & grid.rows.keys()


GRIDS = {path.stem: rows for path in sorted(command.RESULTS.glob("*.yaml")) if (rows := rows_with_results(path))}


@pytest.mark.parametrize("name", GRIDS)
def test_committed_results_belong_to_their_grids(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The settings of a row have not changed since it was run, so that its grid can be resumed."""
    experiments(command.RESULTS / f"{name}.yaml", rows=tuple(GRIDS[name]), dry_run=True)
    shown = re.search(r": (\d+) runs, (\d+) of them complete", capsys.readouterr().out)
    assert shown is not None
    assert int(shown[2]) > 0

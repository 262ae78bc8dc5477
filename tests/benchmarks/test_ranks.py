"""The arithmetic of the simulation of many GPUs and of the measured efficiencies, and their committed results."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from fastkd.ops.relation.group_costs import Collective, Flops, Traffic

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ranks() -> Any:
    return importlib.import_module("benchmarks.ranks")


def test_rings_run_at_the_rate_of_their_slowest_link(ranks: Any) -> None:
    machine = ranks.Machine(node=4, node_rate=1000.0, network_rate=100.0, link_share=0.5, latency=0.25)
    reduced = [Collective("all_reduce", 1000)]
    assert machine.seconds(reduced, 1) == 0
    assert machine.seconds(reduced, 4) == 2 * 1000 * 3 / 4 / 500 + 2 * 0.25
    assert machine.seconds(reduced, 16) == 2 * 1000 * 15 / 16 / 50 + 4 * 0.25
    assert machine.seconds([Collective("all_gather", 1000)] * 2, 4) == 2 * (1000 * 3 / 4 / 500 + 2 * 0.25)


def test_a_step_hides_the_gradients_behind_the_backward(ranks: Any) -> None:
    machine = ranks.Machine(
        bf16=100.0, fp32=10.0, share=0.5, node=2, node_rate=8.0, network_rate=1.0, link_share=1.0, latency=0.0
    )
    traffic = Traffic([Collective("all_gather", 16)], [Collective("reduce_scatter", 16)])
    parts = ranks.simulate(ranks.Model(parameters=8, forward=100), Flops(10, 20), traffic, 2, machine)
    assert parts == {"student": 6.0, "gradients": 0.0, "relation": 6.0, "collectives": 2 * (8 / 8.0)}
    parts = ranks.simulate(ranks.Model(parameters=8, forward=100), Flops(10, 20), traffic, 4, machine)
    assert parts["gradients"] == 2 * 32 * 3 / 4 - 4.0


def test_a_measured_step_is_as_long_as_its_slowest_rank(ranks: Any) -> None:
    first = {"alone": [(2.0, 2.0), (2.0, 2.0), (9.0, 9.0)], "together": [(4.0, 2.0), (4.0, 2.0), (4.0, 2.0)]}
    second = {"alone": [], "together": [(5.0, 3.0), (3.0, 3.0), (5.0, 3.0)]}
    row = ranks.compare([first, second])
    assert (row["together_wall"], row["together_cpu"]) == (5.0, 2.5)
    assert (row["efficiency_wall"], row["efficiency_cpu"]) == (2.0 / 5.0, 2.0 / 2.5)


def test_committed_simulation_follows_the_formulas(ranks: Any) -> None:
    """The counts of the model are those of the file, and everything computed from them is computed again."""
    result = json.loads((ROOT / "benchmarks/results/ranks.json").read_text(encoding="utf-8"))["simulated"]
    model, shapes = ranks.Model(**result["model"]), result["shapes"]
    assert result == ranks.rows_of(model, shapes, result["samples_per_rank"], result["image_size"], (8, 64, 512))


def test_page_has_the_tables_of_the_results(ranks: Any) -> None:
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    content = json.loads((ROOT / "benchmarks/results/ranks.json").read_text(encoding="utf-8"))
    tables = {
        "measured": ranks.measured_table(content["measured"]["result"]),
        "simulated": ranks.simulated_table(content["simulated"]),
    }
    for part, (begin, end) in ranks.MARKERS.items():
        assert page.split(begin)[1].split(end)[0].strip() == tables[part]

"""The counts and the simulated sums of ``benchmarks.library_form``."""

from __future__ import annotations

import pytest
import torch

from benchmarks import library_form

SHAPE = (16, 512, 3600)


def test_flop_of_the_forms() -> None:
    """A network's whole products take 2 R²K per sample; own tiles of 128 × 64 leave out 3/8 of them."""
    whole = 2 * 16 * 512**2 * 3600
    found = {
        form: sum(each.flop for each in library_form.launches(form, SHAPE, torch.bfloat16))
        for form in ("own", "library", "mixed")
    }
    assert found == {"own": whole * (2 * 5 / 8 + 1), "library": 3 * whole, "mixed": 3 * whole}


def test_narrow_rows_are_multiplied_again() -> None:
    """bf16 rows of 225 are not kept: both passes compute the tiles."""
    flop = {each.name: each.flop for each in library_form.launches("own", (32, 1024, 225), torch.bfloat16)}
    assert flop["H"] == flop["tiles"] > 0


def test_a_launch_is_bound_by_the_slower_of_arithmetic_and_traffic() -> None:
    assert library_form.Launch("", 350 * 10**12, 1).seconds(torch.bfloat16) == pytest.approx(1)
    assert library_form.Launch("", 1, 3 * 10**12).seconds(torch.bfloat16) == pytest.approx(1)


def test_sums_are_truncated_at_each_step_of_a_chain() -> None:
    unit = torch.finfo(torch.float32).eps
    exact = torch.tensor([1 + 0.9 * unit, -1 - 0.9 * unit, 1.0], dtype=torch.float64)
    assert library_form.truncated(exact).tolist() == [1, -1, 1]
    small = torch.arange(40.0)[None] % 7  # sums of integers are exact
    assert library_form.products(small, 16).item() == small.square().sum().item()
    row = library_form.inputs("positive", 1, 3600)[0]
    exact_sum = row.double().square().sum().item()
    chain, restarted = (library_form.products(row, restart).item() for restart in (3600, 64))
    assert chain < exact_sum
    assert abs(restarted - exact_sum) < abs(chain - exact_sum)


def test_one_chain_loses_the_mean_squared_error() -> None:
    found = library_form.errors("normal", 24, 3600, "mse")
    assert found["restarts after 64 columns, norms of the rows"] < 3
    assert found["one chain, norms of the diagonal"] > 5

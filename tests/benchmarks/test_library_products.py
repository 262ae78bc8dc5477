"""The products that ``benchmarks/library_products.py`` times return what a relation needs: fp32 of bfloat16 rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import library_products


@pytest.mark.parametrize(
    ("relation", "bound"), [(library_products.widened, 1e-5), (library_products.residual, 2.0**-15)]
)
def test_products_have_more_bits_than_bfloat16(relation: Callable[[Tensor, Tensor], Tensor], bound: float) -> None:
    rows = (torch.randn(2, 96, 130, generator=torch.Generator().manual_seed(0)) + 1).bfloat16()
    exact = rows.double() @ rows.double().mT
    assert relation(rows, rows).dtype == torch.float32
    assert ((relation(rows, rows) - exact).abs().amax() / exact.abs().amax()).item() < bound
    assert ((torch.bmm(rows, rows.mT) - exact).abs().amax() / exact.abs().amax()).item() > 4 * bound

"""The plain formulas of the benchmarks compute the same losses and gradients as fastkd."""

from __future__ import annotations

import pytest
import torch

from benchmarks import formulas
from benchmarks.workloads import Workload

WORKLOADS = [
    Workload("softmax_kl", "channel_distribution_kd", (2, 3, 4, 5)),
    *(Workload("relation", "channel_kd", (2, 6, 4, 5), distance=distance) for distance in ("kl", "mse")),
    *(
        Workload("relation", "pixel_relation_kd", (2, 6, 4, 5), distance=distance, teacher_width=4)
        for distance in ("kl", "mse")
    ),
    Workload("pixel_word", "cross_modal_kd", (2, 16, 5, 8)),
    Workload("pixel_word", "cross_modal_kd", (2, 16, 5, 8), maps=True),
    Workload("attention_kl", "attention_kd", (2, 3, 5, 7, 4)),
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_formula_equals_the_loss_of_fastkd(workload: Workload) -> None:
    inputs = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in workload.inputs("cpu"))
    fused, plain = formulas.fastkd(workload, "reference"), formulas.formula(workload)
    torch.testing.assert_close(plain(*inputs), fused(*inputs), rtol=1e-9, atol=0)
    exact = formulas.exact_gradients(workload, inputs)
    for loss in (plain, fused, formulas.formula(workload, nn=True)):
        for got, want in zip(formulas.gradients(loss, inputs), exact, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-12)

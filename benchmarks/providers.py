"""Providers that compute a workload (plain formulas, torch.compile, fastkd's backends), and one timed step of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import formulas
from benchmarks.workloads import Workload
from fastkd.ops import dispatch

Step = Callable[[], Any]


def fastkd_backends(family: str, device_type: str) -> list[str]:
    """Return the backends with compiled kernels of a family for a device type, available here or not."""
    return [backend for backend in dispatch.auto_order(family, device_type) if backend != "reference"]


def candidates(workload: Workload, device_type: str, autotune: bool = False) -> list[str]:
    """Return the providers of a workload on a device type, available here or not."""
    nn = ["eager_nn"] if workload.target.eager_nn is not None else []
    compiled = ["compile", *(["compile_max"] if autotune else [])]
    return [*nn, "eager", *compiled, "reference", *fastkd_backends(workload.family, device_type)]


def in_sweep(workload: Workload, device_type: str, sweep: str) -> list[str]:
    """Return the providers that one sweep times. Each sweep includes eager, the baseline of all ratios."""
    names = candidates(workload, device_type, autotune=True)
    others = {"compile": ("eager", "compile", "reference"), "autotune": ("eager", "compile_max")}
    if sweep == "own":
        return [name for name in names if name not in ("compile", "compile_max", "reference")]
    return [name for name in names if name in others[sweep]]


def unavailable_reason(provider: str, family: str, device: str) -> str | None:
    """Return why a provider cannot be measured here, or None if it can."""
    if provider in ("eager_nn", "eager", "compile", "compile_max"):
        return None
    return dispatch.unavailable_reason(provider, family, device)


def loss_fn(workload: Workload, provider: str) -> formulas.Loss:
    """Return the loss as a function of the workload's inputs."""
    if provider in ("eager_nn", "eager"):
        loss = formulas.formula(workload, nn=provider == "eager_nn")
    elif provider.startswith("compile"):
        mode = "max-autotune" if provider == "compile_max" else None
        loss = torch.compile(formulas.formula(workload), fullgraph=True, dynamic=False, mode=mode)
    else:
        loss = formulas.fastkd(workload, provider)
    if not workload.autocast:
        return loss

    def cast(*inputs: Tensor) -> Tensor:
        with torch.autocast(inputs[0].device.type, workload.dtype):
            return loss(*inputs)

    return cast


def make_step(
    workload: Workload, provider: str, mode: str, inputs: tuple[Tensor, ...], loss: formulas.Loss | None = None
) -> Step:
    """Return the call to time: "forward" under no_grad, "both" passes, or both passes replayed as a CUDA "graph"."""
    loss = loss or loss_fn(workload, provider)

    def forward() -> Any:
        with torch.no_grad():
            return loss(*inputs)

    def both() -> Any:
        return formulas.gradients(loss, inputs)

    if provider == "eager_nn":
        return _by_sample(workload, inputs, loss, mode)
    return {"forward": lambda: forward, "both": lambda: both, "graph": lambda: _capture(both)}[mode]()


def _capture(step: Step) -> Step:
    """Capture the step in a CUDA graph and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            step()
    finally:  # a failed capture leaves its own stream current
        torch.cuda.set_stream(stream)
    return graph.replay


def _by_sample(workload: Workload, inputs: tuple[Tensor, ...], loss: formulas.Loss, mode: str) -> Step:
    """Return the step run sample by sample: the N×N matrices of a whole batch would not fit in memory."""
    samples = [
        tuple(x.detach()[b : b + 1].clone().requires_grad_(x.requires_grad) for x in inputs)
        for b in range(workload.shape[0])
    ]

    def step() -> Any:
        if mode == "both":
            parts = [formulas.gradients(loss, sample) for sample in samples]
            return [torch.cat(part) / len(samples) for part in zip(*parts, strict=True)]
        with torch.no_grad():
            return [loss(*sample) for sample in samples]

    return step

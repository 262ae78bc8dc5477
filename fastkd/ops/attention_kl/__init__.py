r"""``attention_kl``: the KL divergence between two networks' attention maps, without storing either.

For queries :math:`Q \in \mathbb{R}^{N \times d}` and keys :math:`K \in \mathbb{R}^{M \times d}` of a head, logits
:math:`E = \mathrm{scale} \cdot QK^\top + \mathrm{bias}` and a temperature τ, per query i

.. math:: \mathrm{KL}(\operatorname{softmax}_j(E^T_i/\tau) \,\|\, \operatorname{softmax}_j(E^S_i/\tau)), \qquad
          H_{ij} = g_i (P^S_{ij} - P^T_{ij}) / \tau, \quad dQ = \mathrm{scale} \cdot H K, \quad
          dK = \mathrm{scale} \cdot H^\top Q .

The gradient is linear in g, and for the sum or the mean of the losses g is one number. A forward that expects one
prepares the gradients from the same blocks of the maps; its backward returns them, multiplied in place if the number is
another. Different g_i cost a second pass, as does another backward of the same graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.attention_kl.plan import (
    INPUTS,
    Inputs,
    Options,
    allocate,
    arithmetic_dtype,
    backward_flops,
    forward_flops,
    gradients_like,
    is_uniform,
    rounded,
)
from fastkd.ops.attention_kl.reference import attention_kl as reference
from fastkd.ops.availability import compare
from fastkd.ops.backends import BACKENDS
from fastkd.ops.dispatch import choose
from fastkd.ops.launch import distinct, family_module
from fastkd.ops.registration import (
    Implementation,
    gradient,
    number_of,
    operator,
    operator_argument,
    register,
    save_temperature,
    saved_temperature,
)
from fastkd.ops.torch_state import has_values, savable


def attention_kl_unchecked(
    inputs: Inputs, temperature: float | Tensor, causal: bool, expected: float | None, backend: str
) -> Tensor:
    """Return per-query losses (B, H, N) in fp32 (fp64 if an input is fp64) of arguments that the loss has checked.

    Args:
        inputs: queries, keys, scales, biases and masks; only the student's queries and keys receive gradients.
        temperature: τ > 0 of both networks. Its gradient is computed by the reference only.
        causal: query i attends to the keys j ≤ i + (M − N).
        expected: the gradient that each loss is expected to receive, as from a sum or a mean; None if it is not one
            number. Another one costs a little time.
        backend: "auto", "reference" or "cpu". Kernels are differentiable once.
    """
    inputs = Inputs(*savable(*inputs))  # type: ignore[arg-type]
    if checks.differentiates_temperature(backend, temperature):
        return reference(inputs, temperature, causal)
    biases = [x for x in (inputs.student_bias, inputs.teacher_bias) if x is not None]
    masks = (inputs.key_mask, inputs.query_mask)
    chosen = choose("attention_kl", backend, *inputs.features, *biases, masks=masks)
    if chosen == "reference":
        return reference(inputs, temperature, causal)
    tau = operator_argument(temperature)
    if torch.is_grad_enabled() and (inputs.student_q.requires_grad or inputs.student_k.requires_grad):
        return _AttentionKL.apply(*distinct(*inputs), tau, causal, expected, chosen)
    return operator("attention_kl_forward", tau)(*inputs, tau, causal, 1.0, False, False, chosen)[0]


class _AttentionKL(torch.autograd.Function):
    """Saves the inputs. Keeps prepared gradients, if all losses are expected to receive the same gradient.

    A saved tensor must not be written, so the prepared gradients are an attribute. The first backward takes them from
    there: copies would be in fresh memory, whose page faults take as long as small maps.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs, (temperature, causal, expected, backend) = arguments[:INPUTS], arguments[INPUTS:]
        needs = [expected is not None and need for need in ctx.needs_input_grad[:2]]
        ctx.options = (causal, 1.0 if expected is None else rounded(expected, arithmetic_dtype(Inputs(*inputs))))
        ctx.prepares, ctx.backend = needs, backend
        forward = operator("attention_kl_forward", temperature)
        loss, *prepared = forward(*inputs, temperature, *ctx.options, *needs, backend)
        ctx.in_place = any(needs) and all(x.dtype == y.dtype for x, y in zip(prepared, inputs[:2], strict=True))
        ctx.traced = torch.compiler.is_compiling()  # torch.compile reuses memory itself
        ctx.prepared = None if ctx.traced else prepared
        ctx.save_for_backward(*inputs, *(prepared if ctx.traced else ()), *save_temperature(ctx, temperature))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        needs, temperature = ctx.needs_input_grad[:2], saved_temperature(ctx)
        inputs = ctx.saved_tensors[:INPUTS]
        # Others may not be written or read: the result may be differentiated, or the tensors be traced or batched.
        plain = ctx.in_place and not torch.is_grad_enabled() and has_values(grad_loss)
        if plain and is_uniform(grad_loss):
            grads, ctx.prepared = ctx.prepared, None
            if grads is None:  # an earlier backward has returned them
                forward = operator("attention_kl_forward", temperature)
                grads = forward(*inputs, temperature, *ctx.options, *ctx.prepares, ctx.backend)[1:]
            number = grad_loss.as_strided((), ())
            # Reading a number on a GPU would stall the stream.
            factor = (number.item() if number.device.type == "cpu" else number) / ctx.options[1]
            if isinstance(factor, Tensor) or factor != 1:
                for x in grads:
                    x.mul_(factor)
        else:
            prepared = ctx.saved_tensors[INPUTS : INPUTS + 2] if ctx.traced else ctx.prepared
            prepared = prepared or [x.new_empty(0) for x in inputs[:2]]
            options = (temperature, *ctx.options, *needs, ctx.backend)
            grads = gradient("attention_kl", temperature, grad_loss, *inputs, *prepared, *options)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * (INPUTS + 2))


# --- the operators ----------------------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, (temperature, causal, row_gradient, *needs, backend) = Inputs(*arguments[:INPUTS]), arguments[INPUTS:]
    results = allocate(inputs, *needs)
    if results[0].numel():
        options = Options(number_of(temperature), causal, row_gradient)
        _kernels(backend).forward(inputs, options, *results, backend)
    return results


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return allocate(Inputs(*arguments[:INPUTS]), *arguments[INPUTS + 3 : INPUTS + 5])


def _backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients of the student's queries and keys; a gradient that is not needed is empty."""
    inputs, prepared = Inputs(*arguments[:INPUTS]), arguments[INPUTS : INPUTS + 2]
    temperature, causal, row_gradient, *needs, backend = arguments[INPUTS + 2 :]
    grads = gradients_like(inputs, *needs)
    if any(x.numel() for x in grads):
        grad_loss = grad_loss.to(arithmetic_dtype(inputs))
        options = Options(number_of(temperature), causal, row_gradient)
        _kernels(backend).backward(inputs, options, prepared, grad_loss, *grads, backend)
    return grads


def _backward_fake(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return gradients_like(Inputs(*arguments[:INPUTS]), *arguments[INPUTS + 5 : INPUTS + 7])


def _kernels(backend: str) -> Any:
    """Return the module that calls the backend's kernels, which fill preallocated outputs."""
    return family_module("attention_kl", BACKENDS[backend].module)


_INPUTS = (
    "Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, Tensor student_scale, "
    "Tensor teacher_scale, Tensor? student_bias, Tensor? teacher_bias, Tensor? key_mask, Tensor? query_mask"
)
_OPTIONS = "float temperature, bool causal, float row_gradient, bool for_q, bool for_k, str backend"
register(
    "attention_kl_forward",
    f"({_INPUTS}, {_OPTIONS}) -> (Tensor loss, Tensor prepared_q, Tensor prepared_k)",
    Implementation(_forward, _forward_fake, forward_flops),
)
register(
    "attention_kl_backward",
    f"(Tensor grad_loss, {_INPUTS}, Tensor prepared_q, Tensor prepared_k, {_OPTIONS}) -> "
    "(Tensor grad_q, Tensor grad_k)",
    Implementation(_backward, _backward_fake, backward_flops),
)


def self_test(backend: str, device: torch.device) -> str | None:
    """Run ``backend`` on a few queries and keys on ``device``; return the error found, or None."""
    sizes = ((2, 2, 5, 3), (2, 2, 19, 3), (2, 2, 5, 4), (2, 2, 19, 4))  # student's and teacher's Q, K
    exact = [
        (torch.arange(b * h * n * d, dtype=torch.float64) * (i + 1)).sin().reshape(b, h, n, d)
        for i, (b, h, n, d) in enumerate(sizes)
    ]
    scales = [torch.ones(2, dtype=torch.float64, device=device)] * 2
    features = [x.to(device, torch.float32) for x in exact]
    inputs = (*features, *scales, None, None, None, None)
    loss, *prepared = _forward(*inputs, 0.5, True, 1.0, True, True, backend)
    weight = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    grads = _backward(weight.to(loss), *inputs, *prepared, 0.5, True, 1.0, True, True, backend)
    with torch.enable_grad():
        leaves = [x.requires_grad_() for x in exact[:2]]
        exact_inputs: list[Any] = [*exact, *(x.cpu() for x in scales), None, None, None, None]
        rows = reference(Inputs(*exact_inputs), 0.5, True)
        exact_prepared = torch.autograd.grad(rows.sum(), leaves, retain_graph=True)
        exact_grads = torch.autograd.grad(rows, leaves, weight)
    names = ("prepared gradient of the queries", "prepared gradient of the keys", "gradient of the queries",
             "gradient of the keys")  # fmt: skip
    results = zip(names, zip((*prepared, *grads), (*exact_prepared, *exact_grads), strict=True), strict=True)
    return compare({"loss": (loss, rows), **dict(results)}, device)

"""All losses: torch.compile, pickling, retained graphs, and modules with the arguments of their functions."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from fastkd import losses
from fastkd.losses import ChannelAttentionKD, ChannelDistributionKD, ChannelKD, CrossModalKD, LogitKD, PixelRelationKD

FUNCTIONS = {
    ChannelKD: losses.channel_kd,
    PixelRelationKD: losses.pixel_relation_kd,
    ChannelAttentionKD: losses.channel_attention_kd,
    ChannelDistributionKD: losses.channel_distribution_kd,
    CrossModalKD: losses.cross_modal_kd,
    LogitKD: losses.logit_kd,
}


def inputs_of(module, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    if module is ChannelAttentionKD or isinstance(module, ChannelAttentionKD):
        batch = max(batch, 4)
    draw = lambda *shape: torch.randn(batch, *shape, generator=g)
    if module is CrossModalKD or isinstance(module, CrossModalKD):
        mask = torch.ones(batch, 5, dtype=torch.bool)
        mask[0, 3:] = False
        return (draw(16, 8), draw(5, 8), draw(16, 8), draw(5, 8)), {"word_mask": mask}
    return (draw(6, 4, 4), draw(6, 4, 4)), {}


@pytest.mark.parametrize("module", FUNCTIONS)
def test_modules_have_the_arguments_and_defaults_of_their_functions(module):
    options = dict(inspect.signature(module).parameters)
    for extra in ("student_channels", "teacher_channels"):
        options.pop(extra, None)
    arguments = inspect.signature(FUNCTIONS[module]).parameters
    forward = set(inspect.signature(module.forward).parameters)
    assert all(name in arguments and options[name].default == arguments[name].default for name in options)
    assert all(name in options or name in forward for name in arguments)


@pytest.mark.parametrize("module", FUNCTIONS)
def test_modules_can_be_pickled_copied_and_saved(module):
    made = module(temperature=0.5)
    args, more = inputs_of(made)
    want = made(*args, **more)
    for duplicate in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert "temperature=0.5" in repr(duplicate)
        torch.testing.assert_close(duplicate(*args, **more), want, rtol=0, atol=0)
    made.temperature = 1.5
    assert not torch.allclose(made(*args, **more), want)
    assert made.state_dict() == {}
    aligned = ChannelKD(student_channels=3, teacher_channels=6)
    assert list(aligned.state_dict()) == ["aligner.linear.weight"]
    assert pickle.loads(pickle.dumps(aligned)).aligner is not None


def test_aligner_accepts_any_floating_dtype_and_rejects_other_inputs():
    made, teacher = ChannelKD(student_channels=3, teacher_channels=6), torch.randn(2, 6, 4, 4)
    student = torch.randn(2, 3, 4, 4)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        assert made(student.to(dtype), teacher).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for bad, error, message in (
        (student.long(), TypeError, "student: expected a floating-point tensor, got torch.int64"),
        (None, TypeError, "student: expected a tensor"),
        (student[:, :2], ValueError, r"student: expected 3 channels in dimension 1 \(student_channels\)"),
        (student.to("meta"), ValueError, "aligner: is on cpu, but student is on meta"),
    ):
        with pytest.raises(error, match=message):
            made(bad, teacher)


def test_repr_shows_the_shape_of_a_weight_but_not_its_values():
    assert "weight=tensor of shape (8, 32)" in repr(ChannelKD(weight=torch.rand(8, 32)))


@pytest.mark.parametrize("module", FUNCTIONS)
def test_second_backward_is_equal_and_inputs_are_unchanged(module):
    args, more = inputs_of(module)
    before = [a.clone() for a in args]
    leaf = args[0].requires_grad_()
    loss = module()(*args, **more)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    with torch.no_grad():
        assert not module()(*args, **more).requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda: ChannelKD(weight="attention", centered=True, backend="reference"),
        lambda: ChannelKD(across_batch=True, distance="row_cosine", similarity="mean", backend="reference"),
        lambda: ChannelKD(patches=2, student_channels=6, teacher_channels=6, backend="reference"),
        lambda: PixelRelationKD(cross_image=True, backend="reference"),
        lambda: PixelRelationKD(distance="mse"),
        lambda: ChannelDistributionKD(guide="own", weight="attention", backend="reference"),
        lambda: ChannelAttentionKD(backend="reference"),
        lambda: CrossModalKD(backend="reference"),
        lambda: CrossModalKD(similarity="cosine", return_terms=True, reduction="none", backend="reference"),
        lambda: LogitKD(backend="reference"),
    ],
)
def test_every_loss_is_one_graph(make):
    """fullgraph=True raises on a graph break; the numbers equal eager."""
    module = make()
    args, more = inputs_of(module)
    leaf = args[0].requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got, want = compiled(*args, **more), module(*args, **more)
    torch.testing.assert_close(got, want)
    total = lambda x: sum(v.sum() for v in x.values()) if isinstance(x, dict) else x
    torch.testing.assert_close(
        torch.autograd.grad(total(got), leaf)[0], torch.autograd.grad(total(want), leaf)[0], rtol=1e-4, atol=1e-6
    )


def test_weights_and_masks_keep_the_batch_size_dynamic():
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters
    compiled = torch.compile(
        lambda s, t, w, m, tokens: (
            losses.channel_kd(s, t, weight=w, backend="reference")
            + losses.logit_kd(s, t, pixel_mask=m, backend="reference")
            + losses.cross_modal_kd(s, tokens, t, tokens, pixel_mask=m, word_mask=m[:, 0], backend="reference")
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    counter.clear()
    for batch in (2, 3, 5, 7):
        (s, t), _ = inputs_of(ChannelKD, batch)
        value = compiled(
            s, t, torch.rand(batch, 6), torch.ones(batch, 4, 4, dtype=torch.bool), torch.randn(batch, 4, 6)
        )
        assert torch.isfinite(value)
    assert counter["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize(("module", "compiler"), [(ChannelKD, "inductor"), (CrossModalKD, "aot_eager")])
def test_compiled_code_equals_eager_for_several_batch_sizes(module, compiler):
    torch._dynamo.reset()
    made = module(backend="reference")
    compiled = torch.compile(made, fullgraph=True, backend=compiler)
    counter = torch._dynamo.utils.counters
    counter.clear()
    for batch in (2, 3, 5, 7):
        args, more = inputs_of(made, batch, seed=batch)
        leaf = args[0].requires_grad_()
        got, want = compiled(*args, **more), made(*args, **more)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(got, leaf)[0], torch.autograd.grad(want, leaf)[0], rtol=1e-3, atol=1e-6
        )
    assert counter["stats"]["unique_graphs"] <= 2  # the first, and one for any batch size

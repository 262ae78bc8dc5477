"""State of a loss module: a wrapped or replaced aligner, and options that are parameters or tensors."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastkd import Distiller, Term
from fastkd.losses import (
    AttentionKD,
    ChannelDistributionKD,
    ChannelKD,
    FeatureKD,
    LogitKD,
    PixelRelationKD,
    channel_distribution_kd,
    channel_kd,
    logit_kd,
)

ALIGNED = {ChannelKD: channel_kd, ChannelDistributionKD: channel_distribution_kd}
WEIGHTED = {ChannelKD: (2, 6), ChannelDistributionKD: (2, 6), PixelRelationKD: (2, 16)}


def maps(channels, seed=0):
    return torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(seed))


def aligned_loss(module, matrix, student, teacher):
    return ALIGNED[module](torch.einsum("oc,bchw->bohw", matrix, student), teacher)


class LowRank(nn.Module):
    """An adapter around a frozen linear layer that exposes only its ``weight``."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("module", ALIGNED)
def test_aligner_hooks_take_effect(module):
    made = module(student_channels=4, teacher_channels=6)
    student, teacher = maps(4), maps(6, 1)
    made.aligner.linear.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    made.aligner.linear.register_forward_hook(lambda _, args, output: output + args[0].sum(-1, keepdim=True))
    matrix = 2 * (made.aligner.linear.weight + 1)
    torch.testing.assert_close(made(student, teacher), aligned_loss(module, matrix, student, teacher))
    # A plain layer computes in the inputs' dtype if it is wider than the weight's; a hooked one does not.
    got = made(student.double(), teacher)
    torch.testing.assert_close(got, aligned_loss(module, matrix, student, teacher).to(got.dtype))


@pytest.mark.parametrize("module", ALIGNED)
def test_replaced_or_parametrised_aligners_are_trained(module):
    student, teacher = maps(4), maps(6, 1)
    adapted = module(student_channels=4, teacher_channels=6)
    adapted.aligner.linear = adapter = LowRank(adapted.aligner.linear)
    loss = adapted(student.bfloat16(), teacher)
    matrix = adapter.weight + adapter.up.weight @ adapter.down.weight
    torch.testing.assert_close(loss, aligned_loss(module, matrix, student.bfloat16().float(), teacher))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in (adapter.up.weight, adapter.down.weight))

    normed = module(student_channels=4, teacher_channels=6)
    linear = parametrizations.weight_norm(normed.aligner.linear)
    loss = normed(student, teacher)
    torch.testing.assert_close(loss, aligned_loss(module, linear.weight, student, teacher))
    loss.backward()
    assert all(p.grad is not None for p in normed.parameters())

    quantised = module(student_channels=4, teacher_channels=6)
    quantised.aligner.linear = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6))
    torch.testing.assert_close(
        quantised(student, teacher),
        ALIGNED[module](quantised.aligner.linear(student.movedim(1, -1)).movedim(-1, 1), teacher),
    )


def test_a_sharded_aligner_is_gathered(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    student, teacher = maps(4), maps(6, 1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        made = ChannelKD(student_channels=4, teacher_channels=6)
        matrix = made.aligner.linear.weight.detach().clone().requires_grad_()
        fully_shard(made.aligner.linear, mesh=mesh)
        fully_shard(made, mesh=mesh)
        loss, want = made(student, teacher), aligned_loss(ChannelKD, matrix, student, teacher)
        loss.backward()
        torch.testing.assert_close(loss, want)
        (expected,) = torch.autograd.grad(want, matrix)
        torch.testing.assert_close(made.aligner.linear.weight.grad.full_tensor(), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("module", WEIGHTED)
def test_parameter_weight_is_trained_saved_and_copied(module):
    start = torch.rand(WEIGHTED[module], generator=torch.Generator().manual_seed(2)) + 0.5
    student, teacher = maps(6), maps(6, 1)
    weight = nn.Parameter(start.clone())
    made = module(weight=weight)
    assert [(name, p is weight) for name, p in made.named_parameters()] == [("weight", True)]
    assert list(made.state_dict()) == ["weight"]
    made(student, teacher).backward()
    rows = module(reduction="none")(student, teacher)
    loss = module(weight=start)(student, teacher)
    torch.testing.assert_close(weight.grad, (rows - loss) / start.sum(), rtol=1e-4, atol=1e-7)  # of Σ w·row / Σ w
    for duplicate in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert isinstance(duplicate.weight, nn.Parameter)
        torch.testing.assert_close(duplicate(student, teacher), loss)
    other = module(weight=nn.Parameter(torch.ones_like(start)))
    other.load_state_dict(made.state_dict())
    torch.testing.assert_close(other(student, teacher), loss)
    parametrize.register_parametrization(made, "weight", nn.Softplus())
    torch.testing.assert_close(
        made(student, teacher), module(weight=nn.functional.softplus(start))(student, teacher), rtol=1e-5, atol=1e-6
    )


def test_computed_weight_receives_gradients_and_is_copied_by_value():
    scale = torch.tensor(2.0, requires_grad=True)
    shape = torch.arange(12.0).view(2, 6)
    made = ChannelKD(weight=shape + scale, reduction="sum")
    student, teacher = maps(6), maps(6, 1)
    loss = made(student, teacher)
    for duplicate in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert not duplicate.weight.requires_grad
        torch.testing.assert_close(duplicate(student, teacher), loss)
    loss.backward()
    torch.testing.assert_close(scale.grad, channel_kd(student, teacher, reduction="sum"))


@pytest.mark.parametrize("module", [ChannelKD, ChannelDistributionKD])
def test_options_can_be_reassigned(module):
    student, teacher = maps(6), maps(6, 1)
    tensor, parameter = torch.arange(1.0, 13.0).view(2, 6), nn.Parameter(torch.arange(12.0, 0.0, -1.0).view(2, 6))
    kinds = {"tensor": tensor, "parameter": parameter, "attention": "attention", "none": None}
    made = module()
    want = {name: module(weight=value)(student, teacher).detach() for name, value in kinds.items()}
    for first in kinds:
        for second in kinds:
            for name in (first, second):
                made.weight = kinds[name]
                torch.testing.assert_close(made(student, teacher).detach(), want[name])
                assert list(made.state_dict()) == (["weight"] if name == "parameter" else [])
                assert len(list(made.buffers())) == (name == "tensor")
    made.weight = tensor
    assert made.to("meta").weight.device.type == "meta"


def test_parameter_in_term_kwargs_is_trained():
    weight = nn.Parameter(torch.rand(2, 6) + 0.5)
    task = lambda output, _: output.square().mean()
    term = Term(channel_kd, lambda output: output, kwargs={"weight": weight}, name="channels")
    teacher = nn.Conv2d(3, 6, 1).eval().requires_grad_(False)
    distiller = Distiller(nn.Conv2d(3, 6, 1), teacher, task, [term], inputs=("input",))
    assert any(p is weight for p in distiller.parameters())
    distiller({"input": torch.randn(2, 3, 4, 4)}).loss.backward()
    assert weight.grad.abs().sum() > 0
    duplicate = copy.deepcopy(distiller)
    assert any(p is duplicate.terms["channels"].kwargs["weight"] for p in duplicate.parameters())


def test_tensors_in_a_pair_are_buffers():
    made = AttentionKD(scale=(torch.ones(2), nn.Parameter(torch.ones(2))))
    assert [name for name, _ in made.named_buffers()] == ["scale_0"]
    assert list(made.state_dict()) == ["scale_1"]
    assert [x.device.type for x in made.to("meta")._options()["scale"]] == ["meta", "meta"]
    made.scale = (1.0, torch.ones(2))
    assert [name for name, _ in made.named_buffers()] == ["scale_1"]
    made.scale = None
    assert not [*made.buffers(), *made.parameters()]


def test_computed_temperature_in_a_pair_is_copied_by_value():
    log_tau = torch.tensor(0.5, requires_grad=True)
    made = LogitKD(temperature=(log_tau.exp(), 2.0))
    student, teacher = maps(6), maps(6, 1)
    loss = made(student, teacher)
    torch.testing.assert_close(loss, logit_kd(student, teacher, temperature=(log_tau.exp(), 2.0)))
    for duplicate in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert not any(x.requires_grad for x in duplicate.buffers())
        torch.testing.assert_close(duplicate(student, teacher), loss.detach())
    loss.backward()
    assert log_tau.grad


def distilled(term):
    teacher = nn.Conv2d(3, 6, 1).eval().requires_grad_(False)
    return Distiller(nn.Conv2d(3, 6, 1), teacher, lambda output, _: output.square().mean(), [term], inputs=("input",))


IMAGES = {"input": maps(3)}


@pytest.mark.parametrize("pair", [False, True])
def test_replaced_parameters_of_a_term_are_used_and_trained(pair):
    start = nn.Parameter(torch.tensor(0.1))
    kwargs = {"temperature": (start, 0.1) if pair else start}
    distiller = distilled(Term(channel_kd, lambda output: output, kwargs=kwargs, name="channels"))
    [(name, _)] = [item for item in distiller.named_parameters() if "temperature" in item[0]]
    state = distiller.state_dict() | {name: torch.tensor(1.0)}
    before = distiller(IMAGES).terms["channels"]
    distiller.load_state_dict(state, assign=True)
    output = distiller(IMAGES)
    assert output.terms["channels"] != before
    output.loss.backward()
    assert distiller.get_parameter(name).grad
    given = torch.tensor(0.1, requires_grad=True)
    other = torch.func.functional_call(distiller, {name: given}, (IMAGES,))
    torch.testing.assert_close(other.terms["channels"], before)
    assert torch.autograd.grad(other.loss, given)[0]


def test_parameters_within_a_partial_are_trained():
    weight = nn.Parameter(torch.rand(2, 6) + 0.5)
    aligned = functools.partial(FeatureKD(6, 6), weight="attention")
    for loss, name in ((aligned, "aligner.linear.weight"), (functools.partial(channel_kd, weight=weight), "weight")):
        distiller = distilled(Term(loss, lambda output: output, name="term"))
        [found] = [p for n, p in distiller.named_parameters() if n.startswith("term_") and n.endswith(name)]
        distiller(IMAGES).loss.backward()
        assert found.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["computed", "expanded", "inference"])
def test_check_leaves_buffers_that_no_forward_writes(kind):
    raw = torch.zeros(2, 6, requires_grad=True)
    with torch.inference_mode(kind == "inference"):
        weight = torch.ones(1, 6).expand(2, 6) if kind == "expanded" else torch.ones(2, 6)
    kd = ChannelKD(weight=raw.sigmoid() if kind == "computed" else weight)
    distiller = distilled(Term(kd, lambda output: output))
    distiller.check(IMAGES)
    distiller(IMAGES).loss.backward()
    assert kind != "computed" or raw.grad.abs().sum() > 0

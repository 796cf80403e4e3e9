"""One step of a method by hand: gradients, clipping, rates, averages, skipped steps, micro-batches, replicas, warm start."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from points import drawn
from torch import nn

from distill.config.schema import Optim
from distill.denoise import Denoiser, Gaussian
from distill.errors import BadInput
from distill.methods import placement
from distill.methods.base import Method
from distill.methods.nonfinite import NonFiniteGuard
from distill.methods.optim import learning_rate, optimizer_of
from distill.methods.placement import Placement, Replicas, batch_size, micro_batches
from distill.models.small import MLP
from distill.noise import VE, RectifiedFlow
from distill.solvers import DDIM, solve

FLOW = RectifiedFlow()


class Scale(nn.Module):
    """p x, with a counter that is not a weight."""

    shape, flow_map, guided = (2,), False, False

    def __init__(self, p=1.0):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x, t, **cond):
        return self.p * x


class Slope(Method):
    """d loss / dp = mean x."""

    def turns(self, step):
        self.asked = step
        yield "student", lambda x, z, cond: self.student.net.p * x.mean()


def made(schedule=FLOW, teacher=None, **options) -> Slope:
    roles = {"teacher": teacher or Gaussian([0.0, 0.0], 0.5, schedule), "student": Denoiser(Scale(), schedule, "x")}
    settings = {"name": "SGD", "lr": 0.1, "weight_decay": 0.0, "clip": None} | options.pop("optim", {})
    method = Slope(roles, optim={"student": settings}, **options)
    method.total_steps = 8
    return method


def step(method, *values) -> float:
    """A step on samples of these constant values; returns p."""
    method.manual_backward = lambda loss: loss.backward()
    method.training_step({"x": torch.tensor(values)[:, None].expand(-1, 2)})
    return method.student.net.p.item()


def test_a_step_is_the_learning_rate_times_the_gradient_and_is_counted():
    method = made()
    assert step(method, 2.0) == pytest.approx(1 - 0.1 * 2) and method.step == 1
    assert step(method, 1.0, 3.0) == pytest.approx(0.8 - 0.1 * 2), "the gradient of the step before is gone"
    assert {k: float(v) for k, v in method.logs.items()} == pytest.approx(
        {"student/loss": 0.8 * 2, "student/grad_norm": 2.0, "student/skipped": 0.0}
    )
    assert not method.teacher.training and not method.ema.training


def test_the_norm_is_clipped_for_the_step_and_logged_whole():
    method = made(optim={"clip": 0.5})
    assert step(method, 4.0) == pytest.approx(1 - 0.1 * 0.5) and float(method.logs["student/grad_norm"]) == 4.0
    assert step(method, 0.25) == pytest.approx(0.95 - 0.1 * 0.25), "a smaller one is left as it is"


def test_micro_batches_are_one_step_on_their_mean():
    method = made()
    method.placement = Placement(accumulate=2)
    assert step(method, 1.0, 2.0, 4.0, 9.0) == pytest.approx(1 - 0.1 * 4)
    assert float(method.logs["student/loss"]) == pytest.approx(4.0)


def test_a_batch_is_cut_in_order():
    batch = {"x": torch.arange(7), "caption": list("abcdefg")}
    cut = micro_batches(batch, 3)
    assert [c["x"].tolist() for c in cut] == [[0, 1], [2, 3], [4, 5]]
    assert ["".join(c["caption"]) for c in cut] == ["ab", "cd", "ef"]
    assert micro_batches(batch, 1) == [batch] and batch_size({"caption": ["a"], "x": torch.zeros(5, 2)}) == 5


@pytest.mark.parametrize(
    "warmup, decay, total, factors",
    [
        (0, "constant", 8, [1] * 9),
        (4, "constant", 8, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        (0, "cosine", 8, [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(9)]),
        (2, "cosine", 4, [0.5, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2, 0, 0]),
        (0, "cosine", 0, [1, 1]),
    ],
)
def test_learning_rates(warmup, decay, total, factors):
    settings = Optim(warmup=warmup, decay=decay)
    assert [learning_rate(settings, k, total) for k in range(len(factors))] == pytest.approx(factors, abs=1e-12)


def test_the_step_uses_the_schedule():
    method = made(optim={"warmup": 4})
    assert step(method, 1.0) == pytest.approx(1 - 0.1 * 0.25)
    assert step(method, 1.0) == pytest.approx(0.975 - 0.1 * 0.5)


@pytest.mark.parametrize("decay", [0.999, 0.05, 0.15])
def test_the_average_follows_with_its_ramp(decay):
    """weight = 1 - min(decay, (1 + n) / (10 + n)), n steps done before."""
    method, p, average = made(ema=decay), 1.0, 1.0
    for n in range(4):
        method.student.net.count.fill_(n + 5)
        p = step(method, 1.0)
        average += (1 - min(decay, (1 + n) / (10 + n))) * (p - average)
        assert method.ema.net.p.item() == pytest.approx(average, rel=1e-6)
        assert method.ema.net.count.item() == n + 5, "whole numbers are copied"


def test_averages_of_decay_none_stand_still_and_of_0_are_copies():
    method = made(averages={"still": ("student", None), "copy": ("student", 0.0)})
    p = step(method, 1.0)
    assert method.still.net.p.item() == 1.0 and method.copy.net.p.item() == pytest.approx(p)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_moves_nothing_and_is_counted(bad):
    method = made()
    assert step(method, bad) == 1.0 and method.ema.net.p.item() == 1.0 and method.step == 1
    assert float(method.logs["student/skipped"]) == 1 and not method.nonfinite.clean()
    assert (
        step(method, 1.0) == pytest.approx(0.9)
        and float(method.logs["student/skipped"]) == 1
        and method.nonfinite.clean()
    )


def test_the_guard_raises_at_its_limit_in_a_row():
    guard, yes, no = NonFiniteGuard(("a", "b"), limit=2), torch.tensor(True), torch.tensor(False)
    assert [int(guard.update("a", s)) for s in (no, yes, no)] == [1, 1, 2] and guard.over() is None
    assert guard.state() == {"a": [2, 1], "b": [0, 0]}
    assert int(guard.update("a", no)) == 3 and guard.over() == "a" and not guard.clean()
    other = NonFiniteGuard(("a", "b"))
    other.restore(guard.state())
    assert other.state() == guard.state() and other.over() is None and other.limit == 10


def test_optimizers_by_name():
    p = [nn.Parameter(torch.zeros(2))]
    adam = optimizer_of(Optim(name="AdamW", lr=0.2, weight_decay=0.3, betas=[0.1, 0.2], eps=0.4), p, "student")
    assert isinstance(adam, torch.optim.AdamW)
    assert {k: adam.defaults[k] for k in ("lr", "weight_decay", "betas", "eps")} == {
        "lr": 0.2,
        "weight_decay": 0.3,
        "betas": (0.1, 0.2),
        "eps": 0.4,
    }
    assert isinstance(optimizer_of(Optim(name="SGD", lr=0.2), p, "student"), torch.optim.SGD)
    for name in ("Adamm", "Tensor", "lr_scheduler"):
        with pytest.raises(BadInput, match=f"optim.critic.name: torch.optim has no '{name}'"):
            optimizer_of(Optim(name=name), p, "critic")


def test_bytes_of_weights_and_of_moments():
    method = made(optim={"name": "AdamW"})
    step(method, 1.0)
    weights, moments = method.placement.resident("student")
    assert weights == 4 + 8 and moments >= 2 * 4, "one float and one counter; two moments"
    assert method.placement.resident("teacher")[1] == 0


# -- warm start and backward simulation ------------------------------------------------------------------------------


def test_the_warm_start_imitates_the_teacher_and_the_turns_count_from_its_end():
    method = made(warm_start=2)
    x, z, t = torch.tensor([[2.0, 1.0]]), torch.tensor([[0.5, -1.0]]), torch.tensor([0.25])
    ((role, loss),) = method.imitation()
    inner = torch.rand
    torch.rand = lambda *size, **kw: t
    try:
        for data in (x, None):
            x_t = 0.75 * (torch.zeros_like(z) if data is None else data) + 0.25 * z
            expected = (x_t - method.teacher(x_t, t)).square().mean().item()
            assert role == "student" and loss(data, z, {}).item() == pytest.approx(expected, rel=1e-5)
    finally:
        torch.rand = inner
    seen = []
    for _ in range(4):
        method.asked = None
        step(method, 1.0)
        seen.append(method.asked)
    assert seen == [None, None, 0, 1]


@pytest.mark.parametrize("schedule", [FLOW, VE(10.0, 1.0)], ids=lambda s: type(s).__name__)
def test_backward_simulation_stops_at_one_time_of_the_grid(schedule):
    method, z, seen = made(schedule, grid=[1, 0.7, 0.3, 0]), torch.randn(3, 2), set()
    method.student.net.p.data.fill_(0.5)  # at 1 every step would be the identity
    for _ in range(40):
        x_t, t = method.simulate(z, {})
        times = method.grid.times[: method.grid.times.index(pytest.approx(t[0].item())) + 1]
        start = schedule.noise_scale * z
        expected = solve(method.student, start, times, DDIM()) if len(times) > 1 else start
        torch.testing.assert_close(x_t, expected)
        assert t.shape == (3,) and not x_t.requires_grad
        seen.add(round(t[0].item(), 3))
    assert seen == {1.0, 0.7, 0.3}


def test_samples_start_at_the_schedules_noise_and_take_the_given_grid():
    method, z = made(VE(10.0, 1.0), grid=2), torch.randn(3, 2)
    torch.testing.assert_close(method.sample(z, {}), 10 * z)  # p = 1: x = x_t at every step
    method.ema.net.p.data.fill_(0.5)
    for grid, steps in ((None, 2), (4, 4), ([1, 0.5, 0.2, 0], 3)):
        times = method.grid.times if grid is None else {4: (1, 0.75, 0.5, 0.25, 0)}.get(steps, grid)
        torch.testing.assert_close(method.sample(z, {}, grid=grid), solve(method.ema, 10 * z, times, DDIM()))


def test_conditions_of_students_and_critics():
    plain = made(guidance=3.0)
    assert plain.student_conditions({"label": 1}, 4) == {"label": 1} and plain.shape == (2,)
    roles = {"teacher": Gaussian([0.0, 0.0], 0.5, FLOW), "student": Denoiser(MLP(2, 8, 1, guided=True), FLOW)}
    told = Slope(roles, guidance=3.0, grid=[1, 0.6, 0.2, 0])
    assert told.student_conditions({}, 4)["w"].tolist() == [3.0] * 4
    told.critic = Denoiser(MLP(2, 8, 1, flow_map=True), FLOW)
    assert torch.equal(told.critic_time_condition(torch.zeros(3))["s"], torch.full((3,), 0.2)), "t of the last step"
    assert told.critic_time_condition(torch.zeros(3), torch.ones(3))["s"].tolist() == [1.0] * 3
    told.critic = told.student
    assert told.critic_time_condition(torch.zeros(3)) == {}


def test_a_reward_gets_each_samples_caption():
    method, seen = made(), []
    method.metric = lambda x, data, **cond: seen.append(cond.get("caption")) or x.sum(1)
    method.reward_of(torch.ones(4, 2), None, {})
    method.captions = ["a", "b"]
    assert method.reward_of(torch.ones(4, 2), None, {}).tolist() == [2.0] * 4
    assert seen == [None, ["a", "a", "b", "b"]]


def test_pairs_bring_their_noise_and_conditions_their_shape():
    method, seen = made(), []
    method.turns = lambda step: [
        ("student", lambda x, z, cond: seen.append((x, z, cond)) or method.student.net.p * z.mean())
    ]
    z = torch.full((2, 2), 3.0)
    method.training_step({"x": torch.ones(2, 2), "z": z, "label": torch.ones(2).long(), "caption": ["a", "b"]})
    assert (
        torch.equal(seen[0][1], z) and set(seen[0][2]) == {"label"} and method.captions == ["a", "b"] and method.paired
    )
    method.training_step({"label": torch.ones(5).long()})
    assert seen[1][0] is None and seen[1][1].shape == (5, 2) and not method.paired
    method.training_step({"x": torch.ones(3, 4)})
    assert seen[2][1].shape == (3, 4), "of the batch, not of the method"
    for batch in (torch.ones(2), {"caption": ["a"]}):
        with pytest.raises(BadInput, match="dictionaries of tensors"):
            method.training_step(batch)


# -- replicas, in one process ----------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_replicas_divide_the_sum_by_their_number(group, monkeypatch):
    """Two ranks of which the other has zeros: half of what is here."""
    method = made()
    method.placement = Replicas()
    method.configure_optimizers()
    method.placement.world = 2
    method.student.net.p.grad = torch.tensor(3.0)
    method.placement.reduce("student")
    assert method.student.net.p.grad.item() == 1.5 and float(method.placement.mean(torch.tensor(3.0))) == 1.5
    method.student.net.p.grad = None
    method.placement.reduce("student")
    assert method.student.net.p.grad is None, "no rank has one"
    method.placement.world = 1
    assert method.placement.gather_key(2**63 + 5) == [2**63 + 5] and method.placement.gather_key(3) == [3]


def test_buckets_are_of_one_dtype_and_of_bounded_size(monkeypatch):
    monkeypatch.setattr(placement, "BUCKET", 40)
    a, b, c, d, e = torch.zeros(5), torch.zeros(5), torch.zeros(1), torch.zeros(1, dtype=torch.float64), torch.zeros(99)
    found = placement._buckets([a, b, c, d, e])
    assert [[len(t) for t in bucket] for bucket in found] == [[5, 5], [1], [1], [99]] and placement._buckets([]) == []
    placement._spread(torch.arange(6.0), [a, c])
    assert a.tolist() == [0, 1, 2, 3, 4] and c.tolist() == [5]


@pytest.mark.parametrize("bit, what", [(0, "shared draws"), (31, "shared draws"), (32, "turns"), (63, "turns")])
def test_ranks_that_disagree_are_named(bit, what):
    """The upper half of a key is of the turns, the lower one of the shared stream."""
    own: Placement = Placement()
    own.world = 3
    own.gather_key = lambda key: [key, key, key ^ 1 << bit]
    with pytest.raises(BadInput, match=f"Step 4: rank 2 and rank 0 differ in their {what}"):
        own.agree(4, ["student"], torch.Generator())
    own.gather_key = lambda key: [key] * 3
    own.agree(4, ["student"], torch.Generator())
    keys = []
    own.gather_key = lambda key: keys.append(key) or [key] * 3
    for at, roles, seed in ((4, ["a"], 0), (5, ["a"], 0), (4, ["b"], 0), (4, ["a"], 1)):
        own.agree(at, roles, torch.Generator().manual_seed(seed))
    assert len(set(keys)) == 4, "step, turns and shared stream are all compared"
    assert max(keys) < 2**64 and len({k >> 32 for k in keys}) == 3 and len({k % 2**32 for k in keys}) == 2


def test_points_are_used_here_too():
    """`drawn` restores torch's functions when a block fails."""
    inner = torch.randn_like
    with pytest.raises(ZeroDivisionError), drawn(torch.zeros(1)):
        raise ZeroDivisionError
    assert torch.randn_like is inner

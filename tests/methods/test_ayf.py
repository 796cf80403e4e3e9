"""Align Your Flow: no tangent at the exact flow map, the right sign beside it, autoguidance as extrapolation."""

import pytest
import torch
from exact import Pair, drawn, gradient, student, wiggly

from distill.denoise import Denoiser, Gaussian
from distill.errors import BadInput
from distill.methods import AYF
from distill.models.small import MLP
from distill.noise import RectifiedFlow, Table, TrigFlow, VPCosine, VPLinear
from distill.solvers import DDIM
from distill.solvers.flowmap import FlowMap, predicted_flow

SCHEDULES = {
    "flow": RectifiedFlow(),
    "shift": RectifiedFlow(3.0),
    "cosine": VPCosine(),
    "linear": VPLinear(),
    "trig": TrigFlow(0.5),
    "table": Table([0.9, 0.6, 0.3, 0.05]),
}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
U, C, STD = -0.4, 0.7, 0.5


def exact_map(schedule, mean=0.0, std=STD):
    """The average velocity of N(mean, std^2) as a formula of (x_t, t, s)."""

    def formula(x_t, t, s, w=None, label=None):
        m = mean if w is None or not callable(mean) else mean(w)[:, None]
        (a, b), (a_s, b_s) = schedule.at(t, x_t), schedule.at(s, x_t)
        v, v_s = ((a * std) ** 2 + b**2).sqrt(), ((a_s * std) ** 2 + b_s**2).sqrt()
        x = DDIM().invert(schedule, a_s * m + v_s / v * (x_t - a * m), x_t, t, s)
        return (x_t - a * x) / b - x

    return formula


class Apart:
    """A law of t - s that keeps off zero, where the formula divides by it."""

    def __call__(self, n, **kw):
        return 0.3 + 0.65 * torch.rand(n, **kw)


def method(schedule, teacher=None, formula=None, guided=False, **kw):
    net = student(formula or exact_map(schedule), schedule, "flow", guided=guided)
    roles = {"teacher": teacher or Gaussian([0.0], STD, schedule), "student": net}
    m = AYF(roles | kw.pop("more", {}), distance=Apart(), **kw)
    m.share = 1.0
    return m


@every
def test_there_is_no_tangent_at_the_exact_flow_map(schedule):
    m = method(schedule)
    assert m.loss(*drawn()) < 1e-20
    assert gradient(m, m.loss, *drawn()).abs() < 1e-9
    for delta in (0.1, -0.1):
        with torch.no_grad():
            m.student.net.off.fill_(delta)
        assert gradient(m, m.loss, *drawn()).sign() == torch.tensor(delta).sign()


def test_the_share_climbs_and_what_it_leaves_out_pulls_to_the_velocity():
    m = AYF(
        {
            "teacher": Gaussian([0.0], STD, RectifiedFlow()),
            "student": student(exact_map(RectifiedFlow()), prediction="flow", guided=False),
        },
        share_steps=10,
    )
    assert m.share == 0, "before the first step too"
    shares = [next(m.turns(step)) and m.share for step in (0, 5, 10, 100)]
    assert shares == pytest.approx([0, 0.495, 0.99, 0.99])
    matching = method(
        RectifiedFlow(), formula=lambda x, t, s: predicted_flow(Gaussian([0.0], STD, RectifiedFlow()), x, t)
    )
    matching.share = 0.0
    assert matching.loss(*drawn()) < 1e-20, "share 0 is flow matching"


@every
def test_equal_times_are_flow_matching(schedule):
    teacher = Gaussian([0.3], STD, schedule)
    m = method(schedule, teacher, formula=lambda x, t, s: predicted_flow(teacher, x, t))
    m.distance = lambda n, **kw: torch.zeros(n, **kw)
    torch.manual_seed(0)
    assert m.loss(*drawn()) < 1e-20


def test_guidance_extrapolates_the_mean_and_the_student_takes_w():
    schedule, (x, z, cond) = RectifiedFlow(), drawn(labels=1)
    pair = Pair([[U], [C]], STD, schedule=schedule)
    shifted = exact_map(schedule, U + 2.5 * (C - U))
    fixed = method(schedule, pair, lambda x, t, s, label: shifted(x, t, s), guidance=2.5)
    assert fixed.loss(x, z, cond) < 1e-20
    moved = exact_map(schedule, lambda w: U + w * (C - U))
    conditions = method(schedule, pair, moved, guided=True, guidance_range=[1.0, 3.0])
    assert conditions.loss(x, z, cond) < 1e-20


def test_autoguidance_extrapolates_away_from_the_weak_model():
    schedule, (x, z, cond) = RectifiedFlow(), drawn()
    strong, weak = Gaussian([C], STD, schedule), Gaussian([U], STD, schedule)
    m = method(schedule, strong, exact_map(schedule, U + 2.0 * (C - U)), more={"weak": weak}, guidance=2.0)
    assert m.frozen == ("teacher", "weak") and m.loss(x, z, cond) < 1e-20
    m = method(
        schedule,
        strong,
        exact_map(schedule, lambda w: U + w * (C - U)),
        guided=True,
        more={"weak": weak},
        guidance_range=[1.0, 3.0],
    )
    assert m.loss(x, z, cond) < 1e-20


@every
@pytest.mark.parametrize("guided", [False, True])
def test_a_student_with_the_teachers_weights_starts_as_the_teacher(schedule, guided):
    plain, mapped = MLP(dim=2, width=16), MLP(dim=2, width=16, flow_map=True, guided=guided)
    mapped.load_state_dict(plain.state_dict(), strict=False)
    teacher = Denoiser(plain, schedule, "v")
    m = AYF({"teacher": teacher, "student": Denoiser(mapped, schedule, "v")})
    x, t = torch.randn(8, 2), torch.rand(8)
    w = {"w": torch.rand(8)} if guided else {}
    assert torch.equal(m.student(x, t, s=t / 2, **w), teacher(x, t))
    m.share = 1.0
    m.loss(x, torch.randn(8, 2), {}).backward()
    assert mapped.condition.gap.outer.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in plain.parameters())


def test_the_tangent_does_not_follow_the_wiggle_of_integer_timesteps():
    """|g| with a wiggle A sin(1000 t): at most A + (t - s) (2 A / h + O(h)); an exact derivative has 1000 A."""
    schedule, size, h, c, norm = RectifiedFlow(), 1e-3, 0.02, 1e6, {}
    for how in (None, "forward"):
        net = student(wiggly(exact_map(schedule), size), schedule, "flow", guided=False, timesteps=1000)
        m = AYF({"teacher": Gaussian([0.0], STD, schedule), "student": net}, distance=Apart(), c=c, jvp=how)
        m.share = 1.0
        norm[how] = c * m.loss(*drawn()).sqrt()  # |g| / (|g| + c)
    assert norm[None] < size + 2 * size / h and norm["forward"] > 0.3


def test_the_student_is_evaluated_within_its_range_of_times_only():
    seen, h = [], 0.02

    def spy(x, t, s, **cond):
        seen.append((t, s))
        return x

    net = student(spy, RectifiedFlow(), "flow", guided=False, timesteps=1000)
    m = AYF({"teacher": Gaussian([0.0], STD, RectifiedFlow()), "student": net})
    m.distance = lambda n, **kw: torch.linspace(0.01, 0.9, n, **kw)
    m.loss(*drawn())
    (t, s), (ahead, _), (back, _) = seen[0], seen[-2], seen[-1]
    torch.testing.assert_close(ahead, (t + h).clamp_max(1))
    torch.testing.assert_close(back, torch.maximum(t - h, torch.maximum(s, t / 2)))


def test_both_derivatives_train_alike():
    net, losses = MLP(dim=2, width=16, flow_map=True), []
    for p in net.parameters():
        p.data = torch.randn_like(p) * 0.2
    x, z, cond = drawn(dim=2)
    for how in ("forward", "difference"):
        torch.manual_seed(1)
        teacher = Gaussian([0.0, 0.3], STD, RectifiedFlow())
        m = AYF({"teacher": teacher, "student": Denoiser(net.double(), RectifiedFlow())}, jvp=how)
        m.share = 0.9
        losses.append(m.loss(x, z, cond))
    torch.testing.assert_close(*losses, atol=1e-7, rtol=1e-6)


def test_what_the_networks_cannot_take_is_refused():
    teacher = Gaussian([0.0, 0.0], STD, RectifiedFlow())
    with pytest.raises(BadInput, match="flow_map: true"):
        AYF({"teacher": teacher, "student": Denoiser(MLP(dim=2, width=8), RectifiedFlow())})
    with pytest.raises(BadInput, match="guided: true"):
        net = MLP(dim=2, width=8, flow_map=True)
        AYF({"teacher": teacher, "student": Denoiser(net, RectifiedFlow())}, guidance_range=[1.0, 2.0])


def test_more_steps_do_not_hurt_a_flow_map_with_noise_in_its_sampler():
    m = method(RectifiedFlow(), gamma=0.4, grid=4)
    assert isinstance(m.sampler, FlowMap) and m.sampler.stochastic
    z = torch.randn(20000, 1, generator=torch.Generator().manual_seed(0)).double()
    x = m.sample(z, {}, generator=torch.Generator().manual_seed(1))
    assert x.std().item() == pytest.approx(STD, abs=0.01)

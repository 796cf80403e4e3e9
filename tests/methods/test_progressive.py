"""Progressive distillation: each rung's optimum is the teacher's two steps, the ladder's the original grid."""

import copy

import pytest
import torch
from exact import Pair, drawn, gradient, student

from distill.denoise import Denoiser, Gaussian, GaussianMixture, Guided
from distill.errors import BadInput
from distill.methods import Guidance, Progressive
from distill.models.small import MLP
from distill.noise import RectifiedFlow, Table, TrigFlow, VPCosine, VPLinear
from distill.solvers import DDIM, Overshoot, solve
from distill.times import Grid, halving_steps

SCHEDULES = {
    "flow": RectifiedFlow(),
    "cosine": VPCosine(),
    "linear": VPLinear(),
    "trig": TrigFlow(0.5),
    "table": Table([0.9, 0.6, 0.3, 0.05]),
}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
STD = 0.5


def two_steps(teacher, steps, stride=1):
    """The x that lands in one DDIM step where the teacher's two land, as a formula of (x_t, t)."""

    def formula(x_t, t, **cond):
        m, s = ((t - c * stride / steps).clamp(min=0) for c in (0.5, 1))
        m, s = (torch.where(a < 1e-9, 0.0, a) for a in (m, s))
        x_s = DDIM()(teacher, DDIM()(teacher, x_t, t, m, **cond), m, s, **cond)
        return DDIM().invert(teacher.schedule, x_s, x_t, t, s)

    return formula


def on_rungs(schedule, m):
    """(method on that rung, its exact student) from the top; the student is then promoted by hand."""
    teacher, stride = m.teacher, 2 if isinstance(m.sampler, Overshoot) else 1  # that sampler jumps twice as far
    for rung, steps in enumerate(m.ladder):
        m.rung = rung
        m.student = student(two_steps(teacher, steps, stride), schedule, guided=False)
        yield m
        m.promoted = teacher = copy.deepcopy(m.student)


def method(schedule, teacher=None, **kw):
    teacher = teacher or Gaussian([0.0], STD, schedule)
    return Progressive({"teacher": teacher, "student": student(lambda x, t: x, schedule, guided=False)}, **kw)


@every
def test_the_inverse_recovers_where_the_step_landed(schedule):
    x, x_t = torch.randn(2, 64, 3, dtype=torch.float64)
    t = torch.linspace(0.3, 1, 64, dtype=torch.float64)
    s = t * torch.linspace(0, 0.9, 64, dtype=torch.float64)
    x_s = DDIM().step(schedule, x, x_t, t, s)
    there = DDIM().step(schedule, DDIM().invert(schedule, x_s, x_t, t, s), x_t, t, s)
    torch.testing.assert_close(there, x_s, atol=1e-14, rtol=1e-13)


@every
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("distance, weight", [("mse", "snr"), ("mse", "v"), ("mae", "x")])
def test_every_rung_has_its_optimum_at_the_teachers_two_steps(schedule, stochastic, distance, weight):
    whole = method(schedule, teacher_steps=16, grid=2, distance=distance, weight=weight, stochastic=stochastic)
    for m in on_rungs(schedule, whole):
        assert m.loss(*drawn()) < (1e-20 if distance == "mse" else 1e-10)
        if distance == "mse":
            assert gradient(m, m.loss, *drawn()).abs() < 1e-8
        for delta in (0.1, -0.1):
            with torch.no_grad():
                m.student.net.off.fill_(delta)
            assert gradient(m, m.loss, *drawn()).sign() == torch.tensor(delta).sign()
        with torch.no_grad():
            m.student.net.off.zero_()


@every
def test_the_ladder_ends_at_the_original_grid(schedule):
    m = method(schedule, teacher_steps=16, grid=1)
    *_, m = on_rungs(schedule, m)
    z = drawn()[1]
    expected = solve(m.teacher, z, Grid.uniform(16), DDIM())
    torch.testing.assert_close(solve(m.student, z, m.grid, DDIM()), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps, slope", [(2, 0.2), (4, 0.34054), (8, 0.41478), (16, 0.45568)])
def test_one_step_has_the_slope_of_the_original_grid_not_of_the_flow(steps, slope):
    *_, m = on_rungs(RectifiedFlow(), method(RectifiedFlow(), teacher_steps=steps, grid=1))
    z = torch.ones(1, 1, dtype=torch.float64)
    assert solve(m.student, z, m.grid, DDIM()).item() == pytest.approx(slope, abs=5e-6)


def test_a_teacher_that_knows_x_is_recovered():
    class Knows(Denoiser):
        def __init__(self):
            super().__init__(None, RectifiedFlow(), "x")

        def native(self, x_t, t):
            return self.x

    m = method(RectifiedFlow(), Knows(), teacher_steps=8, grid=4, weight="x")
    x, z, cond = drawn()
    m.teacher.x, m.student = x, student(lambda x_t, t: x, guided=False)
    assert m.loss(x, z, cond) < 1e-20


def test_padding_does_not_matter():
    m = method(RectifiedFlow(), Gaussian([0.0, 0.0], STD, RectifiedFlow()), distance="mae", weight="x", grid=4)
    m.teacher.native = lambda x, t, mask: Gaussian([0.0, 0.0], STD, RectifiedFlow())(x, t)
    m.student = student(lambda x, t, mask: x / 3, shape=(2,), guided=False)
    x, z, _ = drawn(dim=2)
    mask = torch.tensor([[1.0, 0.0]]).expand(len(x), 2)
    values = []
    for padding in (0.0, 7.0):
        torch.manual_seed(0)
        values.append(m.loss(torch.stack([x[:, 0], x[:, 1] + padding], 1), z, {"mask": mask}))
    assert values[0] == values[1] > 0


def test_stage_two_gives_the_distilled_teacher_and_the_student_the_same_w():
    schedule, (x, z, cond) = RectifiedFlow(), drawn(labels=1)
    pair = Pair([[-0.4], [0.7]], STD, schedule=schedule)
    one = student(lambda x, t, w, label: Guided(pair)(x, t, w=w, label=label))  # the optimum of stage one
    two = student(two_steps(one, 4))
    m = Progressive({"teacher": one, "student": two}, teacher_steps=8, grid=4, guidance_range=[1.0, 4.0])
    assert m.loss(x, z, cond) < 1e-20
    plain = Progressive({"teacher": pair, "student": two}, teacher_steps=8, grid=4, guidance_range=[1.0, 4.0])
    assert plain.loss(x, z, cond) < 1e-20, "with the undistilled teacher guidance is applied here"
    later = Progressive({"teacher": pair, "student": two}, teacher_steps=16, grid=4, guidance_range=[1.0, 4.0])
    later.rung, later.promoted = 1, one
    assert later.loss(x, z, cond) < 1e-20, "a promoted teacher is told w too"
    Guidance({"teacher": pair, "student": one})  # and stage one takes the same network


def test_a_guided_student_with_the_teachers_weights_starts_as_the_teacher():
    plain, guided = MLP(dim=2, width=16), MLP(dim=2, width=16, guided=True)
    guided.load_state_dict(plain.state_dict(), strict=False)
    teacher = Denoiser(plain, RectifiedFlow())
    m = Progressive({"teacher": teacher, "student": Denoiser(guided, RectifiedFlow())}, guidance_range=[1.0, 4.0])
    x, t, w = torch.randn(8, 2), torch.rand(8), 5 * torch.rand(8)
    assert torch.equal(m.student(x, t, w=w), teacher(x, t)) and torch.equal(m.promoted(x, t, w=w), teacher(x, t))


def climbing(steps, **kw):
    torch.manual_seed(0)
    schedule = RectifiedFlow()
    m = Progressive(
        {
            "teacher": GaussianMixture([[-1.0], [1.0]], 0.3, schedule=schedule),
            "student": Denoiser(MLP(dim=1, width=8), schedule),
        },
        optim={"student": {"decay": "cosine", "lr": 1e-2}},
        **kw,
    )
    m.configure_optimizers()
    m.total_steps = steps
    return m


def test_the_run_promotes_by_itself_and_starts_anew():
    m, seen = climbing(12, teacher_steps=8, grid=1), []
    promote = m.promote

    def watched():
        before = copy.deepcopy(m.ema.state_dict())
        promote()
        for network in (m.promoted, m.student, m.ema):
            assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values()))
        assert not m.placement.optimizers["student"].state and m.schedule_step() == (0, 4)
        seen.append(m.step)

    m.promote = watched
    for _ in range(12):
        m.training_step({"x": torch.randn(16, 1)})
    assert seen == [4, 8] and m.rung == 2
    assert not any(p.requires_grad for p in m.promoted.parameters()) and not m.train().promoted.training


def test_a_longer_run_stays_on_its_last_rung():
    m = climbing(6, teacher_steps=8, grid=1)
    for _ in range(6):
        m.training_step({"x": torch.randn(16, 1)})
    longer = climbing(60, teacher_steps=8, grid=1)
    longer.restore(m.snapshot())
    assert longer.rung == 2
    longer.training_step({"x": torch.randn(16, 1)})
    assert longer.rung == 2 and longer.begun == m.begun
    for a, b in zip(m.promoted.parameters(), longer.promoted.parameters()):
        assert torch.equal(a, b)


def test_the_last_rung_keeps_the_steps_that_are_left():
    m = climbing(14, teacher_steps=8, grid=1)  # 14 = 3 * 4 + 2
    rungs = []
    for m.step in range(14):
        assert [role for role, _ in m.turns(m.step)] == ["student"]
        rungs.append(m.rung)
    assert rungs == [0] * 4 + [1] * 4 + [2] * 6


@pytest.mark.parametrize(
    "kw, text",
    [
        ({"teacher_steps": 24, "grid": 5}, "teacher_steps"),
        ({"teacher_steps": 4, "grid": 4}, "2, 4, 8"),
        ({"grid": [1, 0.7, 0]}, "uniform"),
        ({"guidance_range": [1.0, 2.0]}, "guided: true"),
        ({"distance": "l2"}, "mae"),
    ],
)
def test_what_cannot_be_a_ladder_is_refused(kw, text):
    with pytest.raises(BadInput, match=text):
        method(RectifiedFlow(), **kw)


def test_rungs_and_samplers():
    assert halving_steps(32, Grid.uniform(4)) == (16, 8, 4)
    assert isinstance(method(RectifiedFlow(), stochastic=True).sampler, Overshoot)
    assert method(RectifiedFlow()).sampler.stochastic is False

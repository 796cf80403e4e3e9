"""Reflow: pairs of the teacher, straight paths at the optimum, one Euler step that is exact."""

from pathlib import Path

import pytest
import torch
from exact import Pair, drawn, gradient, student

from distill import config
from distill.cli.data import solve_pairs
from distill.denoise import Denoiser, Gaussian, GaussianMixture
from distill.errors import BadInput
from distill.methods import Reflow
from distill.models.small import MLP
from distill.noise import RectifiedFlow, Table, TrigFlow, VPCosine, VPLinear
from distill.solvers import DDIM, solve
from distill.training.experiment import build_experiment

SCHEDULES = {
    "flow": RectifiedFlow(),
    "shift": RectifiedFlow(3.0),
    "cosine": VPCosine(),
    "linear": VPLinear(),
    "trig": TrigFlow(),
    "table": Table([0.9, 0.6, 0.3, 0.05]),
}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
STD = 0.5
RECIPE = Path(__file__).parents[2] / "configs" / "toy" / "reflow.yaml"


def method(schedule, teacher=None, net=None, **kw):
    teacher = teacher or Gaussian([0.0], STD, schedule)
    return Reflow({"teacher": teacher, "student": net or student(lambda x, t: x, schedule, guided=False)}, **kw)


def straight(schedule, slope):
    """E[x | x_t] on the pairs (slope z, z), whose paths do not cross."""

    def formula(x_t, t):
        a, s = schedule.at(t, x_t)
        s1 = schedule.sigma(torch.ones_like(t))[:, None]
        return torch.where(t[:, None] == 1, x_t / s1, x_t / (a * slope + s)) * slope

    return student(formula, schedule, guided=False)


@pytest.mark.parametrize(
    "steps, slope", [(1, 0.0), (2, 0.2), (4, 0.34054), (8, 0.41478), (16, 0.45568), (128, 0.49425)]
)
def test_the_slopes_of_euler_under_rectified_flow(steps, slope):
    m = method(RectifiedFlow(), solver="ddim", solver_steps=steps)
    assert m.endpoint(torch.ones(1, 1, dtype=torch.float64), {}).item() == pytest.approx(slope, abs=5e-6)


@every
@pytest.mark.parametrize("only_grid", [False, True])
def test_the_optimum_on_pairs_is_straight(schedule, only_grid):
    m = method(schedule, only_grid=only_grid, solver_steps=4, grid=3)
    _, z, _ = drawn()
    x, z, cond = m.draw(None, z, {})
    slope = (x / z)[0].item()
    m.student = straight(schedule, slope)
    assert m.loss(x, z, cond) < 1e-20 and gradient(m, m.loss, x, z, cond).abs() < 1e-9
    for delta in (0.1, -0.1):
        with torch.no_grad():
            m.student.net.off.fill_(delta)
        assert gradient(m, m.loss, x, z, cond).sign() == torch.tensor(delta).sign()


@pytest.mark.parametrize("time, weight", [(0.25, 16.0), (0.5, 4.0), (0.8, 1.5625)])
def test_the_loss_is_the_error_in_z_minus_x(time, weight):
    """(alpha/sigma + 1)^2 = t^-2 of rectified flow, times the squared error in x."""
    m = method(RectifiedFlow(), density=lambda n, **kw: torch.full((n,), time, **kw), solver_steps=4)
    x, z, cond = m.draw(None, drawn()[1], {})
    m.student = straight(RectifiedFlow(), (x / z)[0].item())
    with torch.no_grad():
        m.student.net.off.fill_(0.1)
    assert m.loss(x, z, cond).item() == pytest.approx(weight * 0.01, rel=1e-9)


def test_after_reflow_one_euler_step_is_exact():
    schedule, (_, z, _) = RectifiedFlow(), drawn()
    exact = Gaussian([0.0], STD, schedule).flow_map(z, torch.ones(len(z)).double(), torch.zeros(len(z)).double())
    model = straight(schedule, STD)
    for steps in (1, 2, 7):
        times = [k / steps for k in range(steps, -1, -1)]
        torch.testing.assert_close(solve(model, z, times, DDIM()), exact, atol=1e-13, rtol=0)
    t, x = torch.tensor([0.3], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    u = schedule.eps(model(x, t), x, t) - model(x, t)
    assert u.item() == pytest.approx((1 - STD) / (0.3 + 0.7 * STD), abs=1e-14)


def test_reflow_does_not_raise_the_transport_cost():
    oracle = GaussianMixture([[-1.0], [0.3], [1.2]], [0.25, 0.2, 0.3], schedule=RectifiedFlow())
    random = torch.Generator().manual_seed(0)
    x, z = oracle.sample(4000, random)[0], torch.randn(4000, 1, generator=random)
    paired = method(RectifiedFlow(), oracle).endpoint(z, {})
    assert (z - paired).square().mean() < (z - x).square().mean()
    assert (paired.mean() - x.mean()).abs() < 0.06 and (paired.std() - x.std()).abs() < 0.05


def test_the_batchs_x_is_used_only_with_its_own_z():
    torch.manual_seed(0)
    m = method(RectifiedFlow(), net=Denoiser(MLP(dim=1, width=8), RectifiedFlow()))
    optimizers, seen = m.configure_optimizers(), []
    m.optimizers, m.manual_backward = (lambda: optimizers), (lambda loss: loss.backward())
    loss = m.loss
    m.loss = lambda x, z, cond: seen.append((x, z, cond)) or loss(x, z, cond)
    x, z, label = torch.full((4, 1), 9.0), torch.randn(4, 1), torch.zeros(4).long()
    m.training_step({"x": x})
    assert not torch.equal(seen[-1][0], x)
    torch.testing.assert_close(seen[-1][0], m.endpoint(seen[-1][1], {}))
    m.student_conditions = lambda cond, n: {}
    m.training_step({"x": x, "z": z, "label": label})
    assert torch.equal(seen[-1][0], x) and torch.equal(seen[-1][1], z) and list(seen[-1][2]) == ["label"]


def test_a_stored_path_is_the_data_at_time_0_and_the_noise_at_time_1():
    m, (_, z, _) = method(RectifiedFlow(), solver_steps=64), drawn(16)
    one = torch.ones(16, dtype=torch.float64)
    at = dict(zip(m.path_times, m.path(z, {}).unbind(1)))
    assert torch.equal(at[1.0], z)
    torch.testing.assert_close(at[0.0], m.teacher.flow_map(z, one, 0 * one), atol=1e-3, rtol=0)


def test_guidance_is_folded_into_the_pairs():
    schedule, (_, z, cond) = RectifiedFlow(), drawn(labels=1)
    m = method(schedule, Pair([[-0.4], [0.7]], STD, schedule=schedule), guidance=3.0, solver_steps=64)
    moved = Gaussian([-0.4 + 3 * 1.1], STD, schedule)
    times = [k / 64 for k in range(64, -1, -1)]
    torch.testing.assert_close(m.endpoint(z, cond), solve(moved, z, times, m.solver), atol=1e-12, rtol=0)


def test_distillation_sees_the_grids_times_and_its_own_start():
    seen, schedule = [], Table([0.9, 0.6, 0.3, 0.05])
    watched = student(lambda x, t: seen.append((x, t)) or x, schedule, guided=False)
    m = method(schedule, net=watched, only_grid=True, grid=4)
    x, z, cond = drawn()
    m.loss(x, z, cond)
    x_t, t = seen[-1]
    assert set(t.tolist()) == {0.25, 0.5, 0.75, 1.0}
    last = t == 1
    torch.testing.assert_close(x_t[last], z[last] * 0.95**0.5, atol=1e-12, rtol=0)


def test_a_run_trains_on_stored_pairs(tmp_path):
    recipe = config.load([RECIPE], ["log.wandb=disabled", "train.steps=3", "train.validate_every=0", "train.threads=1"])
    solve_pairs(recipe, tmp_path / "pairs", 64)
    recipe.data = {
        "_target_": "distill.data.pairs.Pairs",
        "path": str(tmp_path / "pairs" / "train"),
        "batch_size": 16,
        "teacher": recipe.roles.teacher,
    }
    experiment = build_experiment(recipe)
    batch = next(experiment.data.loader())
    torch.testing.assert_close(experiment.method.endpoint(batch["z"], {}), batch["x"])
    experiment.method.endpoint = None  # a run on stored pairs must not solve
    optimizers = experiment.method.configure_optimizers()
    experiment.method.optimizers, experiment.method.manual_backward = (
        (lambda: optimizers),
        (lambda loss: loss.backward()),
    )
    experiment.method.training_step(batch)
    assert experiment.suite().oracle is experiment.data.oracle
    with pytest.raises(BadInput, match="does not train on pairs"):
        solve_pairs(config.load([RECIPE.with_name("tdm.yaml")]), tmp_path / "none", 4)

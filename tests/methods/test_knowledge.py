"""Knowledge distillation: the teacher's path, the student that walks it in the grid's steps, stored paths."""

from pathlib import Path

import pytest
import torch
from exact import Pair, drawn, gradient, student

from distill import config
from distill.cli.data import solve_pairs
from distill.denoise import Gaussian, GaussianMixture
from distill.errors import BadInput
from distill.methods import Knowledge
from distill.noise import VE, RectifiedFlow, Table, TrigFlow, VPCosine
from distill.solvers import DDIM
from distill.training.experiment import build_experiment

SCHEDULES = {
    "flow": RectifiedFlow(),
    "shift": RectifiedFlow(3.0),
    "cosine": VPCosine(),
    "trig": TrigFlow(),
    "ve": VE(20.0),
    "table": Table([0.9, 0.6, 0.3, 0.05]),
}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
TOY = Path(__file__).parents[2] / "configs" / "toy"


def jumping(oracle, grid):
    """The student whose DDIM step from each time of the grid lands where the exact flow does at the next."""
    times = torch.tensor(grid.times, dtype=torch.float64)

    def formula(x_t, t):
        s = times[1:][(t[:, None] - times[:-1]).abs().argmin(1)]
        return DDIM().invert(oracle.schedule, oracle.flow_map(x_t, t, s), x_t, t, s)

    return student(formula, oracle.schedule, guided=False)


def method(oracle, **kw):
    m = Knowledge({"teacher": oracle, "student": student(lambda x, t: x, oracle.schedule, guided=False)}, **kw)
    m.student = jumping(oracle, m.grid)
    return m


@every
@pytest.mark.parametrize("grid", [1, 3])
def test_the_optimum_walks_the_exact_flow(schedule, grid):
    oracle, (_, z, _) = Gaussian([0.2], 0.5, schedule), drawn()
    m = method(oracle, grid=grid)
    x_1, n, states = schedule.start(z), len(z), [z]
    for t, s in zip(m.grid.times, m.grid.times[1:]):
        x_1 = oracle.flow_map(x_1, *(torch.full((n,), a, dtype=x_1.dtype) for a in (t, s)))
        states.insert(0, x_1)
    path = torch.stack(states, 1)
    assert m.loss(path, {}) < 1e-20 and gradient(m, m.loss, path, {}).abs() < 1e-9
    for delta in (0.1, -0.1):
        with torch.no_grad():
            m.student.net.off.fill_(delta)
        assert gradient(m, m.loss, path, {}).sign() == torch.tensor(delta).sign()


def test_a_path_is_the_flow_at_the_grids_times_data_first():
    oracle = GaussianMixture([[-1.0], [0.3], [1.2]], [0.25, 0.2, 0.3], schedule=RectifiedFlow())
    _, z, _ = drawn(64)
    m = Knowledge(
        {"teacher": oracle, "student": student(lambda x, t: x, oracle.schedule, guided=False)}, grid=3, solver_steps=40
    )
    path, ones = m.path(z, {}), torch.ones(64, dtype=torch.float64)
    assert path.shape == (64, 4, 1) and torch.equal(path[:, -1], z)
    for i, s in enumerate(m.path_times[:-1]):
        torch.testing.assert_close(path[:, i], oracle.flow_map(z, ones, s * ones), atol=2e-3, rtol=0)


def test_guidance_is_folded_into_the_path():
    schedule, (_, z, cond) = RectifiedFlow(), drawn(labels=1)
    teacher = Pair([[-0.4], [0.7]], 0.5, schedule=schedule)
    m = Knowledge(
        {"teacher": teacher, "student": student(lambda x, t: x, schedule)}, guidance=3.0, grid=2, solver_steps=64
    )
    moved = Gaussian([-0.4 + 3 * 1.1], 0.5, schedule)
    one = torch.ones(len(z), dtype=torch.float64)
    torch.testing.assert_close(m.path(z, cond)[:, 1], moved.flow_map(z, one, one / 2), atol=1e-3, rtol=0)


def test_pairs_are_a_path_of_two_times_and_stored_times_are_the_grids():
    oracle, (x, z, _) = Gaussian([0.2], 0.5, RectifiedFlow()), drawn(4)
    one, two = (method(oracle, grid=grid) for grid in (1, [1, 0.4, 0]))
    one.paired = two.paired = True
    path, plain = one.draw(x, z, {"label": z})
    assert torch.equal(path[:, 0], x) and torch.equal(path[:, 1], z) and path.shape == (4, 2, 1)
    assert set(plain) == {"label"}, "a path and its times are no conditions"
    stored = {"path": torch.stack([x, x, z], 1), "times": torch.tensor([[0.0, 0.4, 1.0]]).expand(4, 3)}
    assert torch.equal(two.draw(x, z, stored)[0], stored["path"]) and two.draw(x, z, stored)[1] == {}
    with pytest.raises(BadInput, match=r"times \[1.0, 0.0\], the student's grid is \[1.0, 0.4, 0.0\]"):
        two.draw(x, z, {})
    with pytest.raises(BadInput, match="method.grid"):
        two.draw(x, z, stored | {"times": torch.tensor([[0.0, 0.39, 1.0]]).expand(4, 3)})


def test_a_run_trains_on_stored_paths_and_on_no_others(tmp_path):
    quiet = ["log.wandb=disabled", "train.steps=3", "train.validate_every=0", "train.threads=1"]
    recipe = config.load([TOY / "knowledge.yaml"], quiet)
    solve_pairs(recipe, tmp_path / "paths", 64)
    recipe.data = {
        "_target_": "distill.data.pairs.Pairs",
        "path": str(tmp_path / "paths" / "train"),
        "batch_size": 16,
        "teacher": recipe.roles.teacher,
    }
    experiment = build_experiment(recipe)
    batch = next(experiment.data.loader())
    torch.testing.assert_close(experiment.method.path(batch["z"], {}), batch["path"])
    experiment.method.path = None  # it must not solve again
    experiment.method.configure_optimizers()
    experiment.method.training_step(batch)
    assert experiment.method.logs["student/loss"] > 0
    recipe.method.grid = 3
    other = build_experiment(recipe).method
    other.configure_optimizers()
    with pytest.raises(BadInput, match=r"paths at the times \[1.0, 0.5, 0.0\].*method.grid"):
        other.training_step(batch)

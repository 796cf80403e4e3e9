"""TDM on Gaussians: the identity of its noise, its optimum in every segment, sign, guidance, who gets gradient."""

import copy

import pytest
import torch
from affine import Affine, Labelled, in_turn, of_gaussian, pull, touched
from exact import student as formula
from torch import nn

from distill.denoise import Denoiser, Gaussian
from distill.errors import BadInput
from distill.losses.matching import importance
from distill.methods import TDM
from distill.models.small import MLP
from distill.noise import RectifiedFlow, Table, VPCosine, VPLinear
from distill.solvers import DDIM
from distill.times import Grid

D = torch.float64
TABLE = Table(tuple(0.98**n * 0.99 for n in range(1, 20)))
SCHEDULES = [RectifiedFlow(), RectifiedFlow(3.0), VPLinear(), VPCosine(), TABLE]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_renoised_point_is_x_with_the_mixed_noise(schedule):
    """x_u = alpha_u x + sigma_u eps_mix, eps_mix = (alpha_u/alpha_s sigma_s eps + beta noise) / sigma_u."""
    torch.manual_seed(0)
    x, x_t, noise = (torch.randn(64, 3, dtype=D) for _ in range(3))
    t, s = torch.full((64,), 0.8, dtype=D), torch.full((64,), 0.4, dtype=D)
    u = 0.42 + 0.35 * torch.rand(64, dtype=D)
    x_s = DDIM().step(schedule, x, x_t, t, s)
    x_u = schedule.transition(x_s, s, u, noise)
    ratio, beta = schedule.transition_coefs(s, u)
    eps, (alpha, sigma) = schedule.eps(x, x_t, t), schedule.at(u, x)
    mixed = (ratio[:, None] * schedule.sigma(s)[:, None] * eps + beta[:, None] * noise) / sigma
    assert (x_u - alpha * x - sigma * mixed).abs().max() < 1e-12
    assert (mixed - schedule.eps(x, x_u, u)).abs().max() < 1e-10
    weights = (ratio * schedule.sigma(s)) ** 2 + beta**2
    assert torch.allclose(weights, schedule.sigma(u) ** 2), "independent Gaussian eps would mix to N(0, I)"


def test_the_importance_weight_is_one_where_eps_is_gaussian_and_the_dimension_high():
    torch.manual_seed(0)
    schedule, n = RectifiedFlow(), 64
    worst = []
    for d in (8, 512, 16384):
        x, eps, noise = (torch.randn(n, d, dtype=D) for _ in range(3))
        s, u = torch.full((n,), 0.3, dtype=D), torch.full((n,), 0.6, dtype=D)
        x_u = schedule.transition(schedule.add_noise(x, s, eps), s, u, noise)
        worst.append((importance(schedule.eps(x, x_u, u), noise) - 1).abs().max().item())
    assert worst[0] > worst[1] > worst[2] and worst[2] < 0.04


class Shifted(Gaussian):
    """The exact denoiser of a Gaussian, plus a trainable shift m of its prediction."""

    def __init__(self, mean, std, shift, dim=1):
        super().__init__([mean] * dim, std, RectifiedFlow())
        self.net = nn.Module()
        self.net.shape, self.net.guided = (dim,), False
        self.m, self.g = nn.Parameter(torch.full((dim,), shift, dtype=D)), nn.Parameter(torch.zeros(dim, dtype=D))

    def native(self, x_t, t, label=None):
        return super().native(x_t, t) + self.m + self.g * x_t


class Segment(Denoiser):
    """The exact critic of one segment: Tweedie's formula on the Gaussian law of x_u of a linear student."""

    def __init__(self, student, grid, k):
        super().__init__(None, student.schedule, "x")
        self.student, self.mean, self.var = [student], 0.0, 1.0
        for t, s in zip(grid.times, grid.times[1 : grid.steps - k + 2]):
            self.t, self.s = (torch.tensor([a], dtype=D) for a in (t, s))
            self.mean, self.var = self.step(self.mean, self.var)

    def step(self, mean, var):
        at = torch.tensor([[0.0], [1.0]], dtype=D)
        with torch.no_grad():
            x = self.student[0](at, self.t.expand(2))
        ends = DDIM().step(self.schedule, x, at, self.t.expand(2), self.s.expand(2))
        b, a = ends[0], ends[1] - ends[0]
        return a * mean + b, a**2 * var

    def forward(self, x_u, u, **cond):
        ratio, beta = self.schedule.transition_coefs(self.s.expand(len(u)), u)
        mean, var = ratio[:, None] * self.mean, ratio[:, None] ** 2 * self.var + beta[:, None] ** 2
        alpha, sigma = self.schedule.at(u, x_u)
        return (x_u - sigma**2 * (x_u - mean) / var) / alpha


class Only(Grid):
    """A grid whose every draw is one segment."""

    def draw(self, n, generator=None, device=None):
        return torch.full((n,), self.__dict__["only"])


def of_segment(k, shift, steps=3, **options):
    student = Shifted(0.3, 0.6, shift)
    grid = Only(Grid.uniform(steps).times)
    grid.__dict__["only"] = k
    roles = {"teacher": of_gaussian(0.3, 0.6), "student": student, "critic": Segment(student, grid, k)}
    return TDM(roles, grid=grid, **options)


def mirrored(method, n=4000):
    """The student's loss on noise and its mirror image: odd functions of the noise average to exactly zero."""
    torch.manual_seed(0)
    z = torch.randn(n // 2, 1, dtype=D)
    path, cond, conditions = method.draw(None, torch.cat([z, -z]), {})
    draws = torch.rand(n // 2, dtype=D), torch.randn(n // 2, 1, dtype=D)
    like = {"rand_like": torch.rand_like, "randn_like": torch.randn_like}
    try:
        torch.rand_like = lambda a: torch.cat([draws[0]] * 2)
        torch.randn_like = lambda a: torch.cat([draws[1], -draws[1]])
        return method.student_loss(path, cond, conditions)
    finally:
        for name, f in like.items():
            setattr(torch, name, f)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("huber", [None, 1e-3])
def test_an_exact_student_with_its_exact_critic_has_no_mean_gradient_in_any_segment(k, huber):
    method = of_segment(k, 0.0, huber=huber)
    m, _ = pull(method, lambda: mirrored(method))
    assert abs(m) < 1e-10
    u = torch.full((5,), (k - 0.5) / 3, dtype=D)
    x_u = torch.linspace(-1, 1, 5, dtype=D)[:, None]
    if k < 3:  # the DDIM step's own error makes the law narrower: zero in the mean, not per sample
        assert (method.critic(x_u, u) - method.teacher(x_u, u)).abs().max() > 1e-3


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("shift", [0.2, -0.2])
def test_descent_undoes_a_shift_in_every_segment(k, shift):
    method = of_segment(k, shift, huber=None)
    m, _ = pull(method, lambda: mirrored(method))
    assert m * shift > 1e-3


def test_equal_critic_and_teacher_leave_the_student_alone():
    for huber in (None, 1e-3):
        roles = {"teacher": of_gaussian(0, 1), "student": Affine(0.4, 0.7), "critic": of_gaussian(0, 1)}
        method = TDM(roles, grid=3, huber=huber)
        assert pull(method, lambda: mirrored(method)) == (0.0, 0.0)  # noqa: B023


def test_guidance_extrapolates_the_mean():
    cond = {"label": torch.zeros(200, dtype=torch.long)}
    for w, still in ((3.0, True), (2.0, False), (4.0, False)):
        roles = {"teacher": Labelled([0.5], 0.2, 0.8), "student": Affine(1.1, 0.8), "critic": of_gaussian(1.1, 0.8)}
        method = TDM(roles, grid=1, guidance=w, huber=None)

        def loss(method=method):
            torch.manual_seed(0)
            return method.student_loss(*method.draw(None, torch.randn(200, 1, dtype=D), cond))

        assert (abs(pull(method, loss)[0]) < 1e-12) == still


def small(**options):
    net = Denoiser(MLP(2, 16, 2), RectifiedFlow()).double()
    roles = {role: copy.deepcopy(net) for role in ("teacher", "student", "critic")}
    for role in ("student", "critic"):
        nn.init.normal_(roles[role].net.leave.weight)
    return TDM(roles, **options).double()


def test_each_turn_reaches_its_own_role_alone():
    method = small(grid=3)
    shared = method.draw(None, torch.randn(8, 2, dtype=D), {})
    for role, call in (("critic", method.critic_loss), ("student", method.student_loss)):
        in_turn(method, role)
        call(*shared).backward()
        assert touched(method) == {role}


def test_the_path_is_the_samplers_own():
    """What is trained on is what `sample` walks: the stored points continue to the sampler's result."""
    method = small(grid=3)
    method.ema = method.student
    z = torch.randn(8, 2, dtype=D)
    path, _, conditions = method.draw(None, z, {})
    assert path.shape == (3, 8, 2) and torch.equal(path[2], z)
    with torch.no_grad():
        x = method.student(path[0], torch.full((8,), 1 / 3, dtype=D), **conditions)
    assert torch.allclose(x, method.sample(z, {}), atol=1e-12)


def quadrature(weight, shift, k, steps=4, margin=0.02):
    """E_u of `weight(alpha_u, sigma_u)` over segment k of a uniform grid, u as the method draws it."""
    low, high = max((k - 1) / steps, margin), k / steps - margin
    schedule, u = RectifiedFlow(shift), torch.linspace(low, high, 20_001, dtype=D)
    alpha, sigma = schedule(u)
    return (torch.trapezoid(weight(alpha, sigma), u) / (high - low)).item()


WEIGHT = {  # of an error of the flow; x - F = sigma times it
    "native": lambda alpha, sigma: torch.ones_like(sigma),
    "auto": lambda alpha, sigma: torch.ones_like(sigma),
    "snr": lambda alpha, sigma: (alpha / sigma).square().clamp_max(5.0) * sigma**2,
}
SHARES = {(3.0, "snr"): (0.007, 0.07, 0.31, 0.61), (3.0, "auto"): (0.25, 0.25, 0.25, 0.25)}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("weight", WEIGHT)
def test_a_flow_critics_error_counts_in_each_segment_as_the_formula_says(weight, shift):
    """The critic is off by 1 in its own output everywhere; noisiest segment first."""
    schedule, losses = RectifiedFlow(shift), []
    critic = formula(lambda x_u, u, **_: x_u / schedule.sigma(u)[:, None] + 1, schedule, "flow", guided=False)
    net = Denoiser(MLP(1, 8, 1), schedule).double()
    method = TDM({"teacher": net, "student": net, "critic": critic}, grid=4, critic_weight=weight, weigh=False)
    path, zeros = torch.zeros(4, 4000, 1, dtype=D), torch.zeros(4000, 1, dtype=D)
    for k in (4, 3, 2, 1):
        torch.manual_seed(0)
        t, s = method.grid.segment(torch.full((4000,), k), D)
        u = s.clamp_min(0.02) + (t - 0.02 - s.clamp_min(0.02)) * torch.rand(4000, dtype=D)
        method.segment = lambda *_, u=u: (
            zeros,
            torch.randn(4000, 1, dtype=D),
            u,
            zeros,
        )  # x = 0: its flow is x_u / sigma_u
        losses.append(method.critic_loss(path, {}, {}).item())
    expected = [quadrature(WEIGHT[weight], shift, k) for k in (4, 3, 2, 1)]
    assert losses == pytest.approx(expected, rel=0.03, abs=1e-3)
    if (shift, weight) in SHARES:
        assert [loss / sum(losses) for loss in losses] == pytest.approx(SHARES[shift, weight], abs=0.011)


@pytest.mark.parametrize(("prediction", "chosen"), [("eps", "snr"), ("x", "snr"), ("v", "native"), ("flow", "native")])
def test_the_critics_weight_follows_its_prediction(prediction, chosen):
    net = Denoiser(MLP(1, 8, 1), VPLinear(), prediction)
    roles = {"teacher": net, "student": net, "critic": copy.deepcopy(net)}
    assert TDM(roles).critic_weight == chosen
    assert TDM(roles, critic_weight="snr").critic_weight == "snr"
    with pytest.raises(BadInput, match="Did you mean 'native'"):
        TDM(roles, critic_weight="nativ")


@pytest.mark.parametrize("weight", ["snr", "native"])
def test_the_critic_has_no_gradient_at_the_mean_of_x_and_is_pulled_back_to_it(weight):
    """x_u is made from x_s: with x and x_u fixed, the gradient in an offset of the critic's output is by hand."""
    critic = formula(lambda x_u, u, **_: 0 * x_u, RectifiedFlow(), "flow", guided=False)
    net = Denoiser(MLP(1, 8, 1), RectifiedFlow()).double()
    method = TDM({"teacher": net, "student": net, "critic": critic}, grid=1, critic_weight=weight, weigh=False)
    x, x_u, u = torch.randn(64, 1, dtype=D), torch.randn(64, 1, dtype=D), 0.05 + 0.9 * torch.rand(64, dtype=D)
    method.segment = lambda *_: (x, x_u, u, None)
    (found,) = torch.autograd.grad(method.critic_loss(torch.zeros(1, 64, 1), {}, {}), critic.net.off)
    flow = (x_u - x) / u[:, None]  # the flow that belongs to x
    factor = 1.0 if weight == "native" else (((1 - u) / u).square().clamp_max(5.0) * u**2)[:, None]
    assert torch.allclose(found, (-2 * factor * flow).mean(0))


def test_u_stays_inside_its_segment():
    method = small(grid=4, margin=0.02)
    path, _, conditions = method.draw(None, torch.randn(500, 2, dtype=D), {})
    torch.manual_seed(0)
    k = method.grid.draw(500)
    torch.manual_seed(0)
    _, _, u, _ = method.segment(path, conditions)
    t, s = method.grid.segment(k, D)
    assert (u <= t - 0.02 + 1e-9).all() and (u >= s.clamp_min(0.02) - 1e-9).all()


def test_a_segment_narrower_than_its_margins_has_one_u():
    method = small(grid=[1, 0.51, 0.5, 0.03, 0], margin=0.02)
    path, _, conditions = method.draw(None, torch.randn(200, 2, dtype=D), {})
    torch.manual_seed(0)
    k = method.grid.draw(200)
    torch.manual_seed(0)
    _, _, u, _ = method.segment(path, conditions)
    assert (u[k == 1] == 0.02).all() and (u[k == 3] == 0.5).all() and len(u[k == 2].unique()) > 10


def test_u_stays_in_its_segment_or_reaches_up_to_noise():
    torch.manual_seed(0)
    seen = {}
    for separate in (True, False):
        m = tiny(separate=separate)
        path, cond, conditions = m.draw(None, torch.randn(512, 1), {})
        seen[separate] = torch.cat([m.segment(path, conditions)[2] for _ in range(4)])
    assert seen[True].max() <= 1 and (seen[False] > 0.5).float().mean() > (seen[True] > 0.5).float().mean() + 0.1


def tiny(**options):
    from distill.denoise import Denoiser, Gaussian
    from distill.methods import TDM
    from distill.models.small import MLP
    from distill.noise import RectifiedFlow

    net = Denoiser(MLP(dim=1, width=8, depth=1), RectifiedFlow(), "flow")
    return TDM({"teacher": Gaussian([0.0], 0.5, RectifiedFlow()), "student": net, "critic": net}, grid=2, **options)

"""Distillation-DPO: both forms against closed forms on order statistics, what critics learn, who gets gradient."""

import math
from functools import partial

import exact as students
import pytest
import torch
from affine import Affine, in_turn, of_gaussian, pull, touched

from distill import config
from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.methods import DistillationDPO, dpo
from distill.metrics.rewards import Near
from distill.models.small import MLP
from distill.noise import VE, RectifiedFlow
from distill.times import Uniform

D = torch.float64
NOISY = VE(sigma_max=4.0, rho=1.0)
SIGMAS = (0.3, 0.9, 2.0, 3.9)


class Order(Denoiser):
    """Exact E[x | x_u] of the larger (+1) or smaller (-1) of two draws of N(m, 1), under a VE schedule.

    p(x) = 2 phi(x - m) Phi(+-(x - m)) is skew normal; with y = x_u - m, k = 1/(1+sigma^2) and v^2 = k sigma^2 the
    posterior mean is m + k y +- (k sigma^2 / c) phi(ky/c) / Phi(+-ky/c), c^2 = 1 + v^2.
    """

    def __init__(self, mean, sign, schedule):
        super().__init__(None, schedule, "x")
        self.mean, self.sign = mean, sign

    def forward(self, x_u, u, **cond):
        return order(x_u, self.schedule.sigma(u)[:, None], self.mean, self.sign)


def order(x_u, sigma, mean, sign):
    y, k = x_u - mean, 1 / (1 + sigma**2)
    c = (1 + k * sigma**2).sqrt()
    a = k * y / c
    hazard = torch.exp(-0.5 * a**2) / math.sqrt(2 * math.pi) / torch.special.ndtr(sign * a)
    return mean + k * y + sign * k * sigma**2 / c * hazard


def exact(mean=0.0, std=1.0, sigma=0.9, **options):
    """Student N(mean, std^2), teacher N(0, 1), metric x itself; exact critics for std = 1."""
    student = Affine(mean, std / NOISY.noise_scale, schedule=NOISY)
    roles = {"teacher": of_gaussian(0, 1, schedule=NOISY), "student": student, "winner": Order(mean, 1, NOISY)}
    if options.get("form") == "paper":
        roles["loser"] = Order(mean, -1, NOISY)
    else:
        roles["critic"] = of_gaussian(mean, std, schedule=NOISY)
    u = NOISY.time(torch.tensor(-2 * math.log(sigma), dtype=D)).item()
    return DistillationDPO(roles, metric=lambda x, **_: x[:, 0], density=Uniform(u, u + 1e-9), **options)


def test_without_a_preference_p_is_that_of_the_page_and_0_ignores_the_metric():
    assert exact().prefer == 0.3 and exact(prefer=0.0).prefer == 0.0 and exact(prefer=0.7).prefer == 0.7


def test_the_order_statistics_critic_is_exact():
    """E[W(x_w,u)] = E[x_w] = 1/sqrt(pi), and regression of x_w on W has slope one."""
    torch.manual_seed(0)
    x = torch.randn(200_000, 2, dtype=D).amax(1, keepdim=True)
    u = torch.full((200_000,), 0.225, dtype=D)
    w = Order(0.0, 1, NOISY)(NOISY.add_noise(x, u, torch.randn_like(x)), u)
    assert w.mean().item() == pytest.approx(1 / math.sqrt(math.pi), abs=0.006)
    assert (((x - x.mean()) * (w - w.mean())).mean() / w.var()).item() == pytest.approx(1.0, abs=0.02)


@pytest.fixture
def plain(monkeypatch):
    """In one dimension the mean of the normaliser 1 / |x - D| is infinite: leave it out where means are compared."""
    monkeypatch.setattr(dpo, "matching", lambda x, fake, real, normalise: plain_matching(x, fake, real))


plain_matching = partial(dpo.matching, normalise="none")


def loss(method, n=40_000):
    torch.manual_seed(0)
    shared = method.draw(None, torch.randn(n, 1, dtype=D), {})
    return dict(method.turns(0))["student"](*shared)


def expected(sigma, prefer=0.0):
    """E[-p (W - F)] and E[-p (W - F) z], z = x/std, over all samples x ~ N(0, 1), by quadrature on x_u.

    E[z | x_u] = k x_u for the exact critic, k = 1 / (1 + sigma^2).
    """
    sigma = torch.tensor(sigma, dtype=D)
    x_u = torch.linspace(-9, 9, 20_001, dtype=D) * (1 + sigma**2).sqrt()
    density = torch.exp(-0.5 * x_u**2 / (1 + sigma**2)) / (2 * math.pi * (1 + sigma**2)).sqrt()
    step = -prefer * (order(x_u, sigma, 0.0, 1) - x_u / (1 + sigma**2))
    return [torch.trapezoid(density * f, x_u).item() for f in (step, step * x_u / (1 + sigma**2))]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_without_preference_a_student_equal_to_its_teacher_rests_and_a_wider_one_is_narrowed(plain, sigma):
    """d loss / d scale at the teacher is 0; each sample's own critic instead gave 0.0065, 0.156, 0.436, 0.575."""
    assert pull(method := exact(sigma=sigma, prefer=0.0), lambda: loss(method, 2000)) == pytest.approx(
        (0, 0), abs=1e-14
    )
    wide = exact(std=1.2, sigma=sigma, prefer=0.0)
    k, k_d = 1.44 / (1.44 + sigma**2), 1 / (1 + sigma**2)  # E[(F - D) x] / std = (k - k_d) std
    m, g = pull(wide, lambda: loss(wide))
    assert g / NOISY.noise_scale == pytest.approx((k - k_d) * 1.2, abs=0.01) and abs(m) < 0.01


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_derived_form_climbs_the_ratio_of_winners_to_all(plain, sigma):
    """The mean gradients in mean and scale are those of -p (W - F) by quadrature: both non-zero, the mean goes up."""
    method = exact(sigma=sigma, prefer=0.5)
    m, g = pull(method, lambda: loss(method))
    mean, scale = expected(sigma, 0.5)
    assert (m, g / NOISY.noise_scale) == pytest.approx((mean, scale), abs=0.01)
    assert mean < -0.02
    assert pull(away := exact(0.5, sigma=sigma, prefer=0.0), lambda: loss(away))[0] > 0.02, "p = 0 goes back"


def test_the_papers_form_lowers_the_reward_of_a_student_equal_to_its_teacher(plain):
    """W - D > 0 on winners drags them back, D - L > 0 on losers pushes them away: both downwards (r = x)."""
    method = exact(form="paper")
    m, _ = pull(method, lambda: loss(method))
    k = 1 / (1 + 0.9**2)  # E(W - D) - E(L - D) = (1 - k) 2 / sqrt(pi)
    assert m == pytest.approx((1 - k) * 2 / math.sqrt(math.pi), abs=0.02), "descent on m moves the mean down"


def test_equal_critics_and_equal_samples_cancel_in_the_papers_form():
    roles = {"teacher": of_gaussian(0, 1), "student": Affine(0.4, 0.8)}
    critics = {"winner": of_gaussian(0.4, 0.8), "loser": of_gaussian(0.4, 0.8)}
    method = DistillationDPO(roles | critics, metric=lambda x, **_: x[:, 0], form="paper", spread=1.0)
    assert pull(method, lambda: loss(method, 2000)) == pytest.approx((0.0, 0.0), abs=1e-15)


CRITIC_OF = {
    "critic": lambda x_u, sigma: x_u / (1 + sigma**2),
    "winner": lambda x_u, sigma: order(x_u, sigma, 0.0, 1),
    "loser": lambda x_u, sigma: order(x_u, sigma, 0.0, -1),
}


@pytest.mark.parametrize("role", CRITIC_OF)
def test_a_critic_has_no_gradient_at_the_exact_denoiser_of_its_own_samples(role):
    method = exact(form="paper" if role == "loser" else "derived")
    formula = lambda x_u, u, **_: CRITIC_OF[role](x_u, NOISY.sigma(u)[:, None])
    critic = students.student(formula, NOISY, flow_map=False, guided=False)
    method._modules[role] = critic
    torch.manual_seed(0)
    shared = method.draw(None, torch.randn(40_000, 1, dtype=D), {})
    for off, slope in ((0.0, 0.0), (0.1, 0.2)):  # of |F + off - x|^2
        critic.net.off.data.fill_(off)
        (found,) = torch.autograd.grad(dict(method.turns(0))[role](*shared), critic.net.off)
        assert found.item() == pytest.approx(slope, abs=0.02)


def small(**options):
    roles = {}
    critics = ("winner", "loser") if options.get("form") == "paper" else ("winner", "critic")
    for role in ("teacher", "student", *critics):
        roles[role] = Denoiser(MLP(2, 16, 2, classes=3), RectifiedFlow()).double()
        torch.nn.init.normal_(roles[role].net.leave.weight)
    return DistillationDPO(roles, **({"metric": Near([1.0, 0.0])} | options)).double()


def labels(n):
    return {"label": torch.arange(n) % 3}


@pytest.mark.parametrize("form", ["derived", "paper"])
@pytest.mark.parametrize("normalise", ["real", "none"])
def test_the_gradient_in_a_sample_is_the_formula(form, normalise):
    method = small(form=form, normalise=normalise, **({"prefer": 0.7} if form == "derived" else {}))
    shared = method.draw(torch.randn(8, 2, dtype=D), torch.randn(8, 2, dtype=D), labels(8))
    x = shared.x.clone().requires_grad_(True)
    torch.manual_seed(1)
    dict(method.turns(0))["student"](*shared._replace(sample=lambda: x)).backward()
    torch.manual_seed(1)
    n = 16 if form == "derived" else 8
    u, noise = method.density(n, dtype=D), torch.randn(n, 2, dtype=D)
    if form == "paper":  # one u and noise for both of a pair
        u, noise = u.repeat(2), noise.repeat(2, 1)
    with torch.no_grad():
        x_u, cond = method.schedule.add_noise(x, u, noise), labels(8) | {}
        cond = {"label": cond["label"].repeat(2)}
        real = method.teacher(x_u, u, **cond)
        if form == "derived":
            every = method.critic(x_u, u, **cond)
            step = (every - real) - 0.7 * (method.winner(x_u, u, **cond) - every)
        else:
            wins = torch.cat([shared.a_wins, ~shared.a_wins])[:, None]
            step = torch.where(wins, method.winner(x_u, u, **cond) - real, real - method.loser(x_u, u, **cond))
        if normalise == "real":
            step = step / (x - real).abs().mean(1, keepdim=True)
    assert torch.allclose(x.grad, step / (n * 2), atol=1e-14) and x.grad.norm() > 0


OPTIONS = [{}, {"prefer": 0.5, "grid": 3}, {"form": "paper"}, {"form": "paper", "grid": 3, "spread": 1.1}]


@pytest.mark.parametrize("options", OPTIONS)
def test_each_turn_reaches_its_own_role_alone(options):
    method = small(**options)
    shared = method.draw(torch.randn(8, 2, dtype=D), torch.randn(8, 2, dtype=D), labels(8))
    assert [role for role, _ in method.turns(0)] == list(method.trainable)
    for role, call in method.turns(0):
        in_turn(method, role)
        call(*shared).backward()
        assert touched(method) == {role}


def test_pairs_share_their_condition_and_their_step_and_are_ranked():
    closeness = lambda x, data, **_: -(x - data).norm(dim=1)
    method = small(grid=3, metric=closeness)
    data, z = torch.randn(64, 2, dtype=D), torch.randn(64, 2, dtype=D)
    seen = {}
    inner = method.student.forward
    method.student.forward = lambda x, t, **cond: (seen.update(cond, t=t), inner(x, t, **cond))[1]
    pairs = method.draw(data, z, labels(64))
    a, b = pairs.x.chunk(2)
    assert torch.equal(pairs.a_wins, closeness(a, data) >= closeness(b, data)) and 0 < pairs.a_wins.sum() < 64
    assert torch.equal(seen["label"], labels(64)["label"].repeat(2)) and len(seen["t"].unique()) == 1
    assert torch.equal(pairs.sample(), pairs.x)
    assert method.logs["student/score"] == pytest.approx(closeness(pairs.x, data.repeat(2, 1)).mean().item())


def test_a_flow_map_critic_is_conditioned_on_the_students_timestep():
    seen, formula = [], lambda x, t, label=None, s=None: (seen.append(s), x)[1]
    method = small(grid=4)
    method._modules["critic"] = students.student(formula, shape=(2,), guided=False)
    pairs = method.draw(None, torch.randn(4, 2, dtype=D), labels(4))
    for _, turn in method.turns(0):
        turn(*pairs)
    assert len(seen) == 2 and all(torch.equal(s, pairs.t) for s in seen)


def test_rewards_by_hand():
    x = torch.tensor([[0.0, 0.12], [3.0, 4.0]])
    assert Near([0.0, 0.0])(x).tolist() == pytest.approx([-0.15, -5.0])
    assert Near([0.0, 0.0], grain=0)(x).tolist() == pytest.approx([-0.12, -5.0])


def test_options_of_the_other_form_and_old_ones_are_refused():
    for options, message in (
        ({"form": "papers"}, "Did you mean 'paper'"),
        ({"form": "paper", "prefer": 0.1}, "prefer is an option of form: derived"),
        ({"spread": 1.1}, "spread is an option of form: paper"),
    ):
        with pytest.raises(BadInput, match=message):
            small(**options)
    node = {"_target_": "distill.methods.DistillationDPO", "metric": None, "loser": 1.0}
    with pytest.raises(BadInput, match="'method.loser' of .* is now form"):
        config.build(node, where="method", roles={})


@pytest.mark.slow
def test_on_the_toy_preference_raises_the_share_of_the_preferred_mode_and_without_it_the_law_is_the_teachers(tmp_path):
    from distill.inspect.measure import toy_scores
    from distill.training.run import train

    share, energy = {}, {}
    for prefer in (0.0, 0.6):
        overrides = ["log.wandb=disabled", "train.threads=1", "train.steps=1200", f"method.prefer={prefer}"]
        experiment = train(config.load(["toy/dpo"], overrides), tmp_path / str(prefer))
        x = experiment.method.sample(*experiment.noise(8000, 1), generator=torch.Generator().manual_seed(0))
        share[prefer] = (torch.atan2(x[:, 1], x[:, 0]).abs() < math.pi / 6).double().mean().item()
        energy[prefer] = toy_scores(experiment)["energy"]
    assert share[0.0] == pytest.approx(1 / 6, abs=0.03) and energy[0.0] < 0.01
    assert share[0.6] > share[0.0] + 0.04

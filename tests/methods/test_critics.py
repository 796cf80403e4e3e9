"""Critics: their gradient vanishes at the exact E[x | x_u] of the student's law, in any chart, and nowhere else.

The student's samples are m + g z, and the signs of `points` stand for z and the noise. Second moments are then exact, so an exact
affine critic has exactly no gradient in its offset and in its slope.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from affine import Affine, of_gaussian
from points import D, at, columns, critic_of, drawn
from torch import nn

from distill.denoise import Denoiser, Gaussian
from distill.losses.matching import matching
from distill.methods import DMD2, TDM, DistillationDPO, SiD
from distill.noise import VE, RectifiedFlow, VPLinear

MEAN, STD = 0.4, 0.7
TEACHER = (-0.3, 1.2)


def student_of(schedule) -> Affine:
    """From noise at t = 1 its law is N(MEAN, STD^2)."""
    return Affine(MEAN, STD / schedule.noise_scale, schedule=schedule)


def slopes(method, role, draws=6, off=0.0) -> list[torch.Tensor]:
    """d loss / d(off, gain) of a critic's turn, on signs instead of random numbers."""
    z, *rest = columns(draws)
    if isinstance(method, DistillationDPO) and role == "critic":  # one noise for both samples of a pair
        rest = [rest[0], torch.cat(rest[1:3])]
    method._only(role)
    network = getattr(method, role).net
    with torch.no_grad():
        network.off.fill_(off)
    with drawn(*rest):
        shared = method.draw(torch.zeros_like(z), z, {})
        loss = dict(method.turns(0))[role](*shared)
    return torch.autograd.grad(loss, [network.off, network.gain])


def dmd2(teacher, critic, u, schedule):
    return DMD2({"teacher": teacher, "student": student_of(schedule), "critic": critic}, grid=1, density=at(u))


def sid(teacher, critic, u, schedule):
    return SiD({"teacher": teacher, "student": student_of(schedule), "critic": critic}, density=at(u))


def dpo(teacher, critic, u, schedule, form="derived", others=("critic", "winner")):
    """A reward that likes all samples alike, so that winners and losers have the student's law too."""
    roles = {"teacher": teacher, "student": student_of(schedule)} | {role: copy.deepcopy(critic) for role in others}
    return DistillationDPO(roles, metric=lambda x, **_: torch.zeros(len(x)), form=form, density=at(u))


def dpo_paper(*args):
    return dpo(*args, form="paper", others=("winner", "loser"))


@pytest.mark.parametrize("prediction", ["eps", "x", "v", "flow", "edm"])
@pytest.mark.parametrize("schedule", [RectifiedFlow(), VPLinear(), VE()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("make", [dmd2, sid, dpo, dpo_paper])
def test_an_exact_critic_has_no_gradient_and_a_shifted_one_is_sent_back(make, schedule, prediction):
    if prediction == "eps" and schedule.zero_terminal_snr:
        pytest.skip("eps does not determine x there")
    for log_snr in (3.0, 0.0, -2.0):
        u = schedule.time(torch.tensor([log_snr], dtype=D)).item()
        exact, teacher = of_gaussian(MEAN, STD, schedule=schedule), of_gaussian(*TEACHER, schedule=schedule)
        method = make(teacher, critic_of(exact, prediction), u, schedule)
        for role in method.trainable:
            if role != "student":
                assert max(abs(float(slope)) for slope in slopes(method, role)) < 1e-12
                for off in (0.1, -0.1):
                    assert slopes(method, role, off=off)[0] * off > 0


LAST, FIRST = [["critics"], ["critics"], ["critics", "student"]], [["critics", "student"], ["critics"], ["critics"]]


@pytest.mark.parametrize(("make", "expected"), [(DMD2, LAST), (SiD, LAST), (DistillationDPO, LAST), (TDM, FIRST)])
def test_critics_have_every_turn_and_the_student_one_of_three(make, expected):
    roles = {
        role: of_gaussian(MEAN, STD)
        for role in ("teacher", "critic", "winner")
        if role in make.trainable + ("teacher",)
    }
    options = {"metric": lambda x, **_: x.sum(1)} if make is DistillationDPO else {}
    method = make(roles | {"student": student_of(RectifiedFlow())}, student_every=3, **options)
    critics = [role for role in method.trainable if role != "student"]
    for step in range(6):
        turns = [role for role, _ in method.turns(step)]
        named = {"critics": critics, "student": ["student"]}
        assert turns == [role for name in expected[step % 3] for role in named[name]]


# -- TDM: the critic of a segment ------------------------------------------------------------------------------------


class OfSegment(Denoiser):
    """E[x | x_u] where x = G(x_t), x_s = ddim(x, x_t), x_u ~ q(x_u | x_s), all affine in the signs."""

    def __init__(self, schedule, t, s):
        super().__init__(None, schedule, "x")
        self.times = [torch.tensor([a], dtype=D) for a in (t, s)]

    def native(self, x_u, u, **cond):
        t, s = (a.expand(len(u)) for a in self.times)
        ratio, beta = self.schedule.transition_coefs(s, u)
        keep = self.schedule.sigma(s) / self.schedule.sigma(t)
        of_x = self.schedule.alpha(s) - keep * self.schedule.alpha(t)
        z = keep * self.schedule.noise_scale + of_x * STD  # x_s = of_x MEAN + z * sign, x = MEAN + STD * sign
        mean, var, cov = ratio * of_x * MEAN, (ratio * z) ** 2 + beta**2, ratio * z * STD
        return MEAN + (cov / var)[:, None] * (x_u - mean[:, None])


def tdm(u, prediction, schedule, **options):
    """Segment 2 of 2 at one u; the student's law there is the one of its first step."""
    critic = critic_of(OfSegment(schedule, 1.0, 0.5), prediction)
    roles = {"teacher": of_gaussian(*TEACHER, schedule=schedule), "student": student_of(schedule), "critic": critic}
    method = TDM(roles, grid=2, margin=0.0, **options)
    method.grid.__dict__["draw"] = lambda n, generator=None, device=None: torch.full((n,), 2)
    share = torch.tensor((u - 0.5) / 0.5, dtype=D)
    inner = method.segment

    def segment(*args):
        with drawn(share, names=("rand_like",)):
            return inner(*args)

    method.segment = segment
    return method


@pytest.mark.parametrize("prediction", ["eps", "x", "v", "flow", "edm"])
@pytest.mark.parametrize("schedule", [RectifiedFlow(), VPLinear(), VE(20.0, 1.0)], ids=lambda s: type(s).__name__)
def test_tdm_regresses_on_the_clean_sample_of_its_segment(schedule, prediction):
    """Not on x_s, and at u: without the importance weight the exact critic of the segment has exactly no gradient."""
    if prediction == "eps" and schedule.zero_terminal_snr:
        pytest.skip("eps does not determine x there")
    for u in (0.55, 0.75, 0.95):
        method = tdm(u, prediction, schedule, weigh=False)
        assert max(abs(float(slope)) for slope in slopes(method, "critic")) < 1e-12
        for off in (0.1, -0.1):
            assert slopes(method, "critic", off=off)[0] * off > 0


def test_tdms_weight_is_the_clipped_snr_times_the_importance():
    """For a critic that predicts eps, whose error in x is sigma / alpha times its own; each sample by hand."""
    schedule = VPLinear()
    for u in (0.02, 0.1, 0.2, 0.4, 0.7):
        roles = {"teacher": of_gaussian(*TEACHER, schedule=schedule), "student": student_of(schedule)}
        roles["critic"] = critic_of(of_gaussian(MEAN, STD, schedule=schedule), "eps")
        for weigh in (True, False):
            method = TDM(roles, grid=1, margin=0.0, weigh=weigh)
            z, noise = columns(2)
            method._only("critic")
            with torch.no_grad():
                method.critic.net.off.fill_(0.3)
            with drawn(noise), drawn(torch.tensor(u, dtype=D), names=("rand_like",)):
                loss = method.critic_loss(*method.draw(torch.zeros_like(z), z, {}))
            (slope,) = torch.autograd.grad(loss, method.critic.net.off)
            alpha, sigma = (float(a(torch.tensor(u, dtype=D))) for a in (schedule.alpha, schedule.sigma))
            x = MEAN + STD * z
            x_u = alpha * x + sigma * noise
            error = method.critic(x_u, torch.full((4,), u, dtype=D)).detach() - x
            weight = min(alpha**2 / sigma**2, 5.0)  # eps of x_u is the noise itself where s = 0, so the importance is 1
            expected = (2 * weight * error * -sigma / alpha).mean()
            assert slope.item() == pytest.approx(expected.item(), rel=1e-9)


def test_tdms_importance_weight_reaches_its_critic():
    """Where s > 0 the noise of x_u is part of the student's: each sample weighs exp((noise^2 - eps^2) / 2)."""
    u, schedule = 0.75, RectifiedFlow()
    found = {
        weigh: slopes(tdm(u, "x", schedule, weigh=weigh), "critic", draws=2, off=0.3)[0] for weigh in (True, False)
    }
    sign, noise = columns(2)
    ratio, beta = (a.item() for a in schedule.transition_coefs(*(torch.tensor([a], dtype=D) for a in (0.5, u))))
    x = MEAN + STD * sign
    x_u = ratio * (0.5 * x + 0.5 * sign) + beta * noise
    eps = (x_u - 0.25 * x) / u
    weight = torch.exp((noise**2 - eps**2) / 2) * min((0.25 / u) ** 2, 5.0)
    exact = OfSegment(schedule, 1.0, 0.5)(x_u, torch.full((4,), u, dtype=D))
    assert found[True].item() == pytest.approx((2 * weight * (exact + 0.3 - x)).mean().item(), rel=1e-9)
    assert found[True] != found[False]


# -- the student's gradient at given critics, sample by sample --------------------------------------------------------


class Constant(Denoiser):
    """The same x for every input, which tells apart who was asked at what."""

    def __init__(self, value, schedule=None):
        super().__init__(None, schedule or RectifiedFlow(), "x")
        self.value, self.seen = value, []

    def native(self, x_t, t, **cond):
        self.seen.append((x_t.detach(), t))
        return torch.full_like(x_t, self.value)


@pytest.mark.parametrize("name", ["reverse_kl", "kl", "neyman", "js"])
def test_each_sample_is_weighed_by_the_heads_density_ratio(name):
    """r = exp(logit) is p_teacher / p_student, since the head calls data real: h(r), not h(1 / r)."""
    z, noise = columns(2)
    logits = torch.tensor([0.7, -0.4, 1.1, 0.2], dtype=D)
    h = {"reverse_kl": lambda r: r**0, "kl": lambda r: r, "neyman": lambda r: 1 / r, "js": lambda r: r / (1 + r)}[name]
    student = student_of(RectifiedFlow())
    student.m = nn.Parameter(torch.full((4, 1), MEAN, dtype=D))  # one a sample, so that each has a gradient of its own
    roles = {"teacher": Constant(2.0), "student": student, "critic": Constant(3.0)}
    roles |= {} if name == "reverse_kl" else {"head": nn.Linear(1, 1)}
    method = DMD2(roles, grid=1, divergence=name, density=at(0.5), layers="none")
    method.logit = lambda x_u, u, cond, step=None: torch.stack([logits + 0.1, logits - 0.1], 1)  # patches are averaged
    with drawn(noise):
        loss = method.student_loss(*method.draw(torch.zeros_like(z), z, {}))
    (slope,) = torch.autograd.grad(loss, student.m)
    expected = h(logits.exp()) * (3.0 - 2.0) / (MEAN + STD * z[:, 0] - 2.0).abs()
    torch.testing.assert_close(slope[:, 0] / slope.sum(), expected / expected.sum())
    assert slope.sum() > 0, "towards the teacher, away from the critic"


@pytest.mark.parametrize("make", [dmd2, sid])
def test_teacher_and_critic_are_evaluated_at_one_point_and_time(make):
    z, noise = columns(2)
    teacher, critic = Constant(2.0), Constant(3.0)
    method = make(teacher, critic, 0.3, RectifiedFlow())
    with drawn(z, noise) if make is sid else drawn(noise):
        shared = method.draw(torch.zeros_like(z), z, {})
        method.student_loss(*shared)
    (x_u, u), (x_c, u_c) = teacher.seen[-1], critic.seen[-1]
    assert torch.equal(x_u, x_c) and torch.equal(u, u_c) and (u == 0.3).all()
    torch.testing.assert_close(x_u, 0.7 * (MEAN + STD * z) + 0.3 * noise)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VE(10.0, 1.0)], ids=lambda s: type(s).__name__)
def test_matching_with_the_kl_weight_is_the_gradient_of_the_kl(schedule):
    """d KL(p_G | p_D) / d(m, g) at noise level u of Gaussians, with weight (alpha / sigma)^2 and no normaliser."""
    u = 0.3
    t = torch.tensor([u], dtype=D)
    alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
    m, g = (torch.tensor(a, dtype=D, requires_grad=True) for a in (MEAN, STD))
    z, noise = columns(2)
    x = m + g * z
    x_u = (alpha * x + sigma * noise).detach()
    critic, teacher = of_gaussian(MEAN, STD, schedule=schedule), of_gaussian(*TEACHER, schedule=schedule)
    fake, real = (d(x_u, t.expand(4)) for d in (critic, teacher))
    weight = torch.full((4,), alpha**2 / sigma**2, dtype=D)
    found = torch.autograd.grad(matching(x, fake, real, weight=weight, normalise="none"), (m, g))
    a, b = (torch.tensor(v, dtype=D, requires_grad=True) for v in (MEAN, STD))
    var, var_d = (alpha * b) ** 2 + sigma**2, (alpha * TEACHER[1]) ** 2 + sigma**2
    kl = 0.5 * (var / var_d + (alpha * (a - TEACHER[0])) ** 2 / var_d - 1 + math.log(var_d) - var.log())
    for one, other in zip(found, torch.autograd.grad(kl, (a, b))):
        assert one.item() == pytest.approx(other.item(), rel=1e-9)


def test_gaussians_are_what_the_tests_say():
    """The exact critic used above, by Bayes' rule."""
    u, x_u = torch.tensor([0.4], dtype=D), torch.tensor([[0.9]], dtype=D)
    alpha, sigma = 0.6, 0.4
    by_hand = (MEAN / STD**2 + alpha * 0.9 / sigma**2) / (1 / STD**2 + alpha**2 / sigma**2)
    assert Gaussian([MEAN], STD, RectifiedFlow())(x_u, u).item() == pytest.approx(by_hand, rel=1e-12)

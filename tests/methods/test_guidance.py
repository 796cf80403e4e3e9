"""Guidance distillation: the optimum is the guided denoiser, and it starts where the teacher is."""

import pytest
import torch
from exact import Pair, drawn, student

from distill.denoise import Denoiser, Gaussian, Guided
from distill.errors import BadInput
from distill.methods import Guidance
from distill.models.small import MLP
from distill.noise import RectifiedFlow, Table, VPCosine
from distill.solvers import DDIM, Overshoot, solve

U, C, STD = -0.4, 0.7, 0.5
SCHEDULES = {"flow": RectifiedFlow(), "cosine": VPCosine(), "table": Table([0.9, 0.6, 0.3, 0.05])}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def extrapolated(schedule):
    """The exact denoiser of N(U + w (C - U), STD^2) as a formula of (x, t, w)."""

    def formula(x, t, w, label=None):
        mean = (U + w * (C - U))[:, None]
        a, s = schedule.at(t, x)
        return mean + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * mean)

    return formula


def method(schedule, **kw):
    teacher = Pair([[U], [C]], STD, schedule=schedule)
    return Guidance({"teacher": teacher, "student": student(extrapolated(schedule), schedule)}, **kw)


@every
@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_extrapolates_the_mean(schedule, seed):
    """x off by delta: the gradient is 2 E[max(SNR, 1)] delta, SNR up to e^20; at the optimum, rounding of that."""
    m, batch = method(schedule, guidance_range=[0.0, 5.0]), drawn(labels=1)

    def at(delta):
        torch.manual_seed(seed)
        with torch.no_grad():
            m.student.net.off.fill_(delta)
        loss = m.loss(*batch)
        return loss.item(), torch.autograd.grad(loss, m.student.net.off)[0].item()

    torch.manual_seed(seed)
    t = m.density(len(batch[0]), dtype=torch.float64)
    scale = schedule.log_snr(t).clamp(-20, 20).exp().clamp(min=1).mean().item()
    assert at(0.0)[0] < 1e-24 * scale and abs(at(0.0)[1]) < 1e-12 * scale
    for delta in (0.1, -0.1):
        assert at(delta) == pytest.approx((scale * delta**2, 2 * scale * delta), rel=1e-9)


def test_w_is_1_for_the_conditional_and_0_for_the_unconditional_model():
    m, (x, _, cond) = method(RectifiedFlow()), drawn(labels=1)
    t = torch.rand(len(x), dtype=torch.float64)
    for w, mean in ((0.0, U), (1.0, C), (3.0, U + 3 * (C - U))):
        strength = torch.full_like(t, w)
        exact = Gaussian([mean], STD, RectifiedFlow())(x, t)
        torch.testing.assert_close(m.guided(x, t, w=strength, **cond), exact, atol=1e-12, rtol=0)
        torch.testing.assert_close(m.student(x, t, w=strength, **cond), exact, atol=1e-12, rtol=0)


@every
def test_a_student_with_the_teachers_weights_starts_as_the_teacher(schedule):
    plain, guided = MLP(dim=2, width=16, classes=3), MLP(dim=2, width=16, classes=3, guided=True)
    missing = guided.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    teacher, own = Denoiser(plain, schedule, "v"), Denoiser(guided, schedule, "v")
    m = Guidance({"teacher": teacher, "student": own})
    x, t, w = torch.randn(8, 2), torch.rand(8), 5 * torch.rand(8)
    label = torch.arange(8) % 3
    assert torch.equal(m.student(x, t, w=w, label=label), teacher(x, t, label=label))
    m.loss(x, torch.randn(8, 2), {"label": label}).backward()
    assert guided.condition.guidance.outer.weight.grad.abs().sum() > 0, "w could never gain influence"


def test_gradient_reaches_the_student_only():
    schedule = RectifiedFlow()
    teacher = Denoiser(MLP(dim=2, width=8, classes=2), schedule)
    m = Guidance({"teacher": teacher, "student": Denoiser(MLP(dim=2, width=8, classes=2, guided=True), schedule)})
    for p in teacher.parameters():
        p.requires_grad_(True)
    m.loss(torch.randn(8, 2), torch.randn(8, 2), {"label": torch.ones(8).long()}).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad.abs().sum() > 0 for p in m.student.parameters())


def test_a_distilled_network_is_evaluated_once_with_w():
    net = MLP(dim=2, width=8, classes=2, guided=True)
    torch.nn.init.normal_(net.condition.guidance.outer.weight)
    model = Denoiser(net, RectifiedFlow())
    x, t, label = torch.randn(4, 2), torch.rand(4), torch.zeros(4).long()
    for w in (torch.tensor([1.0, 2, 3, 4]), 2.5, 1.0):
        assert torch.equal(Guided(model)(x, t, w=w, label=label), model(x, t, w=w, label=label))


def test_samples_follow_the_guided_teacher_at_half_its_evaluations():
    m = method(RectifiedFlow(), grid=8, guidance=2.5)
    _, z, cond = drawn(labels=1)
    exact = solve(Guided(m.teacher, 2.5), z, m.grid.times, DDIM(), **cond)
    torch.testing.assert_close(m.sample(z, cond), exact, atol=1e-6, rtol=0)  # w is held in float32
    assert isinstance(method(RectifiedFlow(), sampler="overshoot").sampler, Overshoot)


def test_a_network_without_w_or_an_empty_range_is_refused():
    teacher, plain = Pair([[U], [C]], STD, schedule=RectifiedFlow()), Denoiser(MLP(dim=1, width=8), RectifiedFlow())
    with pytest.raises(BadInput, match="guided: true"):
        Guidance({"teacher": teacher, "student": plain})
    with pytest.raises(BadInput, match="empty"):
        method(RectifiedFlow(), guidance_range=[3.0, 1.0])


def test_the_stochastic_sampler_keeps_the_guided_law_and_draws_its_own_noise():
    """The guided student is exact: at w = 3 the samples have the mean U + 3 (C - U), whatever the generator draws."""
    m = method(RectifiedFlow(), grid=64, guidance=3.0, sampler="overshoot")
    z = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = (
        m.sample(z, {"label": torch.ones(20_000).long()}, generator=torch.Generator().manual_seed(k)) for k in (1, 2)
    )
    for x in (a, b):
        assert x.mean().item() == pytest.approx(U + 3 * (C - U), abs=0.02)
        assert x.std().item() == pytest.approx(STD, rel=0.1), "denoisers in place of exact jumps: 0.471 at 64 steps"
    assert (a - b).std() > 0.3 * STD and m.serving == "overshoot"
    assert torch.equal(method(RectifiedFlow(), grid=4).sample(z, {}), method(RectifiedFlow(), grid=4).sample(z, {}))

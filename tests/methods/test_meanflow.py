"""MeanFlow: the exact flow map is the optimum, from a teacher exactly and from data in expectation."""

import pytest
import torch
from exact import Pair, drawn, gradient, student, wiggly

from distill.denoise import Denoiser, Gaussian
from distill.errors import BadInput
from distill.methods import MeanFlow
from distill.models.small import MLP, Transformer
from distill.noise import RectifiedFlow, Table, TrigFlow, VPCosine, VPLinear
from distill.solvers import DDIM
from distill.solvers.flowmap import predicted_flow
from distill.tangent import jvp

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


def exact_map(schedule, mean=lambda label: 0.0):
    """The average velocity of N(mean(label), STD^2) as a formula of (x_t, t, s, label)."""

    def formula(x_t, t, s, label=None):
        m, gap = mean(label), t - s
        same = gap < 1e-9
        s = torch.where(same, 0.0, s)  # unused there
        (a, b), (a_s, b_s) = schedule.at(t, x_t), schedule.at(s, x_t)
        v, v_s = ((a * STD) ** 2 + b**2).sqrt(), ((a_s * STD) ** 2 + b_s**2).sqrt()
        x_s = a_s * m + v_s / v * (x_t - a * m)
        now = m + a * STD**2 / v**2 * (x_t - a * m)
        x = torch.where(same[:, None], now, DDIM().invert(schedule, x_s, x_t, t, s))
        return (x_t - a * x) / b - x

    return formula


def method(schedule=None, teacher=None, net=None, **kw):
    schedule = schedule or RectifiedFlow()
    net = net or student(exact_map(schedule), schedule, "flow", guided=False)
    return MeanFlow({"student": net} | ({"teacher": teacher} if teacher else {}), **kw)


def between(m):
    """The method with times that keep off the ends, where the formula divides by their distance."""

    def times(x):
        t = 0.25 + 0.7 * torch.rand(len(x), dtype=torch.float64)
        return t, torch.where(torch.arange(len(x)) < len(x) // 4, t, 0.2 * torch.rand(len(x), dtype=torch.float64))

    m.times = times
    return m


@every
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_exact_map_is_the_optimum_of_distillation(schedule, power):
    m = between(method(schedule, Gaussian([0.0], STD, schedule), power=power))
    assert m.loss(*drawn()) < 1e-20
    assert gradient(m, m.loss, *drawn()).abs() < 1e-8
    for delta in (0.1, -0.1):
        with torch.no_grad():
            m.student.net.off.fill_(delta)
        assert gradient(m, m.loss, *drawn()).sign() == torch.tensor(delta).sign()


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_exact_map_is_the_optimum_from_data_in_expectation(power):
    m = between(method(power=power))

    def gradients():
        torch.manual_seed(0)
        batches = (drawn(2000, seed=seed) for seed in range(12))
        return torch.stack([gradient(m, m.loss, STD * x, z, cond) for x, z, cond in batches])

    values = gradients()
    error = values.std() / len(values) ** 0.5
    assert values.mean().abs() < 3 * error
    with torch.no_grad():
        m.student.net.off.fill_(0.1)
    assert (gradients() - values).mean() > 3 * error, "not pulled back"


@pytest.mark.parametrize("kappa", [0.0, 0.6])
def test_guidance_in_the_target_extrapolates_the_mean(kappa):
    schedule, w = RectifiedFlow(), 2.5
    guided = lambda label: U + w * (C - U) * (label >= 0).double()[:, None]
    net = student(exact_map(schedule, guided), schedule, "flow", guided=False)
    m = method(net=net, guidance=w, kappa=kappa)
    x, _, cond = drawn(labels=1)
    t = torch.linspace(0.1, 1, len(x), dtype=torch.float64)
    v = predicted_flow(Gaussian([C], STD, schedule), x, t)
    expected = predicted_flow(Gaussian([U + w * (C - U)], STD, schedule), x, t)
    none = torch.zeros(len(x), dtype=torch.bool)
    torch.testing.assert_close(m.velocity(v, x, t, cond, none), expected, atol=1e-12, rtol=0)
    assert torch.equal(m.velocity(v, x, t, cond, ~none), v)
    m.guide_until = 0.5
    assert torch.equal(m.velocity(v, x, t, cond, none)[t > 0.5], v[t > 0.5])


def test_the_teachers_guidance_extrapolates_the_mean():
    schedule, w = RectifiedFlow(), 2.5
    net = student(exact_map(schedule, lambda label: U + w * (C - U)), schedule, "flow", guided=False)
    m = between(method(schedule, Pair([[U], [C]], STD, schedule=schedule), net, guidance=w))
    assert m.loss(*drawn(labels=1)) < 1e-20


def test_without_guidance_the_target_is_the_pairs_velocity_and_dropped_samples_come_first():
    net = Denoiser(MLP(dim=1, width=8, classes=2, flow_map=True), RectifiedFlow())
    m, (x, z, cond) = method(drop_label=0.5, net=net), drawn(labels=1)
    assert torch.equal(m.velocity(z - x, x, None, cond, None), z - x)
    seen = []
    m.student.net.register_forward_hook(lambda net, args, kw, out: seen.append(kw["label"]), with_kwargs=True)
    m.loss(x.float(), z.float(), cond)
    dropped = seen[0] < 0
    assert 60 < dropped.sum() < 190 and not dropped[dropped.sum() :].any() and (seen[0][~dropped] == 1).all()


def test_no_label_is_dropped_at_a_chance_of_almost_nothing_or_with_a_teacher():
    net = Denoiser(MLP(dim=1, width=8, classes=2, flow_map=True), RectifiedFlow())
    (x, z, cond), seen = drawn(labels=1), []
    net.net.register_forward_hook(lambda net, args, kw, out: seen.append(kw["label"]), with_kwargs=True)
    method(net=net, drop_label=1e-12).loss(x.float(), z.float(), cond)
    assert all((label == 1).all() for label in seen)
    assert method(teacher=Gaussian([0.0], STD, RectifiedFlow()), drop_label=0.5).drop_label == 0


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_at_equal_times_the_loss_is_the_distance_to_the_pairs_velocity_by_hand(power):
    """From data in three dimensions and a network that answers 0: |z - x|^2 / (|z - x|^2 + c)^p."""
    net = student(lambda x, t, s: 0 * x, RectifiedFlow(), "flow", shape=(3,), guided=False)
    x, z, _ = drawn(64, dim=3)
    square = (z - x - 1).square().sum(1)
    expected = (square / (square + 0.2) ** power).mean()
    found = method(net=net, same=1.0, power=power, c=0.2).loss(x + 1, z, {})
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_first_share_of_the_batch_has_equal_times():
    m = method(same=0.75)
    t, s = m.times(torch.zeros(100, 1))
    assert torch.equal(t[:75], s[:75]) and (t[75:] > s[75:]).all() and t.dtype == torch.float32


@every
@pytest.mark.parametrize("prediction", ["flow", "v", "x"])
def test_a_student_with_the_teachers_weights_starts_as_the_teacher(schedule, prediction):
    plain, mapped = MLP(dim=2, width=16), MLP(dim=2, width=16, flow_map=True)
    mapped.load_state_dict(plain.state_dict(), strict=False)
    teacher = Denoiser(plain, schedule, prediction)
    m = method(schedule, teacher, Denoiser(mapped, schedule, prediction))
    x, t = torch.randn(8, 2), torch.rand(8)
    for s in (t, t / 2, torch.zeros(8)):
        assert torch.equal(m.student(x, t, s=s), teacher(x, t))
    m.loss(x, torch.randn(8, 2), {}).backward()
    assert mapped.condition.gap.outer.weight.grad.abs().sum() > 0, "s could never gain influence"
    assert all(p.grad is None for p in plain.parameters())


@pytest.mark.parametrize(
    "net, shape",
    [
        (MLP(dim=2, width=16, flow_map=True), (2,)),
        (Transformer(size=4, width=16, depth=1, heads=2, flow_map=True), (1, 4, 4)),
    ],
)
def test_both_derivatives_train_alike(net, shape):
    torch.manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn_like(p) * 0.2
    net = net.double()
    x, z = torch.randn(2, 16, *shape, dtype=torch.float64)
    losses = []
    for how in ("forward", "difference"):
        torch.manual_seed(1)
        losses.append(method(net=Denoiser(net, RectifiedFlow()), jvp=how).loss(x, z, {}))
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)


def test_the_target_has_no_gradient_and_sees_the_same_dropout():
    class Noisy(torch.nn.Module):
        flow_map, shape, classes = True, (4,), 0

        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(4))
            self.masks = []

        def forward(self, x, t, s=None):
            mask = torch.rand(x.shape)
            self.masks.append(mask)
            return self.gain * x * mask

    net = Noisy()
    m = method(net=Denoiser(net, RectifiedFlow()))
    m.loss(torch.randn(8, 4), torch.randn(8, 4), {}).backward()
    assert len(net.masks) == 2 and torch.equal(net.masks[0], net.masks[1])


def test_the_target_does_not_follow_the_wiggle_of_integer_timesteps():
    """Residual with a wiggle A sin(1000 t): at most A + (t - s) (2 A / h + O(h)); an exact derivative has 1000 A."""
    schedule, size, h, residual = RectifiedFlow(), 1e-3, 0.02, {}
    teacher = Gaussian([0.0], STD, schedule)
    for how in (None, "forward"):
        formula = wiggly(exact_map(schedule), size)
        net = student(formula, schedule, "flow", guided=False, timesteps=1000)
        m = between(method(schedule, teacher, net, power=0.0, jvp=how))
        residual[how] = m.loss(*drawn()).sqrt()
    assert residual[None] < size + 2 * size / h and residual["forward"] > 0.3
    smooth = student(exact_map(schedule), schedule, "flow", guided=False, timesteps=1000)
    assert between(method(schedule, teacher, smooth, power=0.0)).loss(*drawn()).sqrt() < 5e-3, (
        "the quotient's own error"
    )


def test_the_student_is_evaluated_within_its_range_of_times_only():
    """t - h to t + h, cut at s and 1: below s the map does not exist, above 1 the network was not trained."""
    seen, h = [], 0.02

    def spy(x, t, s, **cond):
        seen.append((t, s))
        return x

    net = student(spy, RectifiedFlow(), "flow", guided=False, timesteps=1000)
    m = method(teacher=Gaussian([0.0], STD, RectifiedFlow()), net=net)
    m.times = lambda x: (torch.linspace(0.5, 1, len(x)).double(), torch.linspace(0.5, 0.9, len(x)).double().sub(0.01))
    m.loss(*drawn())
    (t, s), (ahead, s_1), (back, s_2) = seen[0], seen[-2], seen[-1]
    assert torch.equal(s, s_1) and torch.equal(s, s_2), "s is held fixed"
    torch.testing.assert_close(ahead, (t + h).clamp_max(1))
    torch.testing.assert_close(back, torch.maximum(t - h, s))


def test_samples_with_equal_times_are_for_training_from_data():
    """A student with its teacher's weights has no error at s = t, which the adaptive weight would enlarge."""
    teacher = Gaussian([0.0], STD, RectifiedFlow())
    assert method().same == 0.75 and method(teacher=teacher).same == 0.0
    assert method(teacher=teacher, same=0.5).same == 0.5
    t, s = method(teacher=teacher).times(torch.zeros(100, 1))
    assert (t > s).all()


def test_one_roles_config_distills_the_other_trains():
    assert method().frozen == () and method(teacher=Gaussian([0.0], STD, RectifiedFlow())).frozen == ("teacher",)
    with pytest.raises(BadInput, match="flow_map: true"):
        MeanFlow({"student": Denoiser(MLP(dim=2, width=8), RectifiedFlow())})


def test_the_derivative_of_the_formula_is_exact():
    x, t, s = (torch.rand(6, dtype=torch.float64) for _ in range(3))
    x, t, s = x[:, None], 0.6 + 0.4 * t, 0.5 * s
    for schedule in SCHEDULES.values():
        fn = exact_map(schedule)
        tangents = (torch.ones_like(x), torch.ones_like(t), torch.zeros_like(s))
        by_mode = [jvp(fn, (x, t, s), tangents, method=how)[1] for how in ("forward", "difference")]
        torch.testing.assert_close(*by_mode, atol=1e-7, rtol=1e-7)

"""Jacobian-vector products against analytic ones, both methods against each other, and replay of random numbers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.models.diffusers import DiT, load
from distill.models.small import MLP, Transformer
from distill.noise import RectifiedFlow
from distill.solvers.flowmap import predicted_flow
from distill.tangent import JVP_METHODS, Derivative, ReplayRNG, jvp

F64 = torch.float64


@pytest.mark.parametrize("method", JVP_METHODS)
def test_the_derivative_of_a_known_function(method):
    x, t = torch.randn(5, 3, dtype=F64), torch.rand(5, dtype=F64)
    v, r = torch.randn(5, 3, dtype=F64) * 30, torch.randn(5, dtype=F64)
    value, slope = jvp(lambda x, t: x.sin() * t[:, None] ** 2, (x, t), (v, r), method)
    exact = x.cos() * v * t[:, None] ** 2 + 2 * t[:, None] * x.sin() * r[:, None]
    torch.testing.assert_close(value, x.sin() * t[:, None] ** 2)
    torch.testing.assert_close(slope, exact, rtol=1e-8, atol=1e-7)


def test_a_zero_tangent_holds_its_input():
    x, t = torch.randn(4, 2, dtype=F64), torch.rand(4, dtype=F64)
    for method in JVP_METHODS:
        _, slope = jvp(lambda x, t: x * t[:, None], (x, t), (torch.zeros_like(x), torch.ones_like(t)), method)
        torch.testing.assert_close(slope, x, rtol=1e-8, atol=1e-9)
        _, slope = jvp(lambda x, t: x * t[:, None], (x, t), (torch.zeros_like(x), torch.zeros_like(t)), method)
        assert (slope == 0).all()


@pytest.mark.parametrize("dtype, tol", [(F64, 1e-6), (torch.float32, 5e-3)])
@pytest.mark.parametrize("net", [MLP(3, 16, flow_map=True), Transformer(4, width=16, depth=1, flow_map=True)])
def test_forward_equals_difference_on_the_small_networks(net, dtype, tol):
    torch.manual_seed(0)
    net = net.to(dtype)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    x, v = torch.randn(2, 6, *net.shape, dtype=dtype)
    t, s = torch.rand(6, dtype=dtype), torch.rand(6, dtype=dtype)
    tangents = (v, torch.ones_like(t), torch.ones_like(t))
    exact, near = (jvp(lambda x, t, s: net(x, t, s=s), (x, t, s), tangents, m)[1] for m in JVP_METHODS)
    assert (exact - near).abs().max() < tol * exact.abs().max()


@pytest.mark.parametrize("method", JVP_METHODS)
def test_the_value_keeps_its_graph(method):
    net, x, t = MLP(dim=2, width=8), torch.randn(4, 2), torch.rand(4)
    value, slope = jvp(net, (x, t), (x, torch.ones(4)), method)
    value.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with torch.no_grad():
        value, slope = jvp(net, (x, t), (x, torch.ones(4)), method)
    assert not value.requires_grad and not slope.requires_grad and slope.abs().sum() > 0


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_network_without_forward_derivative_is_one_clear_sentence():
    x = torch.randn(3, 2)
    with pytest.raises(BadInput, match="forward-mode derivative.*jvp: difference"):
        jvp(lambda x: Fused.apply(x), (x,), (x,))
    torch.testing.assert_close(jvp(lambda x: Fused.apply(x), (x,), (x,), "difference")[1], x, rtol=1e-3, atol=1e-4)
    with pytest.raises(BadInput, match="Did you mean 'forward'"):
        jvp(lambda x: x, (x,), (x,), "forwards")

    def views(x):
        """Works, but not under torch.func.jvp, for a reason of torch's own: x.view of a strided tensor."""
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            x.T.view(-1)
        return x

    with pytest.raises(BadInput, match="view.*jvp: difference"):
        jvp(views, (x,), (x,))
    with pytest.raises(RuntimeError, match="not mine"):
        jvp(lambda x: (_ for _ in ()).throw(RuntimeError("not mine")), (x,), (x,))


def test_fused_attention_is_written_out():
    q = torch.randn(2, 4, 8, 16)
    attend = lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q)
    _, slope = jvp(attend, (q,), (torch.ones_like(q),))
    assert torch.isfinite(slope).all() and slope.abs().sum() > 0


def test_autocast_is_off_inside():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        value, slope = jvp(layer, (x,), (x,))
    assert value.dtype == slope.dtype == torch.float32


def test_a_difference_drops_the_same_units():
    net, x = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8)).double(), torch.randn(4, 8, dtype=F64)
    torch.manual_seed(3)
    value, slope = jvp(net, (x,), (x,), "difference")
    torch.manual_seed(3)
    torch.testing.assert_close(jvp(net, (x,), (x,), "forward"), (value, slope), rtol=1e-8, atol=1e-8)


def test_replay_repeats_and_restores_the_generator():
    torch.manual_seed(0)
    replay = ReplayRNG()
    first = torch.rand(3)
    with replay:
        again = torch.rand(3)
        torch.rand(100)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(first, again)
    assert torch.equal(torch.rand(6), torch.cat([first, after]))


def path(wiggle=0.0, n=400):
    """x(t) on a circle and a smooth f(x, t) = x t^2 + sin(3 t), plus wiggle sin(1000 t): (fn, inputs, tangents, exact)."""
    t = torch.linspace(0.05, 0.95, n, dtype=F64)
    circle = lambda t: torch.stack([t.cos(), t.sin()], 1)
    along = lambda t: torch.stack([-t.sin(), t.cos()], 1)

    def fn(x, t):
        return x * t[:, None] ** 2 + ((3 * t).sin() + wiggle * (1000 * t).sin())[:, None]

    exact = along(t) * t[:, None] ** 2 + 2 * t[:, None] * circle(t) + 3 * (3 * t).cos()[:, None]
    return fn, (circle(t), t), (along(t), torch.ones_like(t)), exact


def test_a_step_in_time_has_an_error_of_second_order_on_a_smooth_path():
    fn, inputs, tangents, exact = path()
    errors = [(Derivative("difference", h)(fn, inputs, tangents) - exact).abs().max() for h in (0.04, 0.02, 0.01)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02) and errors[1] / errors[2] == pytest.approx(4, rel=0.02)
    assert errors[1] < 3e-3
    assert (Derivative()(fn, inputs, tangents) - exact).abs().max() < 1e-12
    assert (Derivative("difference")(fn, inputs, tangents) - exact).abs().max() < 1e-7


@pytest.mark.parametrize("h", [0.02, 0.04])
def test_a_step_in_time_does_not_follow_the_wiggle_of_a_time_embedding(h):
    """Of A sin(1000 t), with derivative 1000 A, a step h leaves at most A / h, whatever the scale of the tangents."""
    size = 1e-3
    fn, inputs, tangents, exact = path(size)
    smooth = (Derivative("difference", h)(path()[0], inputs, tangents) - exact).abs().max()
    for scale in (1.0, 0.2, 5.0):
        scaled = tuple(scale * v for v in tangents)
        error = (Derivative("difference", h)(fn, inputs, scaled) / scale - exact).abs().max()
        assert size / h / 2 < error <= size / h + smooth
    for followed in (Derivative(), Derivative("difference")):
        assert (followed(fn, inputs, tangents) - exact).abs().max() > 0.95


def test_the_times_stay_in_range_and_a_cut_quotient_is_one_sided():
    fn, (_, t), (_, one), _ = path()
    seen = []

    def spy(x, t):
        seen.append(t)
        return x

    t = torch.tensor([0.5, 0.99, 0.3, 1.0, 0.6], dtype=F64)
    low = torch.tensor([0.0, 0.0, 0.29, 0.0, 0.6], dtype=F64)
    x = 3 * t[:, None]
    slope = Derivative("difference", 0.02)(spy, (x, t), (3 * torch.ones_like(x), torch.ones_like(t)), low)
    torch.testing.assert_close(seen[1], torch.tensor([0.52, 1.0, 0.32, 1.0, 0.62], dtype=F64))
    torch.testing.assert_close(seen[2], torch.tensor([0.48, 0.97, 0.29, 0.98, 0.6], dtype=F64))
    torch.testing.assert_close(slope, 3 * torch.ones_like(x))
    t = torch.ones(2, dtype=F64)  # no room at all
    assert (Derivative("difference", 0.02)(spy, (x[:2], t), (x[:2], t), low=1.0) == 0).all()


def test_the_derivative_of_a_student_is_chosen_by_its_time_embedding():
    stock = Denoiser(DiT(size=4, width=16, depth=1, heads=2), RectifiedFlow(), "v")
    plain = Denoiser(MLP(dim=2, width=8), RectifiedFlow())
    choose = lambda *a: Derivative.choose(*a, smooth=0.02)
    assert choose(None, None, stock) == Derivative("difference", 0.02)
    assert choose(None, None, plain) == Derivative("forward", None)
    assert choose("forward", None, stock) == Derivative("forward", None)
    assert choose("difference", None, plain) == Derivative("difference", None)
    assert choose("difference", 0.1, stock) == Derivative("difference", 0.1)
    with pytest.raises(BadInput, match="method.jvp: 'forwards'.*Did you mean 'forward'"):
        choose("forwards", None, stock)
    with pytest.raises(BadInput, match="method.jvp_step: forward mode takes no step"):
        choose(None, 0.1, plain)
    with pytest.raises(BadInput, match="method.jvp_step: 0.7 must be between"):
        choose("difference", 0.7, plain)
    for dtype in (torch.bfloat16, torch.float16):
        half = Denoiser(MLP(dim=2, width=8).to(dtype), RectifiedFlow())
        with pytest.raises(BadInput, match="16-bit weights.*jvp_step: 0.02 or more.*float32"):
            choose("difference", None, half)
        with pytest.raises(BadInput, match="16-bit weights"):
            choose("difference", 0.01, half)
        assert choose(None, None, half) == Derivative("forward", None)
        assert choose("difference", 0.02, half) == Derivative("difference", 0.02)


def test_a_stock_network_is_differentiated_smoothly_and_alike_in_16_bits():
    """The shipped teacher: its exact derivative is mostly wiggle; a step of 0.02 in bfloat16 points where float32's does."""
    teacher = load(Path(__file__).parents[1] / "checkpoints" / "digits-teacher", math_attention=True).eval()
    half = copy.deepcopy(teacher).to(torch.bfloat16)
    torch.manual_seed(0)
    t, label = torch.linspace(0.1, 1, 32), torch.arange(32) % 10
    x, dx = torch.randn(2, 32, 1, 8, 8)
    rms = lambda v: v.square().mean().sqrt()

    def slope(denoiser, h):
        fn = lambda x, t: predicted_flow(denoiser, x, t, label=label)
        return Derivative("difference" if h else "forward", h)(fn, (x, t), (dx, torch.ones_like(t)), t / 2)

    exact, smooth, smoother = slope(teacher, None), slope(teacher, 0.02), slope(teacher, 0.04)
    assert rms(smooth - smoother) < 0.4 * rms(smooth) and rms(exact - smooth) > rms(smooth)
    assert torch.cosine_similarity(slope(half, 0.02).flatten(), smooth.flatten(), dim=0) > 0.95

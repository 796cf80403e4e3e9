from __future__ import annotations

import copy

import pytest
import torch

from distill.errors import BadInput
from distill.models import MLP, Transformer
from distill.models.small import ScalarEmbedding

NETS = {
    "mlp": lambda **kw: MLP(dim=3, width=16, depth=2, **kw),
    "transformer": lambda **kw: Transformer(size=4, channels=2, patch=2, width=16, depth=2, heads=2, **kw),
}
every_net = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


def shaken(net, seed=0):
    """The net in float64 with every parameter moved, so that no layer hides behind its zero start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return net.double()


def inputs(net, batch=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *net.shape, generator=generator, dtype=torch.float64)
    return x, torch.linspace(0, 1, batch, dtype=torch.float64)


@every_net
def test_shape_and_label_conventions(make):
    net = shaken(make(classes=4))
    x, t = inputs(net)
    none = net(x, t)
    assert none.shape == x.shape and net.classes == 4
    minus = net(x, t, label=torch.full((5,), -1))
    named = net(x, t, label=torch.tensor([-1, 0, 1, 2, 3]))
    assert torch.equal(none, minus)
    assert torch.equal(named[0], none[0])
    assert (named[1:] - none[1:]).flatten(1).norm(dim=1).min() > 1e-3


@every_net
def test_new_inputs_change_nothing_at_step_zero_and_something_later(make):
    teacher = shaken(make(classes=2))
    student = make(classes=2, guided=True, flow_map=True).double()
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and missing and all("guidance" in k or "gap" in k for k in missing)
    assert student.guided and student.flow_map and not teacher.guided
    x, t = inputs(teacher)
    label, w = torch.tensor([0, 1, -1, 0, 1]), torch.linspace(0, 8, 5).double()
    assert torch.equal(student(x, t, label, w=w, s=t / 2), teacher(x, t, label))
    shaken(student, seed=3)
    base = student(x, t, label, w=w, s=t / 2)
    assert (base - student(x, t, label, w=w + 1, s=t / 2)).abs().max() > 1e-4
    assert (base - student(x, t, label, w=w, s=t / 3))[1:].abs().max() > 1e-4
    assert torch.equal(student(x, t, label, w=2.0), student(x, t, label, w=torch.full((5,), 2.0)))


@every_net
def test_zero_layers_receive_a_gradient(make):
    net = make(guided=True, flow_map=True)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "guidance" not in name and "gap" not in name:
                p.add_(0.3 * torch.randn_like(p))
    x, t = inputs(net)
    net(x.float(), t.float(), w=3.0, s=t.float() / 2).square().sum().backward()
    for part in (net.condition.guidance, net.condition.gap):
        assert part.outer.weight.grad.abs().max() > 0


@every_net
def test_jvp_is_the_derivative_in_x_t_and_s(make):
    net = shaken(make(classes=2, flow_map=True))
    x, _ = inputs(net)
    t, s = torch.linspace(0.2, 0.8, 5).double(), torch.linspace(0.1, 0.4, 5).double()
    v = torch.randn_like(x)

    def f(x, t, s):
        return net(x, t, torch.tensor([0, 1, -1, 0, 1]), s=s)

    h = 1e-6
    out, slope = torch.func.jvp(f, (x, t, s), (v, torch.ones_like(t), -torch.ones_like(s)))
    central = (f(x + h * v, t + h, s - h) - f(x - h * v, t - h, s + h)) / (2 * h)
    torch.testing.assert_close(out, f(x, t, s), rtol=1e-12, atol=1e-12)
    assert slope.norm() > 0.1 and (slope - central).norm() < 1e-7 * slope.norm()


@every_net
def test_copies_are_independent_and_state_is_stable(make):
    net = make(classes=2, guided=True)
    other = copy.deepcopy(net)
    assert list(other.state_dict()) == list(net.state_dict())
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(next(other.parameters()), next(net.parameters()))


def test_time_features_have_the_stated_slope():
    """With layers that pass the features on, silu(x + 50) = x + 50, the steepest output has slope 16 pi / period."""
    embed = ScalarEmbedding(11, period=2.0).double()
    with torch.no_grad():
        for layer in (embed.inner, embed.outer):
            layer.weight.copy_(torch.eye(11))
            layer.bias.fill_(50.0)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    slope = torch.func.jvp(embed, (t,), (torch.ones_like(t),))[1].abs().max().item()
    assert slope == pytest.approx(16 * torch.pi / 2.0, rel=1e-2)


def test_transformer_starts_as_the_zero_map_and_sees_all_patches():
    net = Transformer(size=4, channels=1, patch=2, width=16, depth=1, heads=2)
    x = torch.randn(1, 1, 4, 4)
    assert torch.equal(net(x, torch.ones(1)), torch.zeros_like(x))
    shaken(net)
    x = x.double().requires_grad_()
    net(x, torch.ones(1).double())[0, 0, 0, 0].backward()
    assert (x.grad.abs() > 0).all()


def test_transformer_refuses_sizes_that_do_not_divide():
    with pytest.raises(BadInput, match="size=7.*patch=2"):
        Transformer(size=7)


def test_mlp_learns_a_rectified_flow_in_seconds():
    """Two labelled points at +-1 on a line of the plane: after 300 steps, samples land near their label's point."""
    torch.manual_seed(0)
    net = MLP(dim=2, width=64, depth=2, classes=2)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(300):
        label = torch.randint(0, 2, (256,))
        x = torch.stack([2.0 * label - 1, torch.zeros(256)], 1)
        t, z = torch.rand(256), torch.randn(256, 2)
        x_t = (1 - t)[:, None] * x + t[:, None] * z
        loss = (net(x_t, t, label) - (z - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    label, z = torch.tensor([0, 1]).repeat(100), torch.randn(200, 2)
    with torch.no_grad():
        for k in range(8, 0, -1):
            z = z - net(z, torch.full((200,), k / 8), label) / 8
    away = (z - torch.stack([2.0 * label - 1, torch.zeros(200)], 1)).norm(dim=1)
    assert away.mean() < 0.15

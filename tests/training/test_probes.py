"""The critic's lag against its closed form for Gaussians, the head's accuracy, and that asking leaves no trace."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill.denoise import Gaussian
from distill.metrics.collapse import collapse_indicators
from distill.noise import RectifiedFlow
from distill.times import Grid
from distill.training.probes import MOST, probes

SCHEDULE = RectifiedFlow()


class Pull(nn.Module):
    """A one-step student: a sample is `scale` times its noise."""

    schedule, net = SCHEDULE, SimpleNamespace()

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))


class Roles(nn.Module):
    """What probes ask of a method about its networks."""

    judged = False

    def role(self, name):
        return self._modules.get(name)


class Two(Roles):
    """A student of scale 1 and a critic that knows scale `known`."""

    trainable, sampler = ("critic", "student"), staticmethod(lambda G, x, t, s, **_: G.scale * x)

    def __init__(self, known, teacher=1.0):
        super().__init__()
        self.student, self.grid = Pull(1.0), Grid.of(1)
        self.critic, self.teacher = Gaussian([0.0], known, SCHEDULE), Gaussian([0.0], teacher, SCHEDULE)

    def student_conditions(self, cond, n):
        return cond

    def critic_time_condition(self, like):
        return {}


def error(known, scale):
    """E |F(x_u) - x|^2 for x ~ N(0, scale^2) and F exact for N(0, known^2), over the noise levels that a probe takes."""
    u = torch.linspace(0.05, 0.95, MOST).double()
    alpha, sigma = 1 - u, u
    gain = alpha * known**2 / (alpha**2 * known**2 + sigma**2)
    return ((1 - alpha * gain).square() * scale**2 + (gain * sigma).square()).mean().item()


def ask(method, z, scale):
    patched = lambda G, x_1, times, sampler, **conditions: G.scale * x_1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.training.probes.solve", patched)
        return probes(method, z, scale * z, {}, SimpleNamespace())


@pytest.mark.parametrize("known, average", [(1.0, 1.0), (0.2, 0.2), (0.2, 0.5), (1.0, 0.3)])
def test_the_lag_is_that_of_gaussians(known, average):
    """The live student has scale 1, its average another; the critic knows a third."""
    z = torch.randn(MOST, 1, generator=torch.Generator().manual_seed(0))
    found = ask(Two(known), z, average)
    excess = error(known, 1.0) / error(1.0, 1.0)
    assert found["critic_excess"] == pytest.approx(excess, rel=0.12)
    assert found["critic_lag"] == pytest.approx(excess / (error(known, average) / error(1.0, average)), rel=0.2)


def test_a_critic_of_the_past_lags_and_one_of_the_present_does_not():
    z = torch.randn(MOST, 1, generator=torch.Generator().manual_seed(0))
    assert ask(Two(0.2), z, 0.2)["critic_lag"] > 1.5 > ask(Two(1.0), z, 0.2)["critic_lag"]


class Judge(Roles):
    trainable, judged = ("head", "student"), True

    def __init__(self):
        super().__init__()
        self.student, self.teacher, self.grid = Pull(1.0), Gaussian([0.0], 1.0, SCHEDULE), Grid.of(1)
        self.density = lambda n, device, dtype: torch.full((n,), 0.1)

    def logit(self, x_u, u, cond):
        return x_u.repeat(1, 2)  # two patches; calls positive samples real


@pytest.mark.parametrize("real, made, accuracy", [(5.0, -5.0, 1.0), (5.0, 5.0, 0.5), (-5.0, 5.0, 0.0)])
def test_the_heads_accuracy_counts_right_guesses_on_both_sides(real, made, accuracy):
    tests = SimpleNamespace(x=torch.full((300, 1), real))
    found = probes(Judge(), torch.zeros(40, 1), torch.full((40, 1), made), {}, tests)
    assert found == {"head_accuracy": accuracy}


def test_asking_leaves_draws_and_modes_as_they_were():
    method, tests = Judge().train(), SimpleNamespace(x=torch.ones(60, 1))
    method.teacher.eval()
    state, modes = torch.get_rng_state(), [m.training for m in method.modules()]
    first = probes(
        method, torch.zeros(40, 1), torch.randn(40, 1, generator=torch.Generator().manual_seed(1)), {}, tests
    )
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in method.modules()] == modes
    again = probes(
        method, torch.zeros(40, 1), torch.randn(40, 1, generator=torch.Generator().manual_seed(1)), {}, tests
    )
    assert first == again


def test_the_guide_lists_every_number_of_a_validation():
    page = (Path(__file__).parents[2] / "docs" / "dashboard.md").read_text()
    section = page.partition("## Numbers of a validation\n")[2].partition("\n## ")[0]
    x = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    names = [*collapse_indicators(x, {}, x), *re.findall(r'"((?:critic|head)_\w+)"', inspect.getsource(probes))]
    assert len(names) == 8 and [name for name in names if f"| `{name}` |" not in section] == []

r"""Denoisers: (x_t, t) -> E[x | x_t], whatever the network was trained to predict.

Conventions are converted here, once. Guidance is a Denoiser around a Denoiser; the same model asked under another
schedule is a Denoiser too; and the two oracles know the exact answer for Gaussian and Gaussian-mixture data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from distill.errors import BadInput, suggest
from distill.noise import Schedule, bcast, over, wide

PREDICTIONS = ("eps", "x", "v", "flow", "edm")


class Network(nn.Module):
    """A backbone `net(x_t, t, **cond)` and what the rest of the project may ask of it.

    The attributes and methods declared here are the whole protocol: a wrapper passes on all of them (`Delegate`), and
    nobody probes a network for others. The defaults are those of an unconditional network without extra inputs.
    A plain module that is no Network is read through the same names (`network_of`).
    """

    shape: tuple[int, ...] = ()  # of one sample; empty where any shape works
    classes: int = 0  # numbered classes that `label` may name; 0 for none
    null_class: bool = True  # whether label -1 ("no class") is understood
    guided: bool = False  # takes the guidance scale as an input `w`
    flow_map: bool = False  # takes a second time as an input `s`
    told: tuple[str, ...] = ()  # tensors that it must be given by name, such as text
    extras: tuple[str, ...] = ()  # tensors that it may be given
    kept: tuple[str, ...] = ()  # of `told`, those that the null condition keeps
    timesteps: int = 0  # steps of its clock; 0 where it takes t as it is
    part: str = ""  # the name of its component in a diffusers pipeline
    folder: Any = None  # the pipeline folder that it was read from
    source: tuple[str, str | None] | None = None  # path or hub name and revision that it was asked for by

    def null(self, cond: dict) -> dict:
        """`cond` with the unconditional condition: "label" becomes -1, which means no class."""
        return {k: torch.full_like(v, -1) if k == "label" else v for k, v in cond.items()}

    @property
    def needs_null(self) -> bool:
        """Whether it was loaded without the null condition that it must be given (`remember`)."""
        return False

    def remember(self, null: dict[str, Tensor] | None) -> nn.Module:
        """Keep a null condition; networks without told tensors have nothing to keep."""
        return self

    @property
    def base(self) -> nn.Module:
        """The module whose layers have the names that users know: the network itself, or what a wrapper holds."""
        return self

    def merged(self) -> nn.Module:
        """The network without wrappers, their changes in its weights."""
        return self


PROTOCOL = tuple(name for name in vars(Network) if not name.startswith("_"))


class Delegate(Network):
    """A wrapper of a network: every name of the protocol is asked of `wrapped`, unless a subclass says otherwise."""

    @property
    def wrapped(self) -> Network:
        raise NotImplementedError


for _name in PROTOCOL:
    setattr(Delegate, _name, property(lambda self, name=_name: getattr(self.wrapped, name)))


class Foreign(Network):
    """A plain module seen through the protocol: the attributes that it has, defaults for the others."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self._net = (net,)  # in a tuple: it is no part of this view
        for name in PROTOCOL:
            if name not in ("base", "merged") and hasattr(net, name):
                self.__dict__[name] = getattr(net, name)

    @property
    def base(self) -> nn.Module:
        return self._net[0]

    def merged(self) -> nn.Module:
        return self._net[0]

    def forward(self, *args, **kwargs):
        return self._net[0](*args, **kwargs)


def network_of(role: nn.Module | None) -> Network:
    """The network of a role under the protocol: a Denoiser's own, that of the denoiser it wraps, or one of defaults."""
    while isinstance(role, (Guided, Under)):
        role = role.denoiser
    net = role.net if isinstance(role, Denoiser) else None
    return as_network(net)


def as_network(net: nn.Module | None) -> Network:
    """A module under the protocol; None is the network of defaults."""
    if net is None:
        return Network()
    return net if isinstance(net, Network) else Foreign(net)


def has_network(role: nn.Module | None) -> bool:
    """Whether a role is a Denoiser with a network of its own."""
    return isinstance(role, Denoiser) and role.net is not None


class Denoiser(nn.Module):
    r"""E[x | x_t] from a network `net(x_in, t, **cond)` with x_t = alpha_t x + sigma_t z.

    prediction    the network's output
    "eps"         z                                      https://arxiv.org/abs/2006.11239
    "x"           x
    "v"           alpha_t z - sigma_t x                  https://arxiv.org/abs/2202.00512
    "flow"        z - x                                  https://arxiv.org/abs/2209.03003
    "edm"         F with x = c_skip x_t + c_out F(c_in x_t), https://arxiv.org/abs/2206.00364, in the chart
                  x_t / alpha_t where the noise has standard deviation sigma_t / alpha_t

    The network sees t as it is, in float32 or better, and x_in in the precision of its own weights. All else is
    computed in float32 or better.

    Args:
        net: the backbone; a `Network`, or any module with some of its attributes.
        schedule: the noise schedule under which it was trained.
        prediction: one of the names above.
        sigma_data: standard deviation of the data, for "edm" only.

    Raises:
        BadInput: if the prediction is unknown, or is "eps" under a schedule with alpha_1 = 0, from which no x follows.
    """

    def __init__(
        self, net: nn.Module | None, schedule: Schedule, prediction: str = "flow", sigma_data: float = 1.0
    ):
        super().__init__()
        if prediction not in PREDICTIONS:
            hint = suggest(prediction, PREDICTIONS)
            raise BadInput(f"prediction '{prediction}' is none of {', '.join(PREDICTIONS)}.{hint}")
        if prediction == "eps" and schedule.zero_terminal_snr:
            raise BadInput(
                f"prediction 'eps' says nothing of x at t = 1 under {type(schedule).__name__}, where alpha is 0: "
                "use 'v', 'flow' or 'x', or a schedule that keeps some signal."
            )
        self.net, self.schedule, self.prediction, self.sigma_data = net, schedule, prediction, sigma_data

    def forward(self, x_t: Tensor, t: Tensor, **cond) -> Tensor:
        """E[x | x_t] (B, ...) for x_t (B, ...) and t (B,)."""
        return self.to_x(self.native(x_t, t, **cond), x_t, t)

    def native(self, x_t: Tensor, t: Tensor, **cond) -> Tensor:
        """The network's own output (B, ...), in the chart named by `prediction`."""
        t = wide(t)
        x_in = x_t
        if self.prediction == "edm":
            x_in = wide(x_t) / self._edm(x_t, t)[2]
        dtype = next((p.dtype for p in self.net.parameters() if p.is_floating_point()), x_t.dtype)
        return self.net(x_in.to(dtype), t, **cond)

    def to_x(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x (B, ...) from the native output at x_t."""
        out, x_t = wide(out), wide(x_t)
        alpha_t, sigma_t = self.schedule.at(t, x_t)
        if self.prediction == "x":
            return out
        if self.prediction == "eps":
            return (x_t - sigma_t * out) / alpha_t
        if self.prediction == "v":
            return (alpha_t * x_t - sigma_t * out) / (alpha_t**2 + sigma_t**2)
        if self.prediction == "flow":
            return (x_t - sigma_t * out) / (alpha_t + sigma_t)
        skip, c_out, _ = self._edm(x_t, t)
        return skip * x_t + c_out * out

    def from_x(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The native output that stands for x (B, ...) at x_t; at t = 0, where every output does, that of z = 0."""
        x, x_t = wide(x), wide(x_t)
        alpha_t, sigma_t = self.schedule.at(t, x_t)
        if self.prediction == "x":
            return x
        z = over(x_t - alpha_t * x, sigma_t)
        if self.prediction == "eps":
            return z
        if self.prediction == "v":
            return alpha_t * z - sigma_t * x
        if self.prediction == "flow":
            return z - x
        skip, c_out, _ = self._edm(x_t, t)
        return over(x - skip * x_t, c_out)

    def _edm(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip / alpha, c_out, alpha / c_in) with alpha multiplied out, so that alpha = 0 is no special case."""
        alpha_t, sigma_t = self.schedule.at(t, x_t)
        scale = (sigma_t**2 + (alpha_t * self.sigma_data) ** 2).sqrt()
        return alpha_t * (self.sigma_data / scale) ** 2, sigma_t * self.sigma_data / scale, scale

    def null(self, cond: dict) -> dict:
        """The unconditional condition: what `net.null` says, else "label" replaced by -1, which means no class."""
        return network_of(self).null(cond)

    def drop(self, cond: dict, mask: Tensor) -> dict:
        """`cond` with the unconditional condition where `mask` (B,), for training with dropped conditions."""
        null = self.null(cond)
        return {k: torch.where(bcast(mask, v), null[k], v) if torch.is_tensor(v) else v for k, v in cond.items()}

    def under(self, schedule: Schedule) -> Denoiser:
        """The same model, weights shared, asked about x_t of another schedule."""
        return Under(self, schedule)


class Under(Denoiser):
    r"""A denoiser asked under another schedule: E[x | x_t] depends on x_t only through direction and signal-to-noise.

    With t' the denoiser's own time of equal log-SNR, D'(x_t, t) = D(c x_t, t'), c^2 = (a'^2 + s'^2) / (a^2 + s^2) with
    a, s the coefficients at t and a', s' those at t'. Log-SNRs outside the denoiser's range are clamped to its ends.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule):
        super().__init__(None, schedule, "x")
        self.denoiser = denoiser

    def native(self, x_t: Tensor, t: Tensor, **cond) -> Tensor:
        own = self.denoiser.schedule
        t_own = own.time(self.schedule.log_snr(t))
        (a, s), (a_own, s_own) = self.schedule(t), own(t_own)
        c = ((a_own**2 + s_own**2) / (a**2 + s**2)).sqrt()
        return self.denoiser(bcast(c, x_t) * x_t, t_own, **cond)

    def null(self, cond: dict) -> dict:
        return self.denoiser.null(cond)


class Guided(Denoiser):
    r"""Classifier-free guidance: D_w = D(x_t, null) + w (D(x_t, cond) - D(x_t, null)).

    w = 0 is unconditional, w = 1 conditional (one evaluation; any other w makes two, in one batch of 2B).
    A network that takes w as an input, distilled for it, is asked once, with w.
    Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598; their w is ours minus 1.

    Args:
        denoiser: the Denoiser to guide.
        w: the scale, a number or one per sample (B,); `forward(..., w=)` overrides it.
    """

    def __init__(self, denoiser: Denoiser, w: float | Tensor = 1.0):
        super().__init__(None, denoiser.schedule, "x")
        self.denoiser, self.w = denoiser, w

    def native(self, x_t: Tensor, t: Tensor, w: float | Tensor | None = None, **cond) -> Tensor:
        w = self.w if w is None else w
        if network_of(self.denoiser).guided:
            return self.denoiser(x_t, t, w=w, **cond)
        if not torch.is_tensor(w) and w == 1:
            return self.denoiser(x_t, t, **cond)
        null = self.null(cond)
        both = {k: torch.cat([null[k], v]) if torch.is_tensor(v) else v for k, v in cond.items()}
        x_null, x_cond = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), **both).chunk(2)
        w = bcast(w.to(x_cond), x_cond) if torch.is_tensor(w) else w
        return x_null + w * (x_cond - x_null)

    def null(self, cond: dict) -> dict:
        return self.denoiser.null(cond)


class Gaussian(Denoiser):
    r"""The exact denoiser of x ~ N(mean, diag(std^2)). With v_t^2 = alpha_t^2 std^2 + sigma_t^2,

    E[x | x_t] = mean + alpha_t std^2 / v_t^2 (x_t - alpha_t mean).

    Args:
        mean: of the shape of one sample, (D,) or (C, H, W).
        std: a positive number, or one per coordinate.
        schedule: the noise schedule.
    """

    def __init__(self, mean: Sequence[float] | Tensor, std: float | Sequence[float] | Tensor, schedule: Schedule):
        super().__init__(None, schedule, "x")
        mean = torch.as_tensor(mean, dtype=torch.float64)
        self.register_buffer("mean", mean)
        self.register_buffer("std", _positive(std).expand(mean.shape).clone())

    def _marginal(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t mean and v_t, (B, ...)."""
        alpha_t, sigma_t = self.schedule.at(t, x)
        mean, std = self.mean.to(alpha_t.dtype), self.std.to(alpha_t.dtype)
        return alpha_t * mean, ((alpha_t * std) ** 2 + sigma_t**2).sqrt()

    def native(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        x_t = wide(x_t)
        alpha_t, _ = self.schedule.at(t, x_t)
        m_t, v_t = self._marginal(x_t, t)
        return (self.mean + alpha_t * (self.std / v_t) ** 2 * (x_t - m_t)).to(x_t.dtype)

    def log_prob(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """log p_t(x_t) (B,)."""
        m_t, v_t = self._marginal(x_t, t)
        return _log_normal(x_t, m_t, v_t).flatten(1).sum(1)

    def flow_map(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact probability flow from t to s: alpha_s mean + v_s / v_t (x_t - alpha_t mean)."""
        (m_t, v_t), (m_s, v_s) = self._marginal(x_t, t), self._marginal(x_t, s)
        return m_s + v_s / v_t * (x_t - m_t)

    def sample(
        self, n: int, generator: Generator | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """n samples x (n, ...) and their labels, all 0."""
        z = _randn((n, *self.mean.shape), generator, dtype, self.mean.device)
        return (self.mean + self.std * z).to(z.dtype), torch.zeros(n, dtype=torch.long, device=z.device)


class GaussianMixture(Denoiser):
    r"""The exact denoiser of x ~ sum_k weights_k N(means_k, stds_k^2 I) in D dimensions.

    E[x | x_t] = sum_k r_k(x_t) D_k(x_t) with D_k the denoiser of component k and its responsibility
    r_k ~ weights_k N(x_t; alpha_t means_k, v_k^2 I), v_k^2 = alpha_t^2 stds_k^2 + sigma_t^2.
    `label` (B,) picks a component, -1 the whole mixture.

    Args:
        means: (K, D).
        stds: K positive numbers, or one for all.
        weights: K positive numbers, normalised here; equal if None.
        schedule: the noise schedule.
    """

    def __init__(self, means, stds, weights=None, *, schedule: Schedule):
        super().__init__(None, schedule, "x")
        means = torch.as_tensor(means, dtype=torch.float64)
        if means.ndim != 2:
            raise BadInput(f"means of a mixture must be K by D, got {tuple(means.shape)}: give one row per component.")
        weights = _positive(1.0 if weights is None else weights, "weights").expand(len(means))
        self.register_buffer("means", means)
        self.register_buffer("stds", _positive(stds).expand(len(means)).clone())
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    @classmethod
    def ring(cls, modes: int = 6, radius: float = 1.0, std: float = 0.1, *, schedule: Schedule) -> GaussianMixture:
        """Equal modes on a circle in the plane; label k sits at the angle 2 pi k / modes."""
        angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
        return cls(radius * torch.stack([angle.cos(), angle.sin()], 1), std, schedule=schedule)

    def _components(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha_t (B, 1, 1), x_t - alpha_t means (B, K, D) and the variances v^2 (B, K, 1)."""
        alpha_t, sigma_t = self.schedule.at(t, x_t[:, None])
        means, stds = self.means.to(alpha_t.dtype), self.stds.to(alpha_t.dtype)[:, None]
        return alpha_t, x_t[:, None] - alpha_t * means, (alpha_t * stds) ** 2 + sigma_t**2

    def _log_prior(self, n: int, label: Tensor | None) -> Tensor:
        """Log weights (n, K): the mixture's where the label is -1, else all on the labelled component."""
        prior = self.log_weights.expand(n, -1)
        if label is None:
            return prior
        index = torch.arange(len(self.means), device=label.device)
        chosen = torch.where(label[:, None] == index, 0.0, -torch.inf)
        return torch.where(label[:, None] < 0, prior, chosen.to(prior))

    def _log_joint(self, away: Tensor, var: Tensor, label: Tensor | None) -> Tensor:
        """log weights_k + log N(x_t; alpha_t means_k, v_k^2 I), (B, K)."""
        log_normal = _log_normal(away, 0.0, var.sqrt()).sum(-1)
        return log_normal + self._log_prior(len(away), label).to(log_normal.dtype)

    def native(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        x_t = wide(x_t)
        alpha_t, away, var = self._components(x_t, t)
        r = self._log_joint(away, var, label).softmax(-1)
        x_k = self.means + alpha_t * self.stds[:, None] ** 2 / var * away
        return (r[..., None] * x_k).sum(1).to(x_t.dtype)

    def log_prob(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """log p_t(x_t | label) (B,)."""
        _, away, var = self._components(x_t, t)
        return self._log_joint(away, var, label).logsumexp(-1)

    @torch.no_grad()
    def flow_map(self, x_t: Tensor, t: Tensor, s: Tensor, label: Tensor | None = None) -> Tensor:
        """The exact probability flow from t to s in one dimension, by quantiles: x_s = Q_s(CDF_t(x_t)).

        x_t is (B, 1). Solved by bisection in float64; the smaller tail is compared, in logs, so far tails stay exact.

        Raises:
            BadInput: if the mixture has more than one dimension.
        """
        if self.means.shape[1] != 1:
            raise BadInput("flow_map of a mixture is exact in one dimension only: give means of shape K by 1.")
        x, t, s = x_t.double(), t.double(), s.double()
        lower, upper = self._log_tails(x, t, label)
        left, goal = lower < upper, torch.minimum(lower, upper)
        _, away, var = self._components(torch.zeros_like(x), s)
        centre, reach = -away.squeeze(-1), 40 * var.squeeze(-1).sqrt()
        lo, hi = (centre - reach).amin(1, keepdim=True), (centre + reach).amax(1, keepdim=True)
        for _ in range(70):
            y = (lo + hi) / 2
            lower, upper = self._log_tails(y, s, label)
            low = torch.where(left, lower < goal, upper > goal)[:, None]
            lo, hi = torch.where(low, y, lo), torch.where(low, hi, y)
        return ((lo + hi) / 2).to(x_t.dtype)

    def _log_tails(self, x: Tensor, t: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """log P(X_t < x) and log P(X_t > x), each (B,), for x (B, 1)."""
        _, away, var = self._components(x, t)
        z, prior = (away / var.sqrt()).squeeze(-1), self._log_prior(len(x), label)
        return tuple((prior + torch.special.log_ndtr(q)).logsumexp(-1) for q in (z, -z))

    def sample(
        self, n: int, generator: Generator | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """n samples x (n, D) and the components they came from (n,)."""
        home = self.means.device
        u = _randn((n, self.means.shape[1]), generator, dtype, home)
        weights = self.log_weights.exp().to(generator.device if generator is not None else home)
        label = torch.multinomial(weights, n, replacement=True, generator=generator).to(home)
        return (self.means[label] + self.stds[label, None] * u).to(u.dtype), label


def _positive(value, name: str = "std") -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64)
    if not (value > 0).all():
        raise BadInput(f"{name} must be positive, got {value.tolist()}.")
    return value


def _log_normal(x: Tensor, mean: Tensor | float, std: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)


def _randn(shape: tuple[int, ...], generator: Generator | None, dtype, device) -> Tensor:
    home = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=home, dtype=dtype).to(device)

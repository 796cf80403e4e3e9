r"""Noise schedules: t -> (alpha_t, sigma_t) with x_t = alpha_t x + sigma_t z and z ~ N(0, I).

Time is a float tensor t (B,) in [0, 1]: data at 0, noise at 1. Coefficients come back as (B,) in float32 or better,
whatever the precision of t; float64 in gives float64 out.

    Song et al., Score-based generative modeling through SDEs, 2021, https://arxiv.org/abs/2011.13456
    Kingma et al., Variational diffusion models, 2021, https://arxiv.org/abs/2107.00630
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from distill.errors import BadInput


def bcast(a: Tensor, x: Tensor) -> Tensor:
    """`a` (B,) with as many trailing ones as `x` (B, ...) needs: (B, 1, ...)."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def wide(t: Tensor) -> Tensor:
    """`t` in float32, or as it is if it is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 with a zero gradient where b = 0."""
    return a / torch.where(b == 0, torch.inf, b)


class Schedule:
    r"""x_t = alpha_t x + sigma_t z. A family defines `alpha`, `sigma`, `d_alpha`, `d_sigma` and `time`.

    Families are frozen dataclasses: numbers only, comparable and hashable, without state or device.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale alpha_t (B,): 1 at t = 0, non-increasing."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale sigma_t (B,): exactly 0 at t = 0, increasing."""
        raise NotImplementedError

    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha_t / dt (B,)."""
        raise NotImplementedError

    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma_t / dt (B,); 0 stands for the infinite slope of the VP families at t = 0."""
        raise NotImplementedError

    def time(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`, clamped to [0, 1]; +inf gives 0 and -inf gives 1."""
        raise NotImplementedError

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), each (B,)."""
        return self.alpha(t), self.sigma(t)

    def at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), each (B, 1, ...), ready to multiply `x` (B, ...)."""
        return bcast(self.alpha(t), x), bcast(self.sigma(t), x)

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(alpha_t / sigma_t) (B,), strictly decreasing; +inf at t = 0, -inf where alpha_t = 0."""
        alpha_t, sigma_t = self(t)
        return 2 * (alpha_t.log() - sigma_t.log())

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether x_1 is pure noise, alpha_1 = 0: x cannot be read off a prediction of the noise there."""
        return self.alpha(torch.ones(1, dtype=torch.float64)).item() < 1e-6

    noise_scale: ClassVar[float] = 1.0  # standard deviation of pure noise, which sampling starts from

    def start(self, z: Tensor) -> Tensor:
        """x_1 for sampling, from z ~ N(0, I): noise_scale z. Families that explode scale it, as stock schedulers do."""
        return self.noise_scale * z

    def add_noise(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x_t = alpha_t x + sigma_t z for x, z (B, ...) and t (B,)."""
        alpha_t, sigma_t = self.at(t, x)
        return alpha_t * x + sigma_t * z

    def transition_coefs(self, s: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        r"""(alpha_u / alpha_s, beta), each (B,), of q(x_u | x_s) for u >= s.

        beta^2 = sigma_u^2 - (alpha_u sigma_s / alpha_s)^2, at least 0.
        """
        (alpha_s, sigma_s), (alpha_u, sigma_u) = self(s), self(u)
        ratio = torch.where(alpha_s == 0, 1.0, over(alpha_u, alpha_s))
        return ratio, (sigma_u**2 - (ratio * sigma_s) ** 2).clamp(min=0).sqrt()

    def transition(self, x_s: Tensor, s: Tensor, u: Tensor, noise: Tensor) -> Tensor:
        """x_u ~ q(x_u | x_s) = N(alpha_u / alpha_s x_s, beta^2 I) for u >= s and `noise` ~ N(0, I), all (B, ...)."""
        ratio, beta = self.transition_coefs(s, u)
        return bcast(ratio, x_s) * x_s + bcast(beta, x_s) * noise

    def eps(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that x (B, ...) implies: (x_t - alpha_t x) / sigma_t, and 0 at t = 0."""
        alpha_t, sigma_t = self.at(t, x_t)
        return over(x_t - alpha_t * x, sigma_t)

    def score(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t) = (alpha_t x - x_t) / sigma_t^2 for x = E[x | x_t] and t > 0."""
        alpha_t, sigma_t = self.at(t, x_t)
        return over(alpha_t * x - x_t, sigma_t**2)

    def velocity(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt = alpha'_t x + sigma'_t eps on the probability-flow ODE, for x = E[x | x_t] and t > 0."""
        return bcast(self.d_alpha(t), x_t) * x + bcast(self.d_sigma(t), x_t) * self.eps(x, x_t, t)


class VP(Schedule):
    r"""Variance preserving, alpha_t = exp(-q_t) and sigma_t^2 = 1 - alpha_t^2, with q_t half the integral of beta."""

    def q(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_q(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def time_of_q(self, q: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        return (-self.q(wide(t))).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-2 * self.q(wide(t)))).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.d_q(wide(t)) * self.alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return over(self.d_q(wide(t)) * self.alpha(t) ** 2, self.sigma(t))

    def time(self, log_snr: Tensor) -> Tensor:
        q = torch.nn.functional.softplus(-wide(log_snr)) / 2
        return self.time_of_q(q.clamp(max=self.q(1.0))).clamp(0, 1)


@dataclass(frozen=True)
class VPLinear(VP):
    """beta(t) = beta_min + t (beta_max - beta_min), Song et al. 2021, https://arxiv.org/abs/2011.13456."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def q(self, t):
        return t * self.beta_min / 2 + t**2 * (self.beta_max - self.beta_min) / 4

    def d_q(self, t):
        return (self.beta_min + t * (self.beta_max - self.beta_min)) / 2

    def time_of_q(self, q):
        b, a = self.beta_min / 2, (self.beta_max - self.beta_min) / 4
        return 2 * q / (b + (b**2 + 4 * a * q).sqrt())


@dataclass(frozen=True)
class VPScaledLinear(VP):
    """sqrt(beta(t)) linear in t, as in latent diffusion, https://arxiv.org/abs/2112.10752."""

    beta_min: float = 0.85
    beta_max: float = 12.0

    def _roots(self) -> tuple[float, float]:
        return math.sqrt(self.beta_min), math.sqrt(self.beta_max) - math.sqrt(self.beta_min)

    def q(self, t):
        b, d = self._roots()
        return t * (b**2 + b * d * t + d**2 * t**2 / 3) / 2

    def d_q(self, t):
        b, d = self._roots()
        return (b + d * t) ** 2 / 2

    def time_of_q(self, q):
        b, d = self._roots()
        return ((b**3 + 6 * d * q) ** (1 / 3) - b) / d


@dataclass(frozen=True)
class VPCosine(Schedule):
    r"""alpha_t = cos(theta_t) / cos(theta_0), theta_t = pi/2 (t + s) / (1 + s); alpha_1 = 0.

    Nichol and Dhariwal, 2021, https://arxiv.org/abs/2102.09672, without their cap on beta.
    """

    s: float = 0.008

    def _angle(self, fraction):
        return math.pi / 2 * fraction / (1 + self.s)

    def alpha(self, t: Tensor) -> Tensor:
        # cos(theta) as the sine of the complement: exactly 0 at t = 1 and exactly 1 at t = 0.
        return torch.sin(self._angle(1 - wide(t))) / math.sin(self._angle(1))

    def sigma(self, t: Tensor) -> Tensor:
        t = wide(t)
        square = torch.sin(self._angle(t)) * torch.sin(self._angle(t + 2 * self.s))
        return square.clamp(min=0).sqrt() / math.sin(self._angle(1))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self._angle(1) * torch.cos(self._angle(1 - wide(t))) / math.sin(self._angle(1))

    def d_sigma(self, t: Tensor) -> Tensor:
        return over(-self.alpha(t) * self.d_alpha(t), self.sigma(t))

    def time(self, log_snr: Tensor) -> Tensor:
        alpha = torch.sigmoid(wide(log_snr)).sqrt()
        return (1 - torch.asin(alpha * math.sin(self._angle(1))) / self._angle(1)).clamp(0, 1)


@dataclass(frozen=True)
class VE(Schedule):
    """alpha = 1, sigma = sigma_max t^rho: Karras spacing with sigma_min = 0, https://arxiv.org/abs/2206.00364."""

    sigma_max: float = 80.0
    rho: float = 7.0

    @property
    def noise_scale(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(wide(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * wide(t) ** self.rho

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(wide(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * self.rho * wide(t) ** (self.rho - 1)

    def time(self, log_snr: Tensor) -> Tensor:
        return (torch.exp(-wide(log_snr) / 2) / self.sigma_max).clamp(0, 1) ** (1 / self.rho)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """alpha = 1 - t', sigma = t' with t' = shift t / (1 + (shift - 1) t).

    Liu et al., 2022, https://arxiv.org/abs/2209.03003; shift: Esser et al., 2024, https://arxiv.org/abs/2403.03206.
    """

    shift: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        t = wide(t)
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        t = wide(t)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.d_sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.shift / (1 + (self.shift - 1) * wide(t)) ** 2

    def time(self, log_snr: Tensor) -> Tensor:
        sigma = torch.sigmoid(-wide(log_snr) / 2)
        return sigma / (self.shift - (self.shift - 1) * sigma)


@dataclass(frozen=True)
class TrigFlow(Schedule):
    """alpha = cos(pi t / 2), sigma = sigma_data sin(pi t / 2), Lu and Song 2024, https://arxiv.org/abs/2410.11081."""

    sigma_data: float = 1.0

    @property
    def noise_scale(self) -> float:
        return self.sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - wide(t)))  # exactly 0 at t = 1

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(math.pi / 2 * wide(t))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * wide(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.sigma_data * self.alpha(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-wide(log_snr) / 2) / self.sigma_data) * (2 / math.pi)


@dataclass(frozen=True)
class Table(Schedule):
    r"""N discrete VP steps: step n (from 0) with alpha^2 = alphas_cumprod[n] lies at t = (n + 1) / N; t = 0 is clean.

    Between the nodes the angle phi = atan2(sigma, alpha) is linear in t, so a zero terminal SNR can be represented
    and the inverse is exact.

    Raises:
        BadInput: if alphas_cumprod is empty, leaves [0, 1), or does not decrease strictly.
    """

    alphas_cumprod: tuple[float, ...]

    def __post_init__(self):
        abar = tuple(float(a) for a in self.alphas_cumprod)
        if not abar or not all(0 <= a < 1 for a in abar) or any(a <= b for a, b in zip(abar, abar[1:])):
            raise BadInput("alphas_cumprod must decrease strictly within [0, 1): pass the scheduler's own table.")
        object.__setattr__(self, "alphas_cumprod", abar)

    @classmethod
    def of(cls, schedule: Schedule, steps: int = 1000) -> Table:
        """Any path as a table of `steps`, rescaled to alpha^2 + sigma^2 = 1: alpha-bar = 1 / (1 + sigma^2 / alpha^2).

        A model trained on it is served by a stock DDIM scheduler with these betas.
        """
        t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        alpha, sigma = schedule(t)
        return cls(tuple((alpha**2 / (alpha**2 + sigma**2)).tolist()))

    def _angle(self, t: Tensor, which: int) -> tuple[Tensor, Tensor]:
        """phi (which = 0) or its complement pi/2 - phi (which = 1), and its derivative in t."""
        nodes = _table_angles(self.alphas_cumprod, t.dtype, t.device)[which]
        steps = len(self.alphas_cumprod)
        n = (t.detach() * steps).long().clamp(0, steps - 1)
        rise = nodes[n + 1] - nodes[n]
        return nodes[n] + (t * steps - n) * rise, steps * rise

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(self._angle(wide(t), 1)[0])

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self._angle(wide(t), 0)[0])

    def d_alpha(self, t: Tensor) -> Tensor:
        phi, d_phi = self._angle(wide(t), 0)
        return -torch.sin(phi) * d_phi

    def d_sigma(self, t: Tensor) -> Tensor:
        psi, d_psi = self._angle(wide(t), 1)
        return -torch.sin(psi) * d_psi

    def time(self, log_snr: Tensor) -> Tensor:
        angle = torch.atan(torch.exp(-wide(log_snr) / 2))
        phi, _ = _table_angles(self.alphas_cumprod, angle.dtype, angle.device)
        n = torch.searchsorted(phi, angle.detach()).clamp(1, len(phi) - 1) - 1
        return ((n + (angle - phi[n]) / (phi[n + 1] - phi[n])) / (len(phi) - 1)).clamp(0, 1)


@lru_cache(maxsize=64)
def _table_angles(abar: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """atan2(sigma, alpha) and its complement at the N + 1 nodes of a Table; both end exactly at 0."""
    alpha = torch.tensor((1.0, *abar), dtype=torch.float64).sqrt()
    sigma = (1 - alpha**2).sqrt()
    angles = torch.atan2(sigma, alpha), torch.atan2(alpha, sigma)
    return tuple(a.to(device=device, dtype=dtype) for a in angles)

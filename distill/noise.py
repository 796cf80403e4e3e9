r"""Noise schedules: t -> (alpha_t, sigma_t) with x_t = alpha_t x + sigma_t z and z ~ N(0, I).

Time is a float tensor t (B,) in [0, 1]: data at 0, noise at 1. Coefficients have shape (B,) and dtype float32, or
float64 if t is float64.

    Song et al., Score-based generative modeling through SDEs, 2021, https://arxiv.org/abs/2011.13456
    Kingma et al., Variational diffusion models, 2021, https://arxiv.org/abs/2107.00630

    >>> import torch, distill
    >>> distill.noise.RectifiedFlow().sigma(torch.tensor([0.25])).item()
    0.25
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from distill.errors import BadInput

T = TypeVar("T", float, Tensor)


def bcast(a: Tensor, x: Tensor) -> Tensor:
    """`a` (B,) reshaped to (B, 1, ...), with as many dimensions as `x` (B, ...)."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def at_least_float32(t: Tensor) -> Tensor:
    """`t` cast to float32; float64 is kept."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b; where b = 0, the value and the gradient are 0."""
    return a / torch.where(b == 0, torch.inf, b)


class Schedule:
    r"""Base class: x_t = alpha_t x + sigma_t z. Subclasses define `alpha`, `sigma`, `d_alpha`, `d_sigma` and `time`.

    Subclasses are frozen dataclasses of numbers: comparable, hashable, without state or device.
    """

    @property
    def noise_scale(self) -> float:
        """Standard deviation of x_1, from which sampling starts."""
        return 1.0

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
        """d sigma_t / dt (B,). VP schedules have an infinite slope at t = 0 and return 0 there."""
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
        """Whether alpha_1 = 0, so that x_1 is pure noise and an eps-prediction does not determine x at t = 1."""
        return self.alpha(torch.ones(1, dtype=torch.float64)).item() < 1e-6

    def start(self, z: Tensor) -> Tensor:
        """Initial state of sampling, x_1 = noise_scale z for z ~ N(0, I) (B, ...)."""
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
        ratio = torch.where(alpha_s == 0, 1.0, safe_divide(alpha_u, alpha_s))
        return ratio, (sigma_u**2 - (ratio * sigma_s) ** 2).clamp(min=0).sqrt()

    def transition(self, x_s: Tensor, s: Tensor, u: Tensor, noise: Tensor) -> Tensor:
        """x_u ~ q(x_u | x_s) = N(alpha_u / alpha_s x_s, beta^2 I) for u >= s and `noise` ~ N(0, I), all (B, ...)."""
        ratio, beta = self.transition_coefs(s, u)
        return bcast(ratio, x_s) * x_s + bcast(beta, x_s) * noise

    def eps(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that corresponds to x (B, ...): (x_t - alpha_t x) / sigma_t, and 0 at t = 0."""
        alpha_t, sigma_t = self.at(t, x_t)
        return safe_divide(x_t - alpha_t * x, sigma_t)

    def score(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t) = (alpha_t x - x_t) / sigma_t^2 for x = E[x | x_t] and t > 0."""
        alpha_t, sigma_t = self.at(t, x_t)
        return safe_divide(alpha_t * x - x_t, sigma_t**2)

    def velocity(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt = alpha'_t x + sigma'_t eps on the probability-flow ODE, for x = E[x | x_t] and t > 0."""
        return bcast(self.d_alpha(t), x_t) * x + bcast(self.d_sigma(t), x_t) * self.eps(x, x_t, t)


class VP(Schedule):
    r"""Variance preserving: alpha_t = exp(-q_t), sigma_t^2 = 1 - alpha_t^2, q_t = half the integral of beta over [0, t]."""

    def q(self, t: T) -> T:
        """q_t (B,), increasing from 0."""
        raise NotImplementedError

    def d_q(self, t: Tensor) -> Tensor:
        """dq/dt (B,) = beta(t) / 2."""
        raise NotImplementedError

    def time_of_q(self, q: Tensor) -> Tensor:
        """The inverse of `q`."""
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        return (-self.q(at_least_float32(t))).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-2 * self.q(at_least_float32(t)))).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.d_q(at_least_float32(t)) * self.alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return safe_divide(self.d_q(at_least_float32(t)) * self.alpha(t) ** 2, self.sigma(t))

    def time(self, log_snr: Tensor) -> Tensor:
        q = torch.nn.functional.softplus(-at_least_float32(log_snr)) / 2
        return self.time_of_q(q.clamp(max=self.q(1.0))).clamp(0, 1)


@dataclass(frozen=True)
class VPLinear(VP):
    """beta(t) = beta_min + t (beta_max - beta_min), Song et al. 2021, https://arxiv.org/abs/2011.13456."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def q(self, t: T) -> T:
        return t * self.beta_min / 2 + t**2 * (self.beta_max - self.beta_min) / 4

    def d_q(self, t: Tensor) -> Tensor:
        return (self.beta_min + t * (self.beta_max - self.beta_min)) / 2

    def time_of_q(self, q: Tensor) -> Tensor:
        b, a = self.beta_min / 2, (self.beta_max - self.beta_min) / 4
        return 2 * q / (b + (b**2 + 4 * a * q).sqrt())


@dataclass(frozen=True)
class VPScaledLinear(VP):
    """sqrt(beta(t)) linear in t, as in latent diffusion, https://arxiv.org/abs/2112.10752."""

    beta_min: float = 0.85
    beta_max: float = 12.0

    def _roots(self) -> tuple[float, float]:
        return math.sqrt(self.beta_min), math.sqrt(self.beta_max) - math.sqrt(self.beta_min)

    def q(self, t: T) -> T:
        b, d = self._roots()
        return t * (b**2 + b * d * t + d**2 * t**2 / 3) / 2

    def d_q(self, t: Tensor) -> Tensor:
        b, d = self._roots()
        return (b + d * t) ** 2 / 2

    def time_of_q(self, q: Tensor) -> Tensor:
        b, d = self._roots()
        return ((b**3 + 6 * d * q) ** (1 / 3) - b) / d


@dataclass(frozen=True)
class VPCosine(Schedule):
    r"""alpha_t = cos(theta_t) / cos(theta_0), theta_t = pi/2 (t + s) / (1 + s); alpha_1 = 0.

    Nichol and Dhariwal, 2021, https://arxiv.org/abs/2102.09672, without the paper's clipping of beta.
    """

    s: float = 0.008

    def _angle(self, fraction: T) -> T:
        return math.pi / 2 * fraction / (1 + self.s)

    def alpha(self, t: Tensor) -> Tensor:
        # The sine of the complement is exactly 0 at t = 1 and, after division, exactly 1 at t = 0; the cosine is not.
        return torch.sin(self._angle(1 - at_least_float32(t))) / math.sin(self._angle(1))

    def sigma(self, t: Tensor) -> Tensor:
        t = at_least_float32(t)
        square = torch.sin(self._angle(t)) * torch.sin(self._angle(t + 2 * self.s))
        return square.clamp(min=0).sqrt() / math.sin(self._angle(1))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self._angle(1) * torch.cos(self._angle(1 - at_least_float32(t))) / math.sin(self._angle(1))

    def d_sigma(self, t: Tensor) -> Tensor:
        return safe_divide(-self.alpha(t) * self.d_alpha(t), self.sigma(t))

    def time(self, log_snr: Tensor) -> Tensor:
        alpha = torch.sigmoid(at_least_float32(log_snr)).sqrt()
        return (1 - torch.asin(alpha * math.sin(self._angle(1))) / self._angle(1)).clamp(0, 1)


@dataclass(frozen=True)
class VE(Schedule):
    r"""alpha = 1, sigma = (b + (a - b) t)^rho, a = sigma_max^(1/rho), b = sigma_min^(1/rho); exactly 0 at t = 0.

    Karras et al. 2022, https://arxiv.org/abs/2206.00364. `sigma_min`, 0.002 for EDM's networks, is the limit as t -> 0: with
    0 three of 18 uniform intervals lie below 0.002. Raises BadInput unless 0 <= sigma_min < sigma_max.
    """

    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < self.sigma_max:
            raise BadInput(f"VE: sigma_min {self.sigma_min:g} must be in [0, sigma_max), sigma_max {self.sigma_max:g}.")

    @property
    def noise_scale(self) -> float:
        return self.sigma_max

    def _ends(self) -> tuple[float, float]:
        """b, a - b."""
        low = self.sigma_min ** (1 / self.rho)
        return low, self.sigma_max ** (1 / self.rho) - low

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(at_least_float32(t))

    def sigma(self, t: Tensor) -> Tensor:
        t = at_least_float32(t)
        if self.sigma_min == 0:
            return self.sigma_max * t**self.rho
        low, gain = self._ends()
        return torch.where(t > 0, (low + gain * t) ** self.rho, 0.0)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(at_least_float32(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        low, gain = self._ends()
        return self.rho * gain * (low + gain * at_least_float32(t)) ** (self.rho - 1)

    def time(self, log_snr: Tensor) -> Tensor:
        low, gain = self._ends()
        return ((torch.exp(-at_least_float32(log_snr) / 2) ** (1 / self.rho) - low) / gain).clamp(0, 1)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """alpha = 1 - t', sigma = t' with t' = shift t / (1 + (shift - 1) t).

    Liu et al., 2022, https://arxiv.org/abs/2209.03003; shift: Esser et al., 2024, https://arxiv.org/abs/2403.03206.

    Examples:
        >>> schedule = RectifiedFlow(shift=3.0)
        >>> schedule.sigma(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.7500, 1.0000])
        >>> x, z = torch.zeros(1, 2), torch.ones(1, 2)
        >>> schedule.add_noise(x, torch.tensor([0.5]), z)
        tensor([[0.7500, 0.7500]])
        >>> schedule.time(schedule.log_snr(torch.tensor([0.5])))
        tensor([0.5000])
    """

    shift: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        t = at_least_float32(t)
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        t = at_least_float32(t)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.d_sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.shift / (1 + (self.shift - 1) * at_least_float32(t)) ** 2

    def time(self, log_snr: Tensor) -> Tensor:
        sigma = torch.sigmoid(-at_least_float32(log_snr) / 2)
        return sigma / (self.shift - (self.shift - 1) * sigma)


@dataclass(frozen=True)
class TrigFlow(Schedule):
    """alpha = cos(pi t / 2), sigma = sigma_data sin(pi t / 2), Lu and Song 2024, https://arxiv.org/abs/2410.11081."""

    sigma_data: float = 1.0

    @property
    def noise_scale(self) -> float:
        return self.sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - at_least_float32(t)))  # exactly 0 at t = 1

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(math.pi / 2 * at_least_float32(t))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * at_least_float32(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.sigma_data * self.alpha(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-at_least_float32(log_snr) / 2) / self.sigma_data) * (2 / math.pi)


@dataclass(frozen=True)
class Table(Schedule):
    r"""A discrete VP schedule of N steps: alpha^2 = alphas_cumprod[n] at t = (n + 1) / N for n = 0..N-1; t = 0 is clean.

    Between the steps the angle phi = atan2(sigma, alpha) is linear in t: a zero terminal SNR can be represented and
    the inverse is exact.

    Args:
        alphas_cumprod: N numbers in [0, 1), strictly decreasing; `scheduler.alphas_cumprod` of diffusers.

    Raises:
        BadInput: if alphas_cumprod is empty, has values outside [0, 1), or does not decrease strictly.
    """

    alphas_cumprod: tuple[float, ...]

    def __post_init__(self) -> None:
        abar = tuple(float(a) for a in self.alphas_cumprod)
        if not abar or not all(0 <= a < 1 for a in abar) or any(a <= b for a, b in zip(abar, abar[1:])):
            raise BadInput(
                "alphas_cumprod must decrease strictly and lie in [0, 1): pass the alphas_cumprod of a scheduler."
            )
        object.__setattr__(self, "alphas_cumprod", abar)

    @classmethod
    def of(cls, schedule: Schedule, steps: int = 1000) -> Table:
        """Any schedule as a table of `steps`, rescaled to alpha^2 + sigma^2 = 1: alpha-bar = alpha^2 / (alpha^2 + sigma^2).

        A stock DDIM scheduler with the corresponding betas serves a model trained on this table.
        """
        t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        alpha, sigma = schedule(t)
        return cls(tuple((alpha**2 / (alpha**2 + sigma**2)).tolist()))

    def _interpolate(self, t: Tensor, complement: bool) -> tuple[Tensor, Tensor]:
        """phi, or its complement pi/2 - phi, and the derivative in t."""
        nodes = _table_angles(self.alphas_cumprod, t.dtype, t.device)[int(complement)]
        steps = len(self.alphas_cumprod)
        n = (t.detach() * steps).long().clamp(0, steps - 1)
        rise = nodes[n + 1] - nodes[n]
        return nodes[n] + (t * steps - n) * rise, steps * rise

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(self._interpolate(at_least_float32(t), True)[0])

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self._interpolate(at_least_float32(t), False)[0])

    def d_alpha(self, t: Tensor) -> Tensor:
        phi, d_phi = self._interpolate(at_least_float32(t), False)
        return -torch.sin(phi) * d_phi

    def d_sigma(self, t: Tensor) -> Tensor:
        psi, d_psi = self._interpolate(at_least_float32(t), True)
        return -torch.sin(psi) * d_psi

    def time(self, log_snr: Tensor) -> Tensor:
        angle = torch.atan(torch.exp(-at_least_float32(log_snr) / 2))
        phi, _ = _table_angles(self.alphas_cumprod, angle.dtype, angle.device)
        n = torch.searchsorted(phi, angle.detach()).clamp(1, len(phi) - 1) - 1
        return ((n + (angle - phi[n]) / (phi[n + 1] - phi[n])) / (len(phi) - 1)).clamp(0, 1)


@lru_cache(maxsize=64)
def _table_angles(abar: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """atan2(sigma, alpha) and its complement at the N + 1 nodes of a Table; one starts, the other may end, exactly at 0."""
    alpha = torch.tensor((1.0, *abar), dtype=torch.float64).sqrt()
    sigma = (1 - alpha**2).sqrt()
    phi, complement = torch.atan2(sigma, alpha), torch.atan2(alpha, sigma)
    return phi.to(device=device, dtype=dtype), complement.to(device=device, dtype=dtype)

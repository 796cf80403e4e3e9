"""Exact denoisers of Gaussian and Gaussian-mixture data, for toys and tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from distill.denoise.denoiser import Denoiser
from distill.errors import BadInput
from distill.noise import Schedule, at_least_float32

Values = float | Sequence[float] | Sequence[Sequence[float]] | Tensor


class Gaussian(Denoiser):
    r"""The exact denoiser of x ~ N(mean, diag(std^2)). With v_t^2 = alpha_t^2 std^2 + sigma_t^2,

    E[x | x_t] = mean + alpha_t std^2 / v_t^2 (x_t - alpha_t mean).

    Args:
        mean: of the shape of one sample, (D,) or (C, H, W).
        std: a positive number, or one per coordinate.
        schedule: the noise schedule.

    Raises:
        BadInput: if a std is not positive.

    Examples:
        >>> from distill.noise import RectifiedFlow
        >>> denoiser = Gaussian([1.0, -1.0], 0.5, RectifiedFlow())
        >>> denoiser(torch.zeros(1, 2), torch.ones(1))  # pure noise: the mean
        tensor([[ 1., -1.]])
        >>> denoiser.flow_map(torch.zeros(1, 2), torch.ones(1), torch.zeros(1))
        tensor([[ 1., -1.]])
    """

    mean: Tensor
    std: Tensor

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

    def native(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x_t = at_least_float32(x_t)
        alpha_t, _ = self.schedule.at(t, x_t)
        m_t, v_t = self._marginal(x_t, t)
        return (self.mean + alpha_t * (self.std / v_t) ** 2 * (x_t - m_t)).to(x_t.dtype)

    def log_prob(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """log p_t(x_t) (B,)."""
        m_t, v_t = self._marginal(x_t, t)
        return _log_normal(x_t, m_t, v_t).flatten(1).sum(1)

    def flow_map(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact probability-flow solution x_s = alpha_s mean + v_s / v_t (x_t - alpha_t mean)."""
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

    Raises:
        BadInput: if `means` is not (K, D), or a std or weight is not positive.

    Examples:
        >>> from distill.noise import RectifiedFlow
        >>> mixture = GaussianMixture([[-1.0], [1.0]], 0.1, weights=[1, 3], schedule=RectifiedFlow())
        >>> x_t, t = torch.zeros(2, 1), torch.ones(2)
        >>> mixture(x_t, t, label=torch.tensor([-1, 0]))  # at pure noise: the mean of the mixture, and of component 0
        tensor([[ 0.5000],
                [-1.0000]])
        >>> x, label = mixture.sample(5, torch.Generator().manual_seed(0))
        >>> x.shape, label.shape
        (torch.Size([5, 1]), torch.Size([5]))
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor

    def __init__(self, means: Values, stds: Values, weights: Values | None = None, *, schedule: Schedule):
        super().__init__(None, schedule, "x")
        means = torch.as_tensor(means, dtype=torch.float64)
        if means.ndim != 2:
            raise BadInput(
                f"GaussianMixture: means must have the shape (K, D), one row per component, got {tuple(means.shape)}."
            )
        weights = _positive(1.0 if weights is None else weights, "weights").expand(len(means))
        self.register_buffer("means", means)
        self.register_buffer("stds", _positive(stds).expand(len(means)).clone())
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    @classmethod
    def ring(cls, modes: int = 6, radius: float = 1.0, std: float = 0.1, *, schedule: Schedule) -> GaussianMixture:
        """Modes of equal weight on a circle in the plane; component k is at the angle 2 pi k / modes."""
        angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
        return cls(radius * torch.stack([angle.cos(), angle.sin()], 1), std, schedule=schedule)

    def _components(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha_t (B, 1, 1), x_t - alpha_t means (B, K, D) and the variances v^2 (B, K, 1)."""
        alpha_t, sigma_t = self.schedule.at(t, x_t[:, None])
        means, stds = self.means.to(alpha_t.dtype), self.stds.to(alpha_t.dtype)[:, None]
        return alpha_t, x_t[:, None] - alpha_t * means, (alpha_t * stds) ** 2 + sigma_t**2

    def _log_prior(self, n: int, label: Tensor | None) -> Tensor:
        """Log weights (n, K): those of the mixture where the label is -1, else one-hot at the labelled component."""
        prior = self.log_weights.expand(n, -1)
        if label is None:
            return prior
        index = torch.arange(len(self.means), device=label.device)
        one_hot = torch.where(label[:, None] == index, 0.0, -torch.inf)
        return torch.where(label[:, None] < 0, prior, one_hot.to(prior))

    def _log_joint(self, away: Tensor, var: Tensor, label: Tensor | None) -> Tensor:
        """log weights_k + log N(x_t; alpha_t means_k, v_k^2 I), (B, K)."""
        log_normal = _log_normal(away, 0.0, var.sqrt()).sum(-1)
        return log_normal + self._log_prior(len(away), label).to(log_normal.dtype)

    def native(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x_t = at_least_float32(x_t)
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
        """The exact probability-flow solution in one dimension, by quantiles: x_s = Q_s(CDF_t(x_t)), for x_t (B, 1).

        Solved by bisection in float64. The logarithms of the smaller tails are compared, so that far tails are exact.

        Raises:
            BadInput: if the mixture has more than one dimension.
        """
        if self.means.shape[1] != 1:
            raise BadInput("GaussianMixture.flow_map needs one-dimensional data: give means of shape (K, 1).")
        x, t, s = x_t.double(), t.double(), s.double()
        lower, upper = self._log_tails(x, t, label)
        left, target = lower < upper, torch.minimum(lower, upper)
        _, away, var = self._components(torch.zeros_like(x), s)
        centre, reach = -away.squeeze(-1), 40 * var.squeeze(-1).sqrt()
        lo, hi = (centre - reach).amin(1, keepdim=True), (centre + reach).amax(1, keepdim=True)
        for _ in range(70):
            y = (lo + hi) / 2
            lower, upper = self._log_tails(y, s, label)
            too_low = torch.where(left, lower < target, upper > target)[:, None]
            lo, hi = torch.where(too_low, y, lo), torch.where(too_low, hi, y)
        return ((lo + hi) / 2).to(x_t.dtype)

    def _log_tails(self, x: Tensor, t: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """log P(X_t < x) and log P(X_t > x), each (B,), for x (B, 1)."""
        _, away, var = self._components(x, t)
        z, prior = (away / var.sqrt()).squeeze(-1), self._log_prior(len(x), label)
        return (prior + torch.special.log_ndtr(z)).logsumexp(-1), (prior + torch.special.log_ndtr(-z)).logsumexp(-1)

    def sample(
        self, n: int, generator: Generator | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """n samples x (n, D) and the components they came from (n,)."""
        device = self.means.device
        u = _randn((n, self.means.shape[1]), generator, dtype, device)
        weights = self.log_weights.exp().to(generator.device if generator is not None else device)
        label = torch.multinomial(weights, n, replacement=True, generator=generator).to(device)
        return (self.means[label] + self.stds[label, None] * u).to(u.dtype), label


def _positive(value: Values, name: str = "std") -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if not (tensor > 0).all():
        raise BadInput(f"{name} must be positive, got {tensor.tolist()}.")
    return tensor


def _log_normal(x: Tensor, mean: Tensor | float, std: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)


def _randn(
    shape: tuple[int, ...], generator: Generator | None, dtype: torch.dtype | None, device: torch.device
) -> Tensor:
    draw_device = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=draw_device, dtype=dtype).to(device)

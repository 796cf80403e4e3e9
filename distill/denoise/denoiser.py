"""Denoisers of networks, guidance, and denoisers under another schedule. Prediction types are converted only here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.denoise.network import Conditions, Network, as_network
from distill.errors import BadInput, suggest
from distill.noise import Schedule, at_least_float32, bcast, safe_divide

PREDICTIONS = ("eps", "x", "v", "flow", "edm")


class Denoiser(nn.Module):
    r"""E[x | x_t] from a network `net(x_in, t, **cond)` with x_t = alpha_t x + sigma_t z.

    prediction    the network's output
    "eps"         z                                      https://arxiv.org/abs/2006.11239
    "x"           x
    "v"           alpha_t z - sigma_t x                  https://arxiv.org/abs/2202.00512
    "flow"        z - x                                  https://arxiv.org/abs/2209.03003
    "edm"         F with x = c_skip x_t + c_out F(c_in x_t), https://arxiv.org/abs/2206.00364, in the coordinates
                  x_t / alpha_t where the noise has standard deviation sigma_t / alpha_t

    The network is called with t in float32 or float64 and with x_in in the dtype of its weights. Everything else is
    computed in float32 or float64.

    Args:
        net: the backbone; a `Network`, or any module with some of its attributes.
        schedule: the noise schedule under which it was trained.
        prediction: one of the names above.
        sigma_data: standard deviation of the data, for "edm" only.

    Raises:
        BadInput: if the prediction is unknown, or is "eps" under a schedule with alpha_1 = 0, where eps at t = 1 does
            not determine x.

    Examples:
        >>> import torch
        >>> from distill.denoise import Denoiser
        >>> from distill.models.small import MLP
        >>> from distill.noise import RectifiedFlow
        >>> denoiser = Denoiser(MLP(dim=2, width=8, classes=3), RectifiedFlow(), prediction="flow")
        >>> x_t, t = torch.randn(4, 2), torch.full((4,), 0.5)
        >>> x = denoiser(x_t, t, label=torch.tensor([0, 1, 2, -1]))
        >>> x.shape
        torch.Size([4, 2])
        >>> flow = denoiser.native(x_t, t, label=torch.tensor([0, 1, 2, -1]))
        >>> torch.allclose(x, x_t - 0.5 * flow)
        True
    """

    net: nn.Module | None
    schedule: Schedule

    def __init__(self, net: nn.Module | None, schedule: Schedule, prediction: str = "flow", sigma_data: float = 1.0):
        super().__init__()
        if prediction not in PREDICTIONS:
            hint = suggest(prediction, PREDICTIONS)
            raise BadInput(f"prediction '{prediction}' must be one of {', '.join(PREDICTIONS)}.{hint}")
        if prediction == "eps" and schedule.zero_terminal_snr:
            raise BadInput(
                f"prediction 'eps' cannot be used with {type(schedule).__name__}, a schedule of zero terminal SNR (alpha "
                "is 0 at t = 1): set prediction to 'v', 'flow' or 'x' if the network was trained so, or choose a "
                "schedule with alpha_1 > 0."
            )
        self.net, self.schedule, self.prediction, self.sigma_data = net, schedule, prediction, sigma_data

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """E[x | x_t] (B, ...) for x_t (B, ...) and t (B,)."""
        return self.to_x(self.native(x_t, t, **cond), x_t, t)

    def native(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The network's output (B, ...), of the type named by `prediction`."""
        if self.net is None:
            raise NotImplementedError(f"{type(self).__name__} has no network and does not define `native`.")
        t = at_least_float32(t)
        x_in = x_t
        if self.prediction == "edm":
            x_in = at_least_float32(x_t) / self._edm(x_t, t)[2]
        weights = as_network(self.net).base.parameters()  # an adapter's own may be of another dtype
        dtype = next((p.dtype for p in weights if p.is_floating_point()), x_t.dtype)
        return self.net(x_in.to(dtype), t, **cond)

    def to_x(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x (B, ...) from the native output at x_t."""
        out, x_t = at_least_float32(out), at_least_float32(x_t)
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
        """The native output that corresponds to x (B, ...) at x_t; at t = 0, where z is undetermined, that of z = 0."""
        x, x_t = at_least_float32(x), at_least_float32(x_t)
        alpha_t, sigma_t = self.schedule.at(t, x_t)
        if self.prediction == "x":
            return x
        z = safe_divide(x_t - alpha_t * x, sigma_t)
        if self.prediction == "eps":
            return z
        if self.prediction == "v":
            return alpha_t * z - sigma_t * x
        if self.prediction == "flow":
            return z - x
        skip, c_out, _ = self._edm(x_t, t)
        return safe_divide(x - skip * x_t, c_out)

    def _edm(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip / alpha, c_out, alpha / c_in), in a form that is finite at alpha = 0."""
        alpha_t, sigma_t = self.schedule.at(t, x_t)
        scale = (sigma_t**2 + (alpha_t * self.sigma_data) ** 2).sqrt()
        return alpha_t * (self.sigma_data / scale) ** 2, sigma_t * self.sigma_data / scale, scale

    def null(self, cond: Conditions) -> Conditions:
        """`cond` with the null condition of the network; without a network, "label" becomes -1, "no class"."""
        return network_of(self).null(cond)

    def drop(self, cond: Conditions, mask: Tensor) -> Conditions:
        """`cond` with the null condition where `mask` (B,) is true, for training with condition dropout."""
        null = self.null(cond)
        return {k: torch.where(bcast(mask, v), null[k], v) if torch.is_tensor(v) else v for k, v in cond.items()}

    def with_schedule(self, schedule: Schedule) -> Denoiser:
        """The same model, with shared weights, for x_t of another schedule."""
        return Rescheduled(self, schedule)


class Rescheduled(Denoiser):
    r"""A denoiser for x_t of another schedule: D'(x_t, t) = D(c x_t, t').

    t' is the denoiser's time of equal log-SNR and c^2 = (alpha'^2 + sigma'^2) / (alpha^2 + sigma^2), with alpha, sigma
    the coefficients at t and alpha', sigma' those at t'. Log-SNRs outside the denoiser's range are clamped to it.

    Args:
        denoiser: the Denoiser to adapt; the weights are shared.
        schedule: the schedule of x_t.
    """

    denoiser: Denoiser

    def __init__(self, denoiser: Denoiser, schedule: Schedule):
        super().__init__(None, schedule, "x")
        self.denoiser = denoiser

    def native(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        inner = self.denoiser.schedule
        t_inner = inner.time(self.schedule.log_snr(t))
        (alpha, sigma), (alpha_inner, sigma_inner) = self.schedule(t), inner(t_inner)
        c = ((alpha_inner**2 + sigma_inner**2) / (alpha**2 + sigma**2)).sqrt()
        return self.denoiser(bcast(c, x_t) * x_t, t_inner, **cond)

    def null(self, cond: Conditions) -> Conditions:
        return self.denoiser.null(cond)


class Guided(Denoiser):
    r"""Classifier-free guidance: D_w = D(x_t, null) + w (D(x_t, cond) - D(x_t, null)).

    w = 0 is unconditional and w = 1 conditional. w = 1 costs one evaluation; any other w costs two, in one batch of 2B.
    A network with the input `w` (`Network.guided`) is evaluated once, with w.
    Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598; the w of the paper is this w minus 1.

    Args:
        denoiser: the Denoiser to guide.
        w: the guidance scale, a number or one per sample (B,); `forward(..., w=)` overrides it.

    Examples:
        >>> import torch
        >>> from distill.denoise import GaussianMixture, Guided
        >>> from distill.noise import RectifiedFlow
        >>> denoiser = GaussianMixture([[-1.0], [1.0]], 0.1, schedule=RectifiedFlow())  # label 0: -1, label 1: +1
        >>> x_t, t, label = torch.zeros(1, 1), torch.ones(1), torch.tensor([1])
        >>> [round(Guided(denoiser, w)(x_t, t, label=label).item(), 2) for w in (0.0, 1.0, 2.0)]
        [0.0, 1.0, 2.0]
    """

    denoiser: Denoiser

    def __init__(self, denoiser: Denoiser, w: float | Tensor = 1.0):
        super().__init__(None, denoiser.schedule, "x")
        self.denoiser, self.w = denoiser, w

    def native(self, x_t: Tensor, t: Tensor, w: float | Tensor | None = None, **cond: Any) -> Tensor:
        w = self.w if w is None else w
        if network_of(self.denoiser).guided:
            return self.denoiser(x_t, t, w=w, **cond)
        if not torch.is_tensor(w) and w == 1:
            return self.denoiser(x_t, t, **cond)
        null = self.null(cond)
        both = {k: torch.cat([null[k], v]) if torch.is_tensor(v) else v for k, v in cond.items()}
        x_null, x_cond = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), **both).chunk(2)
        scale = bcast(w.to(x_cond), x_cond) if torch.is_tensor(w) else w
        return x_null + scale * (x_cond - x_null)

    def null(self, cond: Conditions) -> Conditions:
        return self.denoiser.null(cond)


def network_of(role: nn.Module | None) -> Network:
    """The network of a role: that of a Denoiser or of the denoiser it wraps; a default Network if it has none."""
    while isinstance(role, (Guided, Rescheduled)):
        role = role.denoiser
    net = role.net if isinstance(role, Denoiser) else None
    return as_network(net)


def has_network(role: nn.Module | None) -> bool:
    """Whether a role is a Denoiser that has a network itself (not a wrapper, not an exact denoiser)."""
    return isinstance(role, Denoiser) and role.net is not None

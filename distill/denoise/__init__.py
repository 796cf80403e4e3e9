r"""Denoisers: (x_t, t) -> E[x | x_t] for networks of any prediction type, guidance, and exact denoisers.

Examples:
    >>> import torch
    >>> from distill.denoise import Gaussian
    >>> from distill.noise import RectifiedFlow
    >>> exact = Gaussian([0.0], 1.0, schedule=RectifiedFlow())  # x ~ N(0, 1)
    >>> exact(torch.ones(1, 1), torch.full((1,), 0.5)).item()  # E[x | x_t] = alpha x_t / (alpha^2 + sigma^2)
    1.0
"""

from distill.denoise.denoiser import PREDICTIONS, Denoiser, Guided, Rescheduled, has_network, network_of
from distill.denoise.exact import Gaussian, GaussianMixture
from distill.denoise.network import PROTOCOL, Conditions, Delegate, Foreign, Network, as_network

__all__ = [
    "Conditions",
    "Delegate",
    "Denoiser",
    "Foreign",
    "Gaussian",
    "GaussianMixture",
    "Guided",
    "Network",
    "PREDICTIONS",
    "PROTOCOL",
    "Rescheduled",
    "as_network",
    "has_network",
    "network_of",
]

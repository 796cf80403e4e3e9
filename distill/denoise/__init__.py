r"""Denoisers: (x_t, t) -> E[x | x_t] for networks of any prediction type, guidance, and exact denoisers."""

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

"""Evaluation: metrics on tensors, baselines of ODE solvers on the teacher at equal cost, pictures, and the table of a run.

Examples:
    >>> import torch
    >>> from distill.metrics import frechet
    >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    >>> round(float(frechet(x, x + 1)), 3)  # |shift|^2
    2.0
"""

from distill.metrics.distances import (
    Accuracy,
    energy_distance,
    frechet,
    kl,
    map_kl,
    mode_kl,
    mode_masses,
    nll_gap,
    precision_recall,
    squared_mmd,
    wasserstein1d,
)
from distill.metrics.training_free import Counted, baseline

__all__ = [
    "Accuracy",
    "Counted",
    "baseline",
    "energy_distance",
    "frechet",
    "kl",
    "map_kl",
    "squared_mmd",
    "mode_kl",
    "mode_masses",
    "nll_gap",
    "precision_recall",
    "wasserstein1d",
]

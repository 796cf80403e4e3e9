"""Evaluation: metrics on tensors, training-free baselines at equal cost, pictures, and the table of a run."""

from distill.metrics.distances import (
    Accuracy,
    energy_distance,
    frechet,
    kl,
    map_kl,
    mmd,
    mode_kl,
    mode_masses,
    nll_gap,
    precision_recall,
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
    "mmd",
    "mode_kl",
    "mode_masses",
    "nll_gap",
    "precision_recall",
    "wasserstein1d",
]

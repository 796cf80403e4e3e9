"""Evaluation: metrics on tensors, training-free baselines at equal cost, pictures, and the table of a run."""

from distill.eval.baselines import Counted, baseline, evaluate
from distill.eval.metrics import (
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

__all__ = [
    "Accuracy", "Counted", "baseline", "energy_distance", "evaluate", "frechet", "kl", "map_kl", "mmd", "mode_kl",
    "mode_masses", "nll_gap", "precision_recall", "wasserstein1d",
]  # fmt: skip

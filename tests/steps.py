"""What each step of a renoising student makes, and all of them together: python tests/steps.py RUN.

Frechet distance to the training data, precision, recall, and the sum of the variances, of 4,000 samples.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from distill.metrics.distances import frechet, precision_recall
from distill.training.load import load_experiment

BATCH = 500


@torch.no_grad()
def steps(folder: Path, samples: int = 4000) -> dict[str, torch.Tensor]:
    """Name -> the student's estimates of the data (samples, d), each step's and a mixture of equal parts."""
    experiment = load_experiment(folder)
    method, (x, cond), found = experiment.method, experiment.noise(samples, experiment.cfg.eval.seed), {}
    torch.manual_seed(0)
    for k, time in enumerate(method.grid.times[:-1]):
        t = torch.full((samples,), time)
        x_t = method.ema.schedule.add_noise(x, t, torch.randn_like(x)) if k else method.ema.schedule.start(x)
        rows = [{key: value[i : i + BATCH] for key, value in cond.items()} for i in range(0, samples, BATCH)]
        x = torch.cat(
            [method.ema(*part, **conditions) for *part, conditions in zip(x_t.split(BATCH), t.split(BATCH), rows)]
        )
        found[f"t = {time:g}"] = x.flatten(1)
    whole = list(found.values())
    return found | {
        "all steps": torch.cat([x[k :: len(whole)] for k, x in enumerate(whole)]),
        "data": experiment.data.all()["x"].flatten(1),
    }


if __name__ == "__main__":
    laws = steps(Path(sys.argv[1]))
    for name, x in laws.items():
        near = precision_recall(x, laws["data"])
        print(
            f"{name}: FD {frechet(x, laws['data']):.3f}, precision {near[0]:.3f}, recall {near[1]:.3f}, "
            f"variance {x.var(0).sum().item():.2f}"
        )

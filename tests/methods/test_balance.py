"""A head's weight over three decades: with `balance: auto` the toy converges at all of them, without it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill import config
from distill.inspect.measure import toy_scores
from distill.training.experiment import build_experiment

SMALL = (
    "log.wandb=disabled",
    "train.threads=1",
    "train.steps=900",
    "method.warm_start=200",
    "data.batch_size=128",
    "roles.student.net.width=64",
    "method.grid=1",
    "method.student_every=1",
)


def distances(weight: float, balance: str) -> dict[str, float]:
    """One-step DMD2 with a head on the six-mode ring, seed 0."""
    recipe = Path(__file__).parents[2] / "configs" / "toy" / "dmd2.yaml"
    experiment = build_experiment(
        config.load([recipe], [*SMALL, f"method.adversarial={weight}", f"method.balance={balance}"])
    )
    method = experiment.method
    method.configure_optimizers()
    method.total_steps = 900
    for batch in experiment.data.loader():
        if method.step == 900:
            return toy_scores(experiment)
        method.training_step(batch)


@pytest.mark.slow
@pytest.mark.parametrize("weight, balance, converges", [(30, "false", False), (30, "auto", True), (0.03, "auto", True)])
def test_the_toy_converges_at_any_weight_of_the_head_with_auto_and_not_without(weight, balance, converges):
    """Weights of 0.1 and more are one run under `auto`, bit for bit (tests/losses/test_adversarial.py)."""
    assert (distances(weight, balance)["energy"] <= 0.009) == converges

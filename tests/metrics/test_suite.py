"""What is measured for images and for toys, on samples whose scores are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill import config
from distill.denoise import Gaussian, GaussianMixture
from distill.errors import BadInput
from distill.metrics import suite
from distill.noise import RectifiedFlow
from distill.training.experiment import build_experiment

TOY = Path(__file__).parents[2] / "configs" / "toy" / "tdm.yaml"

RING = {"modes": 6, "radius": 1.5, "std": 0.15, "schedule": RectifiedFlow()}


def pictures(n: int, seed: int, label: torch.Tensor) -> torch.Tensor:
    """Two classes of 1x4x4 images: dark above, or dark below, with a little noise."""
    x = torch.full((n, 1, 4, 4), -0.5)
    x[label == 0, :, :2], x[label == 1, :, 2:] = 0.5, 0.5
    return x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def images():
    label = torch.arange(120) % 2
    return suite.ImageSuite(pictures(120, 0, label), label, pictures(80, 1, torch.arange(80) % 2))


def test_the_reference_itself_scores_perfectly(images):
    scores = images.score(images.x, {"label": images.label})
    assert scores["fd"] == pytest.approx(0, abs=1e-8) and scores["accuracy"] == 1
    assert scores["precision"] == scores["recall"] == 1 and abs(scores["mmd"]) < 0.05


def test_a_shift_costs_its_square_and_wrong_classes_cost_accuracy(images):
    shifted = images.score(images.x + 0.25, {}, quick=True)
    assert shifted == {"fd": pytest.approx(16 * 0.25**2, rel=1e-5)}
    wrong = images.score(images.x, {"label": torch.where(torch.arange(120) < 30, 1 - images.label, images.label)})
    assert wrong["accuracy"] == pytest.approx(0.75)


def test_noise_has_no_precision_and_one_class_loses_recall(images):
    noise = torch.randn(120, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    scores = images.score(noise, {})
    assert scores["precision"] < 0.05 and scores["fd"] > 1 and "accuracy" not in scores
    half = images.score(pictures(120, 4, torch.zeros(120, dtype=torch.long)), {})
    assert half["recall"] <= 0.55 < half["precision"] and half["mmd"] > 0.05


def test_labels_that_no_classifier_can_be_fitted_on_leave_accuracy_out(images):
    long_tailed = torch.where(torch.arange(120) == 0, 7, images.label)  # one sample of class 7
    scores = suite.ImageSuite(images.x, long_tailed).score(images.x, {"label": long_tailed}, quick=True)
    assert scores["accuracy"] == 1
    for label in (torch.zeros(120).long(), torch.arange(120)):  # one class; a class for each sample
        assert set(suite.ImageSuite(images.x, label).score(images.x, {"label": label}, quick=True)) == {"fd"}


def test_quick_leaves_out_what_needs_all_pairs(images):
    quick = images.score(images.x, {"label": images.label}, quick=True)
    full = images.score(images.x, {"label": images.label})
    assert set(quick) == {"fd", "accuracy"} and set(full) == {*quick, "mmd", "precision", "recall"}
    assert full["fd"] == quick["fd"] and images.headline in quick


def test_reference_vs_holdout_is_between_the_two_real_splits(images):
    assert 0 < images.reference_vs_holdout()["fd"] < 0.1
    assert suite.ImageSuite(images.x).reference_vs_holdout() == {}
    unlabelled = suite.ImageSuite(images.x).score(images.x, {"label": images.label}, quick=True)
    assert set(unlabelled) == {"fd"}


def test_what_a_method_ranks_by_is_scored_too(images):
    bold = suite.ImageSuite(images.x, reward=lambda x, label=None: x.flatten(1).mean(1) + label)
    found = bold.score(images.x + 0.25, {"label": images.label}, quick=True)
    assert found["reward"] == pytest.approx(float(images.x.mean()) + 0.25 + 0.5, abs=1e-5)


def test_exact_samples_of_a_toy_score_as_other_samples_of_its_law():
    law = GaussianMixture.ring(**RING)
    tests = suite.ToySuite(law)
    x, _ = law.sample(3000, generator=torch.Generator().manual_seed(7))
    scores = tests.score(x, {})
    assert abs(scores["energy"]) < 0.005 and abs(tests.reference_vs_holdout()["energy"]) < 0.005
    assert abs(scores["nll_gap"]) < 0.1 and scores["mode_kl"] < 0.01
    assert set(tests.score(x, {}, quick=True)) == {"energy"} and tests.headline == "energy"
    assert suite.ToySuite(law).score(x, {}, quick=True) == tests.score(
        x, {}, quick=True
    )  # the same reference each time


def test_metrics_of_images_are_refused_for_a_toy():
    cfg = config.load([TOY], ["eval.metrics=[fid, mmd]"])
    with pytest.raises(BadInput, match=r"^eval\.metrics: fid, mmd cannot be computed .*: leave eval\.metrics out\.$"):
        build_experiment(cfg).suite()


def test_a_lost_mode_and_a_shift_are_seen():
    law = GaussianMixture.ring(**RING)
    tests = suite.ToySuite(law)
    x, label = law.sample(3000, generator=torch.Generator().manual_seed(7))
    lost = tests.score(x[label != 0], {})
    assert lost["energy"] > 0.01 and lost["mode_kl"] > 0.5 and abs(lost["nll_gap"]) < 0.1
    wide = tests.score(x + 0.15 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), {})
    assert wide["nll_gap"] > 0.5
    far = suite.ToySuite(Gaussian([0.0, 0.0], 1.0, RectifiedFlow())).score(torch.full((500, 2), 100.0), {}, quick=True)
    assert far["energy"] == pytest.approx(2 * 100 * 2**0.5, rel=0.03)  # twice the distance, less E|y - y'|


def test_the_map_error_is_relative_to_the_datas_deviation():
    law = Gaussian([0.5], 2.0, RectifiedFlow())
    tests = suite.ToySuite(law)
    z = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    exact = 0.5 + 2 * z  # a Gaussian's flow keeps the quantile
    assert tests.map_error(z, exact) < 1e-4
    assert tests.map_error(z, exact + 1) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("kind", ["images", "plane", "line"])
def test_each_kind_has_its_picture(tmp_path, images, kind):
    if kind == "images":
        tests, x = images, images.x[:20]
    else:
        law = GaussianMixture.ring(**RING) if kind == "plane" else Gaussian([0.0], 1.0, RectifiedFlow())
        tests, x = suite.ToySuite(law, samples=200), law.sample(100)[0]
    tests.picture({"a title": x}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"

"""Metrics by name against independent implementations on the same features, and what is refused."""

from __future__ import annotations

import looks
import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from distill.errors import BadInput
from distill.metrics import distances, features, named, suite, table

SHRINK = {"_target_": "looks.Shrink"}  # 12 features
OURS = {
    "fd_own": {"features": SHRINK},
    "kd_own": {"features": SHRINK},
    "precision": {"features": SHRINK},
    "recall": {"features": SHRINK},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    features._built.clear()
    return tmp_path / "cache"


@pytest.fixture
def sets():
    return looks.pictures(150, 0, 8, shift=0.2), looks.pictures(120, 1, 8)


def measure(asked, x, real, cond=None, **kw):
    seen = named.Measures(named.settings(asked), features.ImageSet(real), allow=("looks", "test_named"), device="cpu")
    return seen.score(lambda: features.batches(x, 50), cond, **kw)


def test_distances_are_those_of_scipy_and_scikit_learn_on_the_same_features(sets):
    found = measure(OURS, *sets)
    x, y = (looks.Shrink()(part).double().numpy() for part in sets)
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    fid = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root)
    assert found["fd_own"] == pytest.approx(fid, rel=1e-5)

    kernel = lambda a, b: polynomial_kernel(a, b, degree=3, gamma=1 / 12, coef0=1)  # noqa: E731
    within = lambda a: (kernel(a, a).sum() - np.trace(kernel(a, a))) / (len(a) * (len(a) - 1))  # noqa: E731
    assert found["kd_own"] == pytest.approx(within(x) + within(y) - 2 * kernel(x, y).mean(), rel=1e-4)

    def covered(a, b):
        radius = NearestNeighbors(n_neighbors=4).fit(b).kneighbors(b)[0][:, -1]  # the first neighbour is itself
        return float((np.linalg.norm(a[:, None] - b[None], axis=2) <= radius).any(1).mean())

    assert found["precision"] == pytest.approx(covered(x, y)) and found["recall"] == pytest.approx(covered(y, x))
    assert 0 < found["precision"] < 1


def test_the_names_of_papers_use_their_networks(sets, tmp_path):
    weights = looks.dinov2(tmp_path / "dino")
    found = measure({"fd_dinov2": {"weights": weights, "side": 28}, "kd_dinov2": {}}, *sets)  # told once
    from distill.metrics.networks.vision import Dinov2

    x, y = (Dinov2(weights, side=28)(part) for part in sets)
    assert found == {
        "fd_dinov2": pytest.approx(distances.frechet(x, y), rel=1e-4),
        "kd_dinov2": pytest.approx(distances.squared_mmd(x, y), rel=1e-3),
    }
    assert named.FEATURES == {"fid": "inception", "kid": "inception", "fd_dinov2": "dinov2", "kd_dinov2": "dinov2"}


def test_fid_looks_through_inception(tmp_path, monkeypatch):
    class Detector(torch.nn.Module):
        """StyleGAN's in small."""

        def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(img.to(torch.float32) / 255, 2).flatten(1)

    torch.jit.script(Detector()).save(str(tmp_path / "inception.pt"))
    x, y = looks.pictures(60, 0), looks.pictures(60, 1)
    found = measure({"fid": {"weights": str(tmp_path / "inception.pt")}, "kid": None}, x, y)
    a, b = (((part + 1) * 127.5).round().clamp(0, 255) / 255 for part in (x, y))
    a, b = (torch.nn.functional.adaptive_avg_pool2d(part, 2).flatten(1) for part in (a, b))
    assert found == {
        "fid": pytest.approx(distances.frechet(a, b), rel=1e-5),
        "kid": pytest.approx(distances.squared_mmd(a, b), rel=1e-4),
    }


def test_scores_of_each_sample_are_averaged_and_get_its_conditions(sets, tmp_path):
    from distill.metrics.rewards import ClipScore

    clip, x = looks.clip(tmp_path / "clip"), sets[0][:70]
    captions = [("a cat", "two dogs", "y")[i % 3] for i in range(70)]
    asked = {
        "clip_score": {"weights": clip},
        "pick_score": {"weights": clip},
        "ink_score": {"_target_": "distill.metrics.rewards.Ink", "grain": 0},
    }
    found = measure(asked, x, sets[1], {"caption": captions, "label": torch.arange(70)})
    assert found["clip_score"] == pytest.approx(float(ClipScore(clip)(x, caption=captions).mean()), rel=1e-5)
    assert found["ink_score"] == pytest.approx(float(x.mean()), rel=1e-5)
    assert found["pick_score"] != found["clip_score"]
    with pytest.raises(BadInput, match="ClipScore needs a caption per sample"):
        measure({"clip_score": {"weights": clip}}, x, sets[1])


def test_real_images_are_looked_at_once(sets, tmp_path, own_cache, monkeypatch):
    asked, looked = {"fd_dinov2": {"weights": looks.dinov2(tmp_path / "dino"), "side": 28}}, []
    from distill.metrics.networks.vision import Dinov2

    stock = Dinov2.__call__
    monkeypatch.setattr(Dinov2, "__call__", lambda self, x: looked.append(len(x)) or stock(self, x))
    first = measure(asked, *sets)
    assert sum(looked) == 150 + 120
    assert measure(asked, *sets) == first and sum(looked) == 2 * 150 + 120
    measure(asked, sets[0], sets[1] * 0.9)  # other images
    assert sum(looked) == 3 * 150 + 2 * 120
    for broken in (own_cache / "features").glob("*.safetensors"):
        broken.write_bytes(b"cut")
    assert measure(asked, *sets) == first and sum(looked) == 4 * 150 + 3 * 120  # a broken file is written anew


def test_published_statistics_stand_for_the_real_images(sets, tmp_path):
    y = looks.Shrink()(sets[1]).double().numpy()
    np.savez(tmp_path / "stats.npz", mu=y.mean(0), sigma=np.cov(y, rowvar=False))
    np.savez(tmp_path / "features.npz", features=y)
    own = measure({"fd_own": {"features": SHRINK}}, *sets)["fd_own"]
    for name in ("stats.npz", "features.npz"):
        asked = {"fd_own": {"features": SHRINK, "reference": str(tmp_path / name)}}
        assert measure(asked, sets[0], torch.zeros(2, 3, 4, 4))["fd_own"] == pytest.approx(own, rel=1e-5)
    with pytest.raises(BadInput, match="kd_own compares features one by one, and .*stats.npz holds their mean and"):
        measure({"kd_own": {"features": SHRINK, "reference": str(tmp_path / "stats.npz")}}, *sets)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(BadInput, match=r"statistics of \(3,\) features and the network gives 12"):
        measure({"fd_own": {"features": SHRINK, "reference": str(tmp_path / "other.npz")}}, *sets)
    np.savez(tmp_path / "none.npz", a=np.zeros(3))
    with pytest.raises(BadInput, match="none.npz holds a; it needs mu and sigma, or features"):
        measure({"fd_own": {"features": SHRINK, "reference": str(tmp_path / "none.npz")}}, *sets)


def test_a_reference_may_be_a_folder_of_images(sets, tmp_path):
    folder = looks.save(tmp_path / "real", sets[1])
    found = measure({"fd_own": {"features": SHRINK, "reference": str(folder)}}, sets[0], sets[0])
    assert found["fd_own"] == pytest.approx(measure({"fd_own": {"features": SHRINK}}, *sets)["fd_own"], rel=1e-2)
    assert named.images_of(folder).key == named.images_of(folder).key


def test_too_few_samples_are_reported_and_one_is_refused(sets):
    with pytest.warns(UserWarning, match="fd_own of 12 samples with 12 features: their covariance is singular"):
        measure({"fd_own": {"features": SHRINK}}, sets[0][:12], sets[1])
    with pytest.raises(BadInput, match="has 1 samples and this metric needs at least 2"):
        measure({"fd_own": {"features": SHRINK}}, sets[0][:1], sets[1])


@pytest.mark.parametrize(
    "asked, text",
    [
        (["fids"], "eval.metrics: 'fids' is none of .* Did you mean 'fid'"),
        ("fid", "is neither a list of names nor a mapping; write"),
        ({"fid": "weights.pth"}, "eval.metrics.fid: expected settings, got 'weights.pth'"),
        ({"kid": {"weight": "a"}}, "Unknown key 'eval.metrics.kid.weight' .* Did you mean 'weights'"),
        ({"fid": {}}, "eval.metrics.fid: weights: FID's Inception was not found; download"),
        ({"fid": {"weights": "/nowhere.pth"}}, "/nowhere.pth does not exist"),
        ({"fd_dinov2": {"weights": "/nowhere"}}, "neither a folder here nor"),
        ({"recall": {"weights": "a"}}, "eval.metrics.recall.weights: recall is of the samples themselves"),
        (
            {"recall": {"features": "dino"}},
            "recall.features: 'dino' is none of inception, dinov2, clip. Did you mean 'dinov2'",
        ),
        ({"recall": {"features": SHRINK, "k": 0}}, "eval.metrics.recall.k: 0 must be a whole number"),
        ({"fd_own": {}}, "'fd_own' is none of"),
        ({"my_score": {}}, "eval.metrics.my_score._target_ is missing"),
        ({"mine": SHRINK}, "'mine' is none of .* name ends in _score or _reward"),
        ({"aesthetic_score": {}}, "Missing key 'eval.metrics.aesthetic_score.head'"),
        (
            {"fd_own": {"features": SHRINK, "reference": "/nowhere"}},
            "eval.metrics.fd_own.reference: /nowhere does not exist",
        ),
    ],
)
def test_settings_are_strict(sets, asked, text):
    with pytest.raises(BadInput, match=text):
        measure(asked, *sets)


def test_a_callable_that_gives_no_number_a_sample_is_named(sets):
    with pytest.raises(BadInput, match=r"my_score gives \(50, 12\) for 50 samples; let it return \(B,\)"):
        measure({"my_score": {"_target_": "test_named.Wide"}}, *sets)


class Wide:
    def __call__(self, x, data=None, **cond):
        return looks.Shrink()(x)


# --- among what a run measures ------------------------------------------------------------------------------------


def images(asked, x, **kw):
    return suite.ImageSuite(x, metrics=asked, allow=("looks",), **kw)


def test_a_run_measures_what_it_names_in_that_order(sets):
    tests = images(
        {
            "kd_own": {"features": SHRINK},
            "fd": {},
            "ink_score": {"_target_": "distill.metrics.rewards.Ink"},
            "recall": {},
            "precision": {"features": SHRINK},
        },
        sets[1],
        held_out=sets[0],
    )
    scores = tests.score(sets[0], {})
    assert list(scores) == ["kd_own", "fd", "ink_score", "recall", "precision"] and tests.headline == "kd_own"
    assert (
        scores["recall"] == distances.precision_recall(*sets)[1]
        and scores["precision"] == measure(OURS, *sets)["precision"]
    )
    assert list(tests.score(sets[0], {}, quick=True)) == ["kd_own", "fd", "ink_score"]
    assert tests.reference_vs_holdout() == {"fd": pytest.approx(distances.frechet(*sets)), "kd_own": scores["kd_own"]}


def test_latents_are_decoded_for_networks_and_pictures_alone(sets, tmp_path):
    decode = lambda x: torch.tanh(x[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3))  # noqa: E731
    latents = [torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (60, 50)]
    tests = images({"fd": {}, "fd_own": {"features": SHRINK}}, latents[1], decode=decode)
    found = tests.score(latents[0], {})
    assert found["fd"] == pytest.approx(distances.frechet(*latents))
    assert found["fd_own"] == pytest.approx(measure({"fd_own": {"features": SHRINK}}, *map(decode, latents))["fd_own"])
    tests.picture({"a title": latents[0][:6]}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 500
    with pytest.raises(BadInput, match=r"samples are \(4, 8, 8\), not images .* eval.decode"):
        images({"fid": {"weights": _tiny(tmp_path)}}, latents[1]).score(latents[0], {})


def test_text_runs_on_latents_are_looked_at_decoded_and_with_their_captions(tmp_path):
    from distill.metrics.latents import LatentSuite
    from distill.metrics.rewards import ClipScore

    def decode(x):
        return torch.tanh(x[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3))

    clip, words = looks.clip(tmp_path / "clip"), ["a cat", "two dogs", "y"]
    x, real = (torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (20, 30))
    asked = {"clip_score": {"weights": clip}, "fd_own": {"features": SHRINK}}
    conditions = [words[i // 2 % 3] for i in range(20)]
    tests = LatentSuite(real, metrics=asked, look=decode, captions=lambda n: conditions[:n], allow=("looks",))
    found = tests.score(x, {}, quick=True)
    assert list(found) == ["latent_fd", "mean", "std", "clip_score", "fd_own"] and tests.headline == "fd_own"
    assert found["clip_score"] == pytest.approx(float(ClipScore(clip)(decode(x), caption=conditions).mean()), rel=1e-4)
    own = measure({"fd_own": {"features": SHRINK}}, decode(x), decode(real))
    assert found["fd_own"] == pytest.approx(own["fd_own"], rel=1e-4)
    plain = LatentSuite(real).score(x, {}, quick=True)
    assert plain == {name: found[name] for name in ("latent_fd", "mean", "std")}
    both = LatentSuite(
        lambda ranks: real, metrics=asked, look=decode, held_out=x, allow=("looks",)
    ).reference_vs_holdout()
    assert both == {"latent_fd": plain["latent_fd"], "fd_own": pytest.approx(found["fd_own"])}
    with pytest.raises(BadInput, match="eval.metrics: mmd of latents is latent_fd and latent_mmd"):
        LatentSuite(real, metrics=["mmd"], look=decode)
    with pytest.raises(BadInput, match="nothing decodes them; name the folder of their autoencoder by eval.decode"):
        LatentSuite(real, metrics=asked)


def _tiny(folder):
    class Detector(torch.nn.Module):
        def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return img.to(torch.float32).mean([2, 3])

    torch.jit.script(Detector()).save(str(folder / "tiny.pt"))
    return str(folder / "tiny.pt")


def test_the_covariance_of_large_samples_is_not_rooted():
    large = torch.randn(6, 3, 40, 40)
    tests = suite.ImageSuite(large)
    assert tests.names == ["accuracy", "mmd", "precision", "recall"] and tests.headline == "mmd"
    assert list(tests.score(large, {}, quick=True)) == ["mmd"] and tests.reference_vs_holdout() == {}
    with pytest.raises(BadInput, match="eval.metrics: samples of 4,800 values are too many for fd"):
        suite.ImageSuite(large, metrics=["fd"])


def test_more_of_a_score_is_better():
    assert table.better("clip_score", 2, 1) and table.better("my_reward", 2, 1) and not table.better("fid", 2, 1)
    text = table.markdown(table.build({4: {"pick_score": 1.0}}, {}, {4: {"pick_score": 2.0}}))
    assert "pick_score ↑, 4 NFE" in text and "**2**" in text

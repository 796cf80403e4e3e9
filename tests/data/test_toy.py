from __future__ import annotations

from itertools import islice

import pytest
import torch

from distill.data.info import check
from distill.data.toy import Conditions, Samples
from distill.errors import BadInput


class Mixture:
    """Two narrow components at -5 and 5."""

    means = torch.tensor([[-5.0, 0.0], [5.0, 0.0]], dtype=torch.float64)

    def sample(self, n, generator=None):
        label = torch.randint(2, (n,), generator=generator)
        return self.means[label] + 0.1 * torch.randn(n, 2, generator=generator, dtype=torch.float64), label


def make(kind):
    return Samples(Mixture(), 16, seed=3) if kind == "samples" else Conditions([1, 8, 8], 10, 16, seed=3)


kinds = pytest.mark.parametrize("kind", ["samples", "conditions"])


def draw(source, n, **where):
    return list(islice(source.loader(**where), n))


def test_samples_are_float32_with_their_labels():
    source = make("samples")
    batch = draw(source, 1)[0]
    assert batch["x"].shape == (16, 2) and batch["x"].dtype == torch.float32 and batch["label"].dtype == torch.int64
    assert torch.equal(batch["x"][:, 0] > 0, batch["label"] == 1)
    assert source.info.shape == (2,) and source.info.classes == 2
    check(source.info, (2,), 2)


def test_labels_can_be_left_out():
    assert set(draw(Samples(Mixture(), 4, classes=0), 1)[0]) == {"x"}


def test_the_exact_mixture_is_a_source():
    from distill.denoise import GaussianMixture
    from distill.noise import RectifiedFlow

    source = Samples(GaussianMixture.ring(6, schedule=RectifiedFlow()), 8)
    assert source.info.shape == (2,) and source.info.classes == 6
    assert draw(source, 1)[0]["label"].max() < 6


def test_conditions_are_labels_and_a_shape():
    source = make("conditions")
    assert source.info.shape == (1, 8, 8) and source.info.classes == 10
    batch = draw(source, 1)[0]
    assert set(batch) == {"label"} and batch["label"].shape == (16,)
    labels = torch.cat([b["label"] for b in draw(source, 200)])
    assert torch.bincount(labels).float().div(len(labels)).sub(0.1).abs().max() < 0.02
    assert (draw(Conditions([2], 0, 4), 1)[0]["label"] == -1).all()


@kinds
def test_batch_n_depends_on_seed_rank_and_n_only(kind):
    source = make(kind)
    key = "x" if kind == "samples" else "label"
    whole = [b[key] for b in draw(source, 12, rank=1, world=2)]
    assert all(map(torch.equal, whole[7:], [b[key] for b in draw(source, 5, rank=1, world=4, start=7)]))
    assert all(map(torch.equal, whole, [b[key] for b in draw(make(kind), 12, rank=1, world=2)]))
    others = [b[key] for r in (0, 2) for b in draw(source, 12, rank=r, world=3)] + [source.all(16)[key]]
    assert not any(torch.equal(a, b) for i, a in enumerate(whole + others) for b in (whole + others)[:i])


@kinds
def test_all_is_fixed_and_leaves_the_global_random_state_alone(kind):
    before = torch.get_rng_state()
    one, two = make(kind).all(50), make(kind).all(50)
    draw(make(kind), 2)
    assert all(torch.equal(one[k], two[k]) and len(one[k]) == 50 for k in one)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_arguments():
    with pytest.raises(BadInput, match="object cannot be sampled"):
        Samples(object(), 4)
    with pytest.raises(BadInput, match="batch_size=0"):
        Conditions([2], 3, 0)
    with pytest.raises(BadInput, match="seed=-1"):
        Samples(Mixture(), 4, seed=-1)

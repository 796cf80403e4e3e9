"""Shares of samples, and numbers that are the same however many processes made them."""

from __future__ import annotations

import looks
import pytest
import torch
import two

from distill.errors import BadInput
from distill.metrics import distances, features, named, suite
from distill.metrics.shares import ALONE, SampleShares, current_shares

SHRINK = {"_target_": "looks.Shrink"}
NETWORKS = {
    "fd": {},
    "recall": {},
    "fd_own": {"features": SHRINK},
    "kd_own": {"features": SHRINK},
    "precision": {"features": SHRINK},
    "bold_score": {"_target_": "distill.metrics.rewards.Ink", "grain": 0},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    features._built.clear()


def test_shares_are_all_rows_in_order():
    for n in (0, 1, 7, 64):
        for world in (1, 2, 3, 8):
            shares = []
            for rank in range(world):
                one = SampleShares()
                one.rank, one.world = rank, world
                shares += range(n)[one.share(n)]
            assert shares == list(range(n))
    assert current_shares() is ALONE and ALONE.from_first(lambda: 3) == 3


def test_two_ranks_gather_in_order_and_share_what_the_first_one_finds():
    def work(rank):
        group = current_shares()
        rows = torch.arange(7.0)[group.share(7)]
        whole, none = group.gather(rows[:, None]), group.gather(rows[:0] if rank == 0 else rows[:1])
        assert group.counts(len(rows)) == [3, 4]
        return *(x if x is None else x.tolist() for x in (whole, none)), group.from_first(lambda: "from " + str(rank))

    first, second = two.ranks(work)
    assert first[0] == [[i] for i in range(7)] and first[1] == [3] and second[:2] == (None, None)
    assert first[2] == second[2] == "from 0"


def test_an_error_on_one_rank_is_raised_on_all_and_leaves_none_waiting():
    def work(rank):
        def fail(when):
            if rank == when:
                raise BadInput(f"rank {when} has no file.")
            return rank

        found = []
        for call, when in (
            (current_shares().from_first, 0),
            (current_shares().on_all, 0),
            (current_shares().on_all, 1),
        ):
            try:
                found.append(call(lambda when=when: fail(when)))
            except BadInput as error:
                found.append(str(error))
        return found

    assert two.ranks(work) == [["rank 0 has no file.", "rank 0 has no file.", "rank 1 has no file."]] * 2


def test_two_ranks_measure_what_one_measures(tmp_path):
    x, y = looks.pictures(91, 0, 8, shift=0.2), looks.pictures(60, 1, 8)
    label = torch.arange(91) % 3

    def score(ranks, rows):
        tests = suite.ImageSuite(y, torch.arange(60) % 3, x[:40], metrics=NETWORKS | {"accuracy": {}}, allow=("looks",))
        return tests.score(x[rows], {"label": label[rows]}, ranks=ranks), tests.reference_vs_holdout(ranks)

    one = score(ALONE, slice(None))
    first, second = two.ranks(lambda rank: score(current_shares(), current_shares().share(91)))
    assert first == second and list(first[0]) == [*NETWORKS, "accuracy"]
    for ours, theirs in zip(first, one):
        assert ours == {name: pytest.approx(value, rel=1e-6) for name, value in theirs.items()}
    assert one[0]["fd"] == distances.frechet(x, y)  # all samples, not a rank's


def test_real_images_are_shared_out_and_cached_by_the_first_rank(tmp_path, monkeypatch):
    from distill.metrics.networks.vision import Dinov2

    asked = {"fd_dinov2": {"weights": looks.dinov2(tmp_path / "dino"), "side": 28}}
    x, y = looks.pictures(30, 0, 8), looks.pictures(21, 1, 8)

    def work(rank, looked=None):
        stock, looked = Dinov2.__call__, []
        monkeypatch.setattr(Dinov2, "__call__", lambda self, x: looked.append(len(x)) or stock(self, x))
        seen = named.Measures(named.settings(asked), features.ImageSet(y), device="cpu")
        rows = current_shares().share(30)
        found = seen.score(lambda: features.batches(x[rows]), ranks=current_shares())
        return found, sum(looked)

    first, second = two.ranks(work)
    assert first[0] == second[0] and (first[1], second[1]) == (15 + 10, 15 + 11)
    one, looked = work(0)
    assert looked == 30 and one == {"fd_dinov2": pytest.approx(first[0]["fd_dinov2"], rel=1e-5)}


def test_a_samplers_nan_on_one_rank_ends_both(tmp_path):
    def work(rank):
        x = looks.pictures(8, rank, 8) * (torch.nan if rank else 1)
        seen = named.Measures({"fd_dinov2": {"weights": folder, "side": 28}}, features.ImageSet(x), device="cpu")
        return seen.score(lambda: features.batches(x), ranks=current_shares())

    folder = looks.dinov2(tmp_path / "dino")
    assert two.ranks(work) == ["BadInput: samples hold NaN or infinite values; check the sampler that made them."] * 2


def test_latents_of_two_ranks_get_their_own_captions():
    from distill.metrics.latents import LatentSuite

    x = torch.randn(9, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    asked = {"letters_score": {"_target_": "test_shares.Letters"}}

    def work(rank):
        tests = LatentSuite(
            x.flip(0),
            metrics=asked,
            look=lambda x: x[:, :3],
            captions=lambda n: ["a" * i for i in range(n)],
            allow=("test_shares",),
        )
        return tests.score(x[current_shares().share(9)], {}, ranks=current_shares())

    one, (first, second) = work(0), two.ranks(work)
    assert first == second == {name: pytest.approx(value) for name, value in one.items()}
    assert one["letters_score"] == pytest.approx(
        float((x[:, :3].clamp(-1, 1).mean((1, 2, 3)) * torch.arange(9)).mean())
    )


class Letters:
    """Brightness times the caption's length: pairs a sample with its words."""

    def __call__(self, x, data=None, **cond):
        return x.mean((1, 2, 3)) * torch.tensor([len(c) for c in cond["caption"]])

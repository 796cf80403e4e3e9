"""Stored pairs: reading returns what was solved, and pairs of another teacher are refused."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from distill.data import prepare
from distill.data.pairs import Pairs, model_fingerprint, write
from distill.denoise import Denoiser, Gaussian
from distill.errors import BadInput
from distill.models.small import MLP
from distill.noise import RectifiedFlow, VPCosine

TEACHER = Gaussian([0.2, -0.1], 0.5, RectifiedFlow())


def endpoint(z, cond):
    one = torch.ones(len(z))
    return TEACHER.flow_map(z, one, 0 * one) + cond.get("label", torch.zeros(len(z)))[:, None]


def ends(z, cond):
    return torch.stack([endpoint(z, cond), z], 1)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "pairs", ends, TEACHER, 50, (2,), classes=3, about="exact", batch=16, per_shard=20)
    return tmp_path / "pairs"


@pytest.mark.parametrize("cache_mb", [256, 0])
def test_batches_hold_the_pairs_that_were_solved(folder, cache_mb):
    data = Pairs(folder / "train", 8, cache_mb=cache_mb, teacher=TEACHER)
    assert data.info.shape == (2,) and data.info.classes == 3 and data.info.count == 50
    batches, again = data.loader(), data.loader(start=2)
    seen = [next(batches) for _ in range(3)]
    for batch in (*seen, data.all()):
        torch.testing.assert_close(batch["x"], endpoint(batch["z"], {"label": batch["label"]}).float())
    for key, value in next(again).items():
        assert torch.equal(value, seen[2][key])
    z = data.all()["z"]
    assert len(z) == 50 and len(z.unique(dim=0)) == 50 and z.std() == pytest.approx(1, abs=0.2)


def test_the_same_seed_gives_the_same_bytes_and_nothing_else_is_left(folder, tmp_path):
    write(tmp_path / "again", ends, TEACHER, 50, (2,), classes=3, about="exact", batch=16, per_shard=20)
    for path in sorted((folder / "train").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / "train" / path.name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "pairs"]


def test_two_processes_write_the_bytes_of_one(folder, tmp_path):
    both = threading.Barrier(2)
    for_rank = lambda rank: write(  # noqa: E731
        tmp_path / "two",
        ends,
        TEACHER,
        50,
        (2,),
        classes=3,
        about="exact",
        batch=16,
        per_shard=20,
        rank=rank,
        world=2,
        barrier=both.wait,
    )
    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(for_rank, range(2))
    assert first.count == 50 and second is None
    for path in sorted((folder / "train").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "train" / path.name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs", "two"]


def test_a_path_is_stored_from_data_to_noise(tmp_path):
    path = lambda z, cond: torch.stack([z * 0, z / 2, z], 1)  # noqa: E731
    write(tmp_path / "paths", path, TEACHER, 20, (2,), times=(0.0, 1 / 3, 1.0))
    batch = next(Pairs(tmp_path / "paths" / "train", 8, teacher=TEACHER).loader())
    assert torch.equal(batch["times"][0], torch.tensor([0.0, 1 / 3, 1.0])) and batch["times"].shape == (8, 3)
    assert torch.equal(batch["path"][:, 1], batch["z"] / 2) and torch.equal(batch["path"][:, 0], batch["x"])


def test_pairs_of_another_teacher_and_plain_shards_are_refused(folder, tmp_path):
    with pytest.raises(BadInput, match="pairs of teacher"):
        Pairs(folder / "train", 8, teacher=Gaussian([0.2, -0.1], 0.6, RectifiedFlow()))
    prepare.digits(tmp_path / "digits")
    with pytest.raises(BadInput, match="holds no pairs but scikit-learn digits"):
        Pairs(tmp_path / "digits" / "train", 8)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(folder, tmp_path):
    with pytest.raises(BadInput, match="exists already"):
        write(folder, ends, TEACHER, 4, (2,))
    with pytest.raises(BadInput, match="1 or more"):
        write(tmp_path / "none", ends, TEACHER, 0, (2,))
    with pytest.raises(BadInput, match="is not finite in pairs 0 to 3"):
        write(tmp_path / "nan", lambda z, cond: ends(z, cond) / 0, TEACHER, 4, (2,), about="euler")
    assert [p.name for p in tmp_path.iterdir()] == ["pairs"]


def test_a_fingerprint_names_weights_schedule_and_prediction():
    net = MLP(dim=2, width=8)
    models = [Denoiser(net, RectifiedFlow()), Denoiser(net, VPCosine()), Denoiser(net, RectifiedFlow(), "v")]
    names = [model_fingerprint(m) for m in models]
    assert len(set(names)) == 3 and names[0] == model_fingerprint(Denoiser(net, RectifiedFlow()))
    next(net.parameters()).data[0] += 1e-3
    assert model_fingerprint(models[0]) != names[0]

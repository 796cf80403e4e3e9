from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from itertools import islice

import numpy as np
import pytest
import torch
from shard_makers import change, members, numbers, tar, tar_member

from distill.data.audit import audit
from distill.data.info import Info, check
from distill.data.prepare import idx
from distill.data.shards.dataset import Shards
from distill.data.shards.write import Split, write_splits
from distill.errors import BadInput

STREAMED = {"cache_mb": 0, "window": 25}
MODES = {"cached": {}, "streamed": STREAMED, "workers": STREAMED | {"workers": 2}}
modes = pytest.mark.parametrize("mode", MODES)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def first(source: Shards, n: int, **where) -> list[dict]:
    return list(islice(source.loader(**where), n))


# -- order ---------------------------------------------------------------------------------------------------------


def test_batch_is_images_in_minus_one_to_one_with_labels(split):
    batch = first(Shards(split, 8), 1)[0]
    assert batch["x"].shape == (8, 1, 4, 4) and batch["x"].dtype == torch.float32
    assert batch["label"].tolist() == [i % 5 for i in numbers(batch)] and batch["label"].dtype == torch.int64
    assert batch["x"].min() >= -1 and batch["x"].max() <= 1


@modes
@pytest.mark.parametrize("start", [1, 17])
def test_start_equals_skipping(split, mode, start):
    source = Shards(split, 6, **MODES[mode])
    whole = first(source, start + 9, rank=1, world=2)
    assert all(map(same, whole[start:], first(source, 9, rank=1, world=2, start=start)))


@modes
def test_ranks_together_read_all_before_any_twice(split, mode):
    source = Shards(split, 5, **MODES[mode])
    seen = [i for rank in range(2) for b in first(source, 10, rank=rank, world=2) for i in numbers(b)]
    assert sorted(seen) == list(range(100))


@modes
def test_order_depends_on_seed_rank_and_pass(split, mode):
    source, other = Shards(split, 5, **MODES[mode]), Shards(split, 5, seed=1, **MODES[mode])
    one = [numbers(b) for b in first(source, 40)]
    assert one == [numbers(b) for b in first(source, 40)]
    assert one != [numbers(b) for b in first(other, 40)]
    assert one[:20] != one[20:]
    assert one[:20] != [numbers(b) for b in first(source, 20, rank=1, world=2)]
    assert sorted(sum(one[:20], [])) != sum(one[:20], [])


@pytest.mark.parametrize("mode", ["cached", "streamed"])
def test_without_shuffle_the_order_is_the_stored_one(split, mode):
    source = Shards(split, 10, shuffle=False, **MODES[mode])
    assert sum([numbers(b) for b in first(source, 10)], []) == numbers(source.all())


@modes
def test_every_rank_gets_every_step_from_uneven_shards(uneven, mode):
    source = Shards(uneven, 8, **MODES[mode])
    seen = set()
    for rank in range(3):
        batches = first(source, 25, rank=rank, world=3)
        assert [len(b["x"]) for b in batches] == [8] * 25
        seen.update(i for b in batches for i in numbers(b))
    assert seen == set(range(48))


def test_one_shard_serves_many_lanes_and_batches_larger_than_the_split(tmp_path):
    tar(tmp_path / "a.tar", {str(i): members(i) for i in range(3)})
    for mode in MODES.values():
        for rank in range(4):
            assert [len(b["x"]) for b in first(Shards(tmp_path, 7, **mode), 4, rank=rank, world=4)] == [7] * 4


def test_loader_leaves_the_global_random_state_alone(split):
    before = torch.get_rng_state()
    for mode in MODES.values():
        first(Shards(split, 4, **mode), 3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loader_can_be_dropped_and_another_started(split):
    source = Shards(split, 4, **MODES["workers"])
    left = source.loader()
    batch = next(left)
    del left
    assert same(batch, first(source, 1)[0])


# -- the whole split -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cached", "streamed"])
def test_all_and_once_give_the_split_in_stored_order(split, mode):
    source = Shards(split, 8, **MODES[mode])
    whole = source.all()
    assert sorted(numbers(whole)) == list(range(100))
    assert sum([numbers(b) for b in source.once(7)], []) == numbers(whole)
    assert numbers(source.all(limit=9)) == numbers(whole)[:9]
    assert same(whole, source.all())


def test_measured_mean_and_std_are_those_of_x(split):
    source = Shards(split, 8)
    x = source.all()["x"].double()
    assert source.info.mean == pytest.approx(x.mean().item(), abs=1e-6)
    assert source.info.std == pytest.approx(x.std(unbiased=False).item(), abs=1e-6)


def test_batches_do_not_share_memory_with_the_cache(tmp_path):
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2)
    write_splits(tmp_path / "o", {"train": Split(x.__getitem__, 6)}, Info((), source="floats"))
    source = Shards(tmp_path / "o" / "train", 6)
    before = source.all()["x"].clone()
    next(source.loader())["x"].zero_()
    source.all()["x"].zero_()
    assert torch.equal(source.all()["x"], before)


# -- damage ----------------------------------------------------------------------------------------------------------


def truncated(path):
    path.write_bytes(path.read_bytes()[: tar_member(path, 9, "npy").offset_data + 60])


def cut_between_members(path):
    path.write_bytes(path.read_bytes()[: tar_member(path, 9, "cls").offset])


def empty_file(path):
    path.write_bytes(b"")


def empty_archive(path):
    with tarfile.open(path, "w"):
        pass


def garbage(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def rotten_header(path):
    change(path, tar_member(path, 9, "cls").offset, b"\xff" * 512)


def missing(path):
    path.unlink()


SHARD_DAMAGE = {  # and the samples of 25 that it costs
    truncated: 16,
    cut_between_members: 16,
    empty_file: 25,
    empty_archive: 25,
    garbage: 25,
    rotten_header: 16,
    missing: 25,
}


def bad_npy(path):
    change(path, tar_member(path, 9, "npy").offset_data, b"\x00" * 40)


def bad_class(path):
    change(path, tar_member(path, 9, "cls").offset_data, b"x")


def class_out_of_range(path):
    change(path, tar_member(path, 9, "cls").offset_data, b"7")


def missing_member(path):
    member = tar_member(path, 9, "cls")
    renamed = member.name.replace(".cls", ".cl_").encode()
    header = bytearray(path.read_bytes()[member.offset : member.offset + 512])
    header[: len(renamed)] = renamed
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    change(path, member.offset, bytes(header))


SAMPLE_DAMAGE = [bad_npy, bad_class, class_out_of_range, missing_member]


@modes
@pytest.mark.parametrize("spoil", [*SHARD_DAMAGE, *SAMPLE_DAMAGE], ids=lambda f: f.__name__)
def test_damage_is_named_counted_and_skipped(split, mode, spoil, caplog):
    lost = SHARD_DAMAGE.get(spoil, 1)
    shard = split / "000002.tar"
    spoil(shard)
    with caplog.at_level(logging.WARNING):
        source = Shards(split, 5, **MODES[mode])
        batches = first(source, 45)
    assert [len(b["x"]) for b in batches] == [5] * 45
    seen = {i for b in batches for i in numbers(b)}
    assert len(seen) == 100 - lost
    assert source.errors.lost == lost and len(source.errors.entries) == 1
    assert str(shard) in caplog.text and len(caplog.records) == 1
    assert all(map(same, batches[31:], first(source, 14, start=31)))


@pytest.mark.parametrize("spoil", [s for s in SHARD_DAMAGE if s is not missing], ids=lambda f: f.__name__)
def test_damage_shows_without_an_index(split, spoil):
    spoil(split / "000002.tar")
    (split / "index.json").unlink()
    source = Shards(split, 5)
    assert [s for s, _ in source.errors.entries] == [str(split / "000002.tar")]
    assert source.info.count == 100 - SHARD_DAMAGE[spoil] == len(source.all()["x"])


@modes
def test_a_shard_that_rots_whole_is_replaced_by_others(split, mode):
    change(split / "000002.tar", 0, b"\xff" * (split / "000002.tar").stat().st_size)
    source = Shards(split, 5, **{"window": 5, **MODES[mode]})
    batches = first(source, 40)
    assert {i for b in batches for i in numbers(b)} == set(numbers(Shards(split, 5).all())) and len(
        source.all()["x"]
    ) == 75
    assert all(map(same, batches[23:], first(source, 17, start=23)))


@modes
def test_damage_beyond_the_budget_is_refused(split, mode):
    for n in range(3):
        bad_npy(split / f"00000{n}.tar")
    assert len(first(Shards(split, 5, budget=3, **MODES[mode]), 40)) == 40
    with pytest.raises(BadInput, match="raise budget") as caught:
        first(Shards(split, 5, budget=2, **MODES[mode]), 40)
    assert all(f"00000{n}.tar sample" in str(caught.value) for n in range(3))
    assert "worker" not in str(caught.value)


def test_budget_may_be_a_share_of_the_samples(split):
    truncated(split / "000001.tar")
    assert Shards(split, 5, budget=0.16).errors.lost == 16
    with pytest.raises(BadInput, match="000001.tar"):
        Shards(split, 5, budget=0.15)
    with pytest.raises(BadInput, match="budget=1.0"):
        Shards(split, 5, budget=1.0)


@modes
def test_nothing_readable_is_refused(split, mode):
    for path in split.glob("*.tar"):
        change(path, 0, b"\xff" * path.stat().st_size)
    with pytest.raises(BadInput, match="no readable sample"):
        first(Shards(split, 5, **MODES[mode]), 1)


def test_known_damage_is_found_before_the_first_batch(split):
    for path in split.glob("*.tar"):
        empty_file(path)
    with pytest.raises(BadInput, match="no readable sample"):
        Shards(split, 5)


def test_the_audit_counts_damage_against_the_index(split):
    rotten_header(split / "000002.tar")
    (report,) = audit(split)
    assert report.count == 84 and "84 samples where the index says 100" in report.errors
    assert any("000002.tar" in error and "9 of 25 samples" in error for error in report.errors)


@pytest.mark.parametrize("order, warned", [("sorted", True), ("random", False), ("cached", False)])
def test_the_audit_warns_of_class_sorted_shards_that_are_streamed(tmp_path, monkeypatch, order, warned):
    monkeypatch.setattr("distill.data.audit.WINDOW", 20)
    monkeypatch.setattr("distill.data.audit.CACHE_MB", 256 if order == "cached" else 0)
    label = np.random.default_rng(0).permutation(100) % 5 if order == "random" else np.arange(100) // 20
    for shard in range(2):
        rows = range(50 * shard, 50 * shard + 50)
        tar(tmp_path / f"{shard}.tar", {f"{i:03d}": members(i) | {"cls": str(label[i]).encode()} for i in rows})
    (report,) = audit(tmp_path)
    assert any("sorted by class" in warning for warning in report.warnings) == warned


# -- arguments and the network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"seed": -1}, {"workers": -1}, {"budget": -1}])
def test_bad_arguments_are_named(split, bad):
    with pytest.raises(BadInput, match=next(iter(bad))):
        Shards(split, **{"batch_size": 4, **bad})


def test_rank_outside_world_is_refused(split):
    with pytest.raises(BadInput, match="rank=2"):
        Shards(split, 4).loader(rank=2, world=2)


def test_labels_can_be_left_out(split):
    source = Shards(split, 4, labels=False)
    assert source.info.classes == 0 and set(next(source.loader())) == {"x"} == set(source.all())


def test_check_compares_with_the_network(split):
    info = Shards(split, 4).info
    check(info, [1, 4, 4], 5)
    check(info, (1, 4, 4))
    words = r"train hold 5 classes of shape \(1, 4, 4\), but .* 10 classes of shape \(1, 8, 8\)"
    with pytest.raises(BadInput, match=words):
        check(info, (1, 8, 8), 10)
    with pytest.raises(BadInput, match="labels=false"):
        check(info, (1, 4, 4), 0)


def test_importing_the_package_loads_no_heavy_library():
    code = "import sys, distill.data.shards, distill.data.prepare; print([m for m in sys.modules if m in {names}])"
    names = {"webdataset", "PIL", "sklearn", "lightning", "diffusers"}
    out = subprocess.run([sys.executable, "-c", code.format(names=names)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# -- cost ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    out = tmp_path_factory.mktemp("cost") / "set"
    x = np.random.default_rng(0).integers(0, 256, (2000, 1, 28, 28), dtype=np.uint8)
    part = Split(x.__getitem__, 2000, np.arange(2000) % 10)
    write_splits(out, {"train": part}, Info((), 10, range=(0.0, 255.0), source="noise"), per_shard=500)
    return out / "train"


def plain_loop(folder, size: int) -> int:
    """What one would write by hand: open, decode, stack."""
    count, x, y = 0, [], []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as file:
            for member in file:
                data = file.extractfile(member).read()
                if member.name.endswith(".npy"):
                    x.append(np.load(BytesIO(data)))
                else:
                    y.append(int(data))
                if len(x) == len(y) == size:
                    count += len(torch.from_numpy(np.stack(x)).float().div(127.5).sub(1)) + 0 * sum(y)
                    x, y = [], []
    return count


def test_reading_keeps_pace_with_a_plain_loop(pictures):
    streamed = Shards(pictures, 50, cache_mb=0)
    ratios = []
    for _ in range(3):
        start = time.perf_counter()
        assert plain_loop(pictures, 50) == 2000
        middle = time.perf_counter()
        assert sum(len(b["x"]) for b in first(streamed, 40)) == 2000
        ratios.append((middle - start) / (time.perf_counter() - middle))
    assert sorted(ratios)[1] > 0.8, ratios


@pytest.mark.slow
def test_memory_does_not_grow_over_50_000_samples(pictures):
    batches = Shards(pictures, 50, cache_mb=0).loader()
    for _ in islice(batches, 100):
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in islice(batches, 1000):
        pass
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 8 * 1024, f"{grown} KiB"


@pytest.mark.slow
def test_fashion_mnist_is_read_as_fast_as_by_hand_without_growing(tmp_path):
    """`FASHION_MNIST=FOLDER pytest -s -m slow tests/data/test_shards.py -k fashion` prints the numbers."""
    source = os.environ.get("FASHION_MNIST")
    if not source:
        pytest.skip("FASHION_MNIST names no folder with Fashion-MNIST's four files")
    idx(source, tmp_path / "set")
    folder, rates = tmp_path / "set" / "train", []
    for _ in range(3):
        start = time.process_time()
        count = plain_loop(folder, 50)
        middle = time.process_time()
        assert sum(len(b["x"]) for b in islice(Shards(folder, 50, cache_mb=0).loader(), count // 50)) == count
        rates.append((count / (middle - start), count / (time.process_time() - middle)))
    by_hand, ours = sorted(rates, key=lambda pair: pair[1] / pair[0])[1]
    batches = Shards(folder, 50, cache_mb=0).loader()
    sizes = [resident() for n, _ in enumerate(islice(batches, 1101)) if n in (100, 1100)]  # 50,000 samples apart
    print(
        f"\n{by_hand:.0f} samples a second by hand, {ours:.0f} streamed, ratio {ours / by_hand:.2f}; "
        f"{sizes[0]:.1f} MiB resident after 5,000 samples, {sizes[1]:.1f} after 55,000"
    )
    assert ours > 0.8 * by_hand and sizes[1] - sizes[0] < 8


def resident() -> float:
    """MiB of this process that belong to no file."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))

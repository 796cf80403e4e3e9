"""The base class of data sources, and what every source tells a run."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from distill.data.base import Dataset
from distill.data.info import Info, Member
from distill.data.shards import Shards
from distill.data.toy import Conditions, Samples, Tensors
from distill.denoise import Gaussian
from distill.noise import RectifiedFlow


class Counted(Dataset):
    """Sample i is i, with a condition."""

    def __init__(self, count: int = 0):
        self.info, self.batch_size = Info((1,), count=count, members={"text": Member((2,), "float32")}), 4

    def loader(self, rank=0, world=1, start=0):
        while True:
            x = torch.arange(start * 4.0, start * 4.0 + 4)[:, None]
            yield {"x": x, "text": x.expand(-1, 2), "caption": [str(int(v)) for v in x]}
            start += 1


def test_all_is_the_first_samples_unless_a_source_knows_better():
    batch = Counted().all(6)
    assert batch["x"].flatten().tolist() == list(range(6)) and batch["caption"] == list("012345")
    assert set(Counted().all(6, conditions=False)) == {"x", "caption"}
    assert len(Counted(count=10).all()["x"]) == 10 and len(Counted().all()["x"]) == Dataset.default_limit


def test_defaults_are_those_of_a_source_in_memory_with_samples():
    source = Counted()
    assert source.samples and source.cached and source.accumulate == 1
    assert source.null is None and source.shapes is None and source.oracle is None


def test_sources_state_what_they_are(split):
    law = Gaussian([0.0, 1.0], 0.5, RectifiedFlow())
    assert Samples(law, 4).oracle is law and not Conditions([2], 0, 4).samples
    assert not Tensors([2], {"text": [3]}, 4, samples=False).samples
    streamed = Shards(split, 4, workers=2, cache_mb=0)
    assert not streamed.cached and (streamed.workers, streamed.window) == (2, 1024) and streamed.oracle is None
    for source in (Samples(law, 4), Conditions([2], 3, 4), Tensors([2], {"text": [3]}, 4), streamed):
        assert isinstance(source, Dataset)
        assert all(len(next(iter(batch.values()))) == 4 for batch in islice(source.loader(), 2))


@pytest.mark.parametrize("conditions", [True, False])
def test_all_leaves_out_conditions(conditions):
    batch = Tensors([2], {"text": [3]}, 4).all(5, conditions=conditions)
    assert set(batch) == ({"x", "text"} if conditions else {"x"}) and len(batch["x"]) == 5

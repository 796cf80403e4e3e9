"""Seconds of sampling: the least of several, since other work on a machine only ever adds."""

from __future__ import annotations

import pytest
import torch

from distill.metrics import evaluate


@pytest.mark.parametrize("count, calls", [(4, 3), (10, 3), (16, 4)])
def test_seconds_are_the_least_of_three_or_more_whole_batches(monkeypatch, count, calls):
    spent = iter([9.0, 2.0, 5.0, 3.0, 7.0])
    taken = []

    def timed(sampler, rows):
        taken.append(len(rows[0]))
        return sampler(*rows), next(spent)

    monkeypatch.setattr(evaluate, "_timed", timed)
    z = torch.randn(count, 2)
    x, seconds = evaluate.time_samples(lambda z, cond: z + 1, z, {}, torch.nn.Linear(2, 2), batch=4)
    assert torch.equal(x, z + 1) and seconds == 1000 * 2.0 / 4 and sum(n == 4 for n in taken) >= calls

"""Validation that all ranks share: the numbers of one process, the run's precision, and a rank that is slow."""

from __future__ import annotations

import time

import pytest
import tiny
import torch
import two

from distill.metrics.shared_draw import SharedDraw
from distill.metrics.shares import current_shares
from distill.solvers import RowNoise, solve
from distill.training import validation

SMALL = ("train.steps=1", "method.grid=2", "method.warm_start=0", "eval.validation_samples=41", "eval.evaluations=[4]")


def first_row(folder):
    return {k: float(v) for k, v in tiny.rows(folder)[0].items() if k.startswith("validation/") and v}


@pytest.mark.parametrize("name", ["dmd2", "consistency"])  # with critic and head; with a stochastic sampler
def test_two_ranks_find_what_one_process_finds(name, tmp_path):
    tiny.train(tmp_path / "alone", *SMALL, name=name)

    def work(rank):
        drawn, inner = [], SharedDraw.__call__

        def count(self, sampler, model):
            x = inner(self, sampler, model)
            drawn.append(len(x))
            return x

        SharedDraw.__call__ = count
        return tiny.train(tmp_path / "two", *SMALL, name=name).validation.baseline, drawn

    (first, most), (second, fewest) = two.ranks(work, seconds=300)
    assert first == second and set(first) == {f"teacher@{k}" for k in (2, 4)}
    assert {(20, 21)} <= set(zip(most, fewest)) and max(most) <= 21, "each rank draws half of them"
    alone = first_row(tmp_path / "alone")
    assert first_row(tmp_path / "two") == {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in alone.items()}


def test_a_row_has_its_noise_in_every_batch():
    x = torch.zeros(5, 3)
    whole, part = RowNoise(range(5)), RowNoise([3, 1])
    for _ in range(2):
        assert torch.equal(whole.draw(x)[[3, 1]], part.draw(x[:2]))
    many = RowNoise(range(4000)).draw(torch.zeros(4000, 2))
    assert (
        many.mean().abs() < 0.05
        and (many.std() - 1).abs() < 0.05
        and (many.T.corrcoef() - torch.eye(2)).abs().max() < 0.05
    )


def test_shares_make_equally_many_calls_and_drop_what_was_repeated():
    def work(rank):
        calls = []

        def sampler(z, cond, noise):
            calls.append(len(z))
            return z + cond["label"][:, None]

        draw = SharedDraw(torch.arange(5.0)[:, None], {"label": 10 * torch.arange(5)}, 2, current_shares())
        own = draw(sampler, torch.nn.Linear(1, 1))
        return calls, own.flatten().tolist(), draw.own_cond["label"].tolist(), draw.ranks.gather_to_all(own).tolist()

    first, second = two.ranks(work)
    assert first[0] == second[0] == [2, 1]
    assert first[1:3] == ([0, 11], [0, 10]) and second[1:3] == ([22, 33, 44], [20, 30, 40])
    assert first[3] == second[3] == [[0], [11], [22], [33], [44]]


@pytest.mark.parametrize("precision, dtype", [("32", torch.float32), ("bf16", torch.bfloat16)])
def test_teacher_and_student_are_drawn_under_the_runs_precision(precision, dtype, tmp_path, monkeypatch):
    seen, inner = set(), validation.Validation.validate

    def validate(self, method):
        hooks = [
            method.ema.net.leave.register_forward_hook(lambda *a: seen.add(("student", a[-1].dtype))),
            method.teacher.register_forward_pre_hook(
                lambda *a: seen.add(
                    ("teacher", torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
                )
            ),
        ]
        inner(self, method)
        [hook.remove() for hook in hooks]

    monkeypatch.setattr(validation.Validation, "validate", validate)
    tiny.train(tmp_path / "run", *SMALL, f"engine.precision={precision}", name="consistency")
    assert seen == {("student", dtype), ("teacher", dtype)}


@pytest.mark.parametrize("minutes", [10, 0.03])
def test_a_slow_rank_is_waited_for_as_long_as_the_config_says(minutes, tmp_path):
    """The limit of training's collectives is 8 s, one rank draws for 11 s."""

    def work(rank):
        inner = validation.probes

        def slow(*arguments, **keywords):
            time.sleep(11 * rank)
            return inner(*arguments, **keywords)

        validation.probes = slow
        keys = (*SMALL, f"engine.validation_timeout={minutes}", "train.validate_every=2")
        return tiny.train(tmp_path / "run", *keys, name="consistency").method.step

    found = two.ranks(work, seconds=120, limit=8)
    if minutes == 10:
        assert found == [1, 1]
    else:
        assert found[0].startswith("BadInput: Rank 0 waited 0.03 minutes") and "engine.validation_timeout" in found[0]


def test_solve_takes_noise_by_row():
    from distill.denoise import Gaussian
    from distill.noise import RectifiedFlow
    from distill.solvers import Renoise

    denoiser, z = Gaussian([0.0], 1.0, RectifiedFlow()), torch.randn(6, 1)
    x = solve(denoiser, z, [1.0, 0.5, 0.0], Renoise(), generator=RowNoise(range(6)))
    parts = [solve(denoiser, z[p], [1.0, 0.5, 0.0], Renoise(), generator=RowNoise(p)) for p in ([0, 1, 2], [3, 4, 5])]
    torch.testing.assert_close(x, torch.cat(parts))

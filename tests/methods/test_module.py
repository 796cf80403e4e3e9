"""The module below every method: its counters, streams of random numbers, state, and what it takes from a Trainer."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from test_method import Slope, made, step

from distill.config.schema import Optim
from distill.denoise import Gaussian
from distill.errors import BadInput
from distill.methods import placement
from distill.methods.placement import Placement, Replicas
from distill.noise import RectifiedFlow

TEACHER = Gaussian([0.0, 0.0], 0.5, RectifiedFlow())

# -- counters, turns and modes ---------------------------------------------------------------------------------------


def test_a_new_method_has_done_nothing_and_knows_no_end():
    method = Slope({"teacher": TEACHER, "student": made().student})
    assert method.schedule_step() == (0, 0) and method.extra_batches == 0 and method.warm_start == 0
    assert (method.placement.rank, method.placement.world, method.placement.accumulate) == (0, 1, 1)


def test_an_unknown_role_is_refused_with_those_that_exist():
    with pytest.raises(BadInput, match="roles.studnet: Slope has no such role. Did you mean 'student'.*teacher"):
        Slope({"teacher": TEACHER, "studnet": made().student})


def test_the_last_micro_batch_of_a_turn_is_marked():
    class Watched(Placement):
        def backward(self, role, loss, last=True):
            marks.append(last)
            super().backward(role, loss, last)

    method, marks = made(), []
    method.placement = Watched(accumulate=3)
    step(method, 1.0, 2.0, 3.0)
    assert marks == [False, False, True]


def test_a_target_has_its_sources_mode_and_the_average_that_samples_is_in_eval_mode():
    method = made(averages={"target": ("student", 0.9), "still": ("student", None)})
    for mode in (True, False):
        method.train(mode)
        modes = {name: getattr(method, name).training for name in ("student", "target", "still", "ema", "teacher")}
        assert modes == {"student": mode, "target": mode, "still": False, "ema": False, "teacher": False}


# -- random numbers --------------------------------------------------------------------------------------------------


def test_the_shared_stream_follows_the_seed():
    draws = []
    for seed in (1, 2, 2**62 + 3, 1):
        torch.manual_seed(seed)
        method = made()
        assert method.shared.initial_seed() == seed
        draws.append(torch.rand((), generator=method.shared).item())
    assert len(set(draws)) == 3 and draws[0] == draws[-1]


@pytest.mark.parametrize("seed", [5, 2**62 + 5])
def test_on_another_number_of_ranks_noise_is_seeded_by_rank_and_step(seed):
    method, states = made(), [torch.get_rng_state()]
    shared = torch.Generator().manual_seed(3)
    method.step, method.placement.rank, method.placement.world = 7, 1, 2
    torch.manual_seed(seed)
    method._restore_random({"cpu": states, "shared": shared.get_state()})
    assert torch.initial_seed() == seed + 7 * 1_000_003 + 1
    assert torch.equal(method.shared.get_state(), shared.get_state())


def test_the_streams_of_a_run_on_a_gpu_are_continued_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: pytest.fail("there is no such device"))
    method = made()
    torch.manual_seed(4)
    states = {"cpu": [torch.get_rng_state()], "cuda": [torch.zeros(16, dtype=torch.uint8)]}
    expected = torch.rand(3)
    method._restore_random(states | {"shared": method.shared.get_state()})
    assert torch.equal(torch.rand(3), expected)


def test_a_resumed_fit_takes_up_its_streams_at_its_first_batch_alone():
    method = made()
    method._resumed = {"random": {"cpu": [torch.get_rng_state()], "shared": method.shared.get_state()}}
    expected = torch.rand(3)
    torch.manual_seed(9)  # as a data loader that starts
    method.on_train_batch_start({}, 0)
    assert torch.equal(torch.rand(3), expected)
    method.on_train_batch_start({}, 1)
    assert not torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("seed", "rank", "own"), [(5, 2, 7), (2**62, 1, 2**62 + 1), (2**63 - 1, 1, 0)])
def test_each_rank_draws_noise_by_its_own_seed(seed, rank, own):
    replicas = Replicas()
    replicas.rank = rank
    torch.manual_seed(seed)
    replicas.draw_apart()
    assert torch.initial_seed() == own


# -- state -----------------------------------------------------------------------------------------------------------


def test_a_snapshot_brings_back_weights_moments_counts_and_streams():
    first, second = (made(optim={"name": "AdamW"}) for _ in range(2))
    first.extra_batches = 2
    step(first, math.nan), step(first, 2.0)
    state = copy.deepcopy(first.snapshot())
    ends = step(first, 3.0), torch.rand(3), torch.rand(3, generator=first.shared)
    second.configure_optimizers()
    second.restore(state)
    assert second.step == 2 and second.extra_batches == 2 and second.nonfinite.state() == {"student": [1, 0]}
    again = step(second, 3.0), torch.rand(3), torch.rand(3, generator=second.shared)
    assert again[0] == ends[0] and torch.equal(again[1], ends[1]) and torch.equal(again[2], ends[2])
    del state["extra_batches"]
    second.restore(state)
    assert second.extra_batches == 0, "of a state that counts none"


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_rank_whose_batch_did_not_touch_a_weight_adds_zeros(alone, monkeypatch):
    method = made()
    method.placement = Replicas()
    method.configure_optimizers()
    inner = dist.all_reduce

    def of_two_ranks(tensor, op=dist.ReduceOp.SUM, **kw):
        if op == dist.ReduceOp.MAX:
            tensor.fill_(1)  # the other rank has a gradient
        return inner(tensor, op, **kw)

    monkeypatch.setattr(placement.dist, "all_reduce", of_two_ranks)
    method.student.net.p.grad = None
    method.placement.reduce("student")
    assert method.student.net.p.grad.item() == 0
    assert method.placement.gather("a") == ["a"]


# -- under a Trainer -------------------------------------------------------------------------------------------------


def under(method, precision="32-true", strategy=None, **trainer):
    """The method under a stand-in for a Trainer."""
    one = SingleDeviceStrategy(device="cpu")
    method._trainer = SimpleNamespace(strategy=strategy or one, precision=precision, **trainer)
    method._jit_is_scripting = False
    return method


@pytest.mark.parametrize(("precision", "scale"), [("32-true", False), ("bf16-mixed", False), ("16-mixed", True)])
def test_a_trainers_precision_decides_on_the_scale_of_losses(precision, scale):
    method = made()
    method.placement = Placement(accumulate=3)
    found = under(method, precision)._placement_of_trainer()
    assert type(found) is Placement and found.scale == scale and found.accumulate == 3


def test_what_would_train_in_low_precision_or_shards_is_refused():
    for precision in ("bf16-true", "16-true"):
        with pytest.raises(BadInput, match=f'precision="{precision}"'):
            under(made(), precision)._placement_of_trainer()
    with pytest.raises(BadInput, match="strategy=object"):
        under(made(), strategy=object())._placement_of_trainer()


def test_replicas_are_for_several_processes(alone, monkeypatch):
    method = under(made(), strategy=DDPStrategy())
    assert type(method._placement_of_trainer()) is Placement
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert type(method._placement_of_trainer()) is Replicas


@pytest.mark.parametrize(
    ("max_steps", "done", "max_epochs", "epoch", "batches", "ready", "left"),
    [
        (10, 0, None, 0, math.inf, 0, 10),
        (10, 4, None, 0, math.inf, 0, 6),
        (-1, 4, 3, 0, 5, 0, 15),
        (-1, 4, 3, 1, 5, 2, 8),
        (10, 4, 3, 1, 5, 2, 6),
        (100, 7, 3, 1, 5, 2, 8),
        (-1, 4, 0, 0, 5, 0, 0),
    ],
)
def test_the_end_is_the_nearer_of_the_trainers_steps_and_epochs(
    max_steps, done, max_epochs, epoch, batches, ready, left
):
    loop = SimpleNamespace(
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=ready)))
    )
    limits = {"max_steps": max_steps, "global_step": done, "max_epochs": max_epochs, "current_epoch": epoch}
    method = under(made(), num_training_batches=batches, fit_loop=loop, **limits)
    method.step = 100
    assert method._total_steps() == 100 + left


def test_a_fit_without_end_is_for_constant_rates():
    endless = {"max_steps": -1, "global_step": 0, "max_epochs": None}
    method = under(made(), **endless)
    assert method._total_steps() == 0
    method.optim = {"student": Optim(), "critic": Optim(decay="cosine"), "head": Optim(decay="cosine")}
    with pytest.raises(BadInput, match="^optim.critic.decay needs the number of training steps"):
        method._total_steps()
    method.optim.pop("head")
    with pytest.raises(BadInput, match="^optim.critic.decay needs"):
        method._total_steps()
    method = under(made(), **endless)
    method.needs_total_steps = True
    with pytest.raises(BadInput, match="^Slope needs"):
        method._total_steps()

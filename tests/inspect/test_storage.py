"""What a plan says is stored, against tensors counted in live runs: one process here, two real ones when there is time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import weigh

from distill.config.schema import Optim
from distill.inspect.plan.skeleton import experiment_of
from distill.inspect.plan.spread import networks_of, numbers_kept, parts
from distill.methods.placement import Placement

sys.path.append(str(Path(__file__).parents[1] / "training"))
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")


def planned(name: str, strategy: str, n: int) -> dict[str, dict[str, int]]:
    networks = networks_of(experiment_of(weigh.recipe(name))[0].method)
    shares = {x.name: parts(x, strategy, n) for x in networks if x.kind == "trainable"}
    found = {
        kind: {role: share[kind] for role, share in shares.items()} for kind in ("gradients", "moments", "masters")
    }
    if strategy in ("zero1", "zero2"):  # the last turn's alone is left
        found["gradients"] |= dict.fromkeys(list(shares)[:-1], 0)
    return found | {"weights": {x.name: x.part(strategy, n) + x.buffers for x in networks}}


def errors(held: dict[str, dict[str, int]], plan: dict[str, dict[str, int]]) -> dict[str, float]:
    """Relative error of each kind, all networks together, once every network was found on both sides."""
    assert {k: set(v) for k, v in held.items()} == {k: set(v) for k, v in plan.items()}
    total = lambda some: sum(some.values())
    return {k: abs(total(plan[k]) - total(held[k])) / max(total(held[k]), 1) for k in held}


def row(name: str, strategy: str, found: list[dict[str, float]]) -> None:
    """Print a row of the table in docs/plan.md (`pytest -s`): the largest error of any rank."""
    cells = (f"{max(e[k] for e in found):.1%}" for k in ("weights", "gradients", "moments", "masters"))
    print(f"\n| {name} | {strategy} | {' | '.join(cells)} |")


@pytest.mark.parametrize("name", weigh.CASES)
def test_one_process_stores_what_was_planned(name):
    held = weigh.held(weigh.recipe(name), Placement())
    plan = planned(name, "single", 1)
    row(name, "single", [errors(held, plan)])
    assert max(errors(held, plan).values()) < 1e-3
    assert held["gradients"] == plan["gradients"] and held["weights"] == plan["weights"]


@pytest.fixture(scope="module")
def weighed(tmp_path_factory):
    from test_strategy import launch

    folder = tmp_path_factory.mktemp("ranks")
    launch(folder, [weigh.__file__, str(folder), *STRATEGIES])
    return [json.loads((folder / f"weighed-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", weigh.CASES)
def test_two_ranks_store_what_was_planned(name, strategy, weighed):
    plan = planned(name, strategy, 2)
    found = [errors(rank[strategy][name], plan) for rank in weighed]
    row(name, strategy, found)
    assert max(max(e.values()) for e in found) < 0.15
    spread = plan["moments"]["student"] < 0.6 * planned(name, "single", 1)["moments"]["student"]
    assert spread == (strategy != "ddp")


@pytest.mark.slow
def test_ranks_that_spread_weights_keep_no_cast_copies_of_them(weighed):
    kept = {s: weighed[0][s]["keeps_casts"] for s in STRATEGIES}
    assert kept == {"ddp": True, "zero1": True, "zero2": True, "zero3": False, "fsdp": False}


@pytest.mark.parametrize("kind, kept", [("AdamW", 2 * 60 * 40 + 1), ("SGD", 0), ("Adafactor", 60 + 40 + 1)])
def test_what_an_optimizer_keeps_is_read_off_a_step(kind, kept):
    settings = Optim(name=kind)
    weight = torch.nn.Parameter(torch.randn(60, 40))
    weight.grad = torch.randn(60, 40)
    if kind != "Adafactor":
        from distill.methods.optim import optimizer_of

        optimizer = optimizer_of(settings, [weight], "student")
        optimizer.step()
        assert kept == sum(v.numel() for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor))
        assert numbers_kept(settings, (60, 40), "student") == kept

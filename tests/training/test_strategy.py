"""Two real processes under every strategy against one process that knows nothing of strategies."""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path

import places
import pytest
import torch
from reference import Reference, distance, launch

from distill import methods
from distill.config.schema import Engine
from distill.errors import BadInput
from distill.training.placement.blocks import blocks, recompute
from distill.training.placement.choose import build_placement
from distill.training.trainer import equip

CASES = [(name, strategy) for strategy in places.STRATEGIES for name in places.METHODS]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks wrote, by strategy: one pair of processes for all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(folder, [places.__file__, str(folder), *places.STRATEGIES])
    return {s: [torch.load(folder / f"{s}-{r}.pt", weights_only=True) for r in range(2)] for s in places.STRATEGIES}


@pytest.fixture(scope="module")
def expected():
    """Networks after the last step, by method; and where they started."""
    out = {}
    for name, parts in [*((n, 1) for n in places.METHODS), ("dpo", 2), ("scm", 2)]:
        build = functools.partial(places.build, name)
        out[name if parts == 1 else f"{name}, accumulated"] = Reference(build, parts).networks(places.STEPS)
    return out


@pytest.mark.parametrize("name, strategy", CASES)
def test_two_ranks_train_what_one_process_with_both_halves_does(name, strategy, found, expected):
    start = places.build(name)
    for network, weights in expected[name].items():
        got = found[strategy][0][name]["networks"][network]
        if network in start.frozen:
            assert all(torch.equal(got[k], v) for k, v in getattr(start, network).state_dict().items()), network
        else:
            assert distance(got, weights) < 1e-5, network
            assert distance(weights, getattr(start, network).state_dict()) > 1e-2, "it never moved"


@pytest.mark.parametrize("strategy", places.STRATEGIES)
def test_two_micro_batches_are_one_step_of_both(strategy, found, expected):
    for network, weights in expected["dpo, accumulated"].items():
        assert distance(found[strategy][0]["accumulated"]["networks"][network], weights) < 1e-5, network


def test_what_a_turn_leaves_for_the_next_belongs_to_its_micro_batch(found, expected):
    for network, weights in expected["scm, accumulated"].items():
        assert distance(found["ddp"][0]["scm"]["networks"][network], weights) < 1e-4, network


@pytest.mark.parametrize("name, strategy", CASES)
def test_resuming_equals_going_on(name, strategy, found):
    whole, resumed = (found[strategy][0][name][k] for k in ("networks", "resumed"))
    for network, weights in whole.items():
        assert all(torch.equal(resumed[network][k], v) for k, v in weights.items()), network


@pytest.mark.parametrize("name, strategy", CASES)
def test_a_state_of_two_ranks_goes_on_in_one(name, strategy, found):
    state, method = copy.deepcopy(found[strategy][0][name]["state"]), places.build(name)
    method.configure_optimizers()
    method.restore(state)
    assert method.step == places.HALF
    for network, weights in state["networks"].items():
        assert all(torch.equal(v, weights[k]) for k, v in getattr(method, network).state_dict().items()), network
    plain = found["ddp"][0][name]["state"]["optimizers"]
    for role, moments in method.snapshot()["optimizers"].items():
        for i, values in plain[role]["state"].items():
            assert moments["state"][i].keys() == values.keys()
            for k, v in values.items():
                torch.testing.assert_close(moments["state"][i][k], v, rtol=1e-3, atol=1e-5)
    places.advance(method, 0, places.HALF + 1)


@pytest.mark.parametrize("strategy", places.STRATEGIES)
def test_both_ranks_sample_the_same_and_log_the_mean(strategy, found):
    for name in places.METHODS:
        a, b = (rank[name] for rank in found[strategy])
        torch.testing.assert_close(a["sample"], b["sample"], rtol=0, atol=0)
        losses = [k for k in a["logs"] if k.endswith("/loss")]
        assert losses and all(a["logs"][k] == b["logs"][k] for k in losses)


@pytest.mark.parametrize("strategy", places.STRATEGIES)
def test_ranks_that_would_go_different_ways_stop_together(strategy, found):
    for rank in found[strategy]:
        assert "Step 2: rank 1 and rank 0 differ in their shared draws" in rank["disagreement"]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"strategy": "zero4"}, "engine.strategy: 'zero4' must be one of .* Did you mean 'zero"),
        ({"strategy": "ddp", "deepspeed": "x.json"}, "engine.deepspeed: strategy ddp takes no"),
        ({"strategy": "zero2", "precision": "16"}, "engine.precision: 16 scales losses"),
        ({"strategy": "fsdp", "offload_optimizer": True}, "engine.offload_optimizer: only zero1"),
        ({"strategy": "zero2", "offload_parameters": True}, "engine.offload_parameters: only fsdp and zero3"),
        ({"strategy": "zero2", "deepspeed": "nowhere.json"}, "engine.deepspeed: nowhere.json cannot be read"),
    ],
)
def test_settings_that_do_not_go_together_are_one_sentence(settings, says):
    with pytest.raises(BadInput, match=says):
        build_placement(places.engine(**settings), 2)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_a_method_that_needs_whole_networks_is_refused_where_they_are_cut(strategy):
    method = methods.CTM({"teacher": places.mlp(), "student": places.mlp(flow_map=True)})
    with pytest.raises(BadInput, match=f"{strategy} cuts networks to shards, and CTM .* its balance .*; use ddp"):
        equip(method, Engine(strategy=strategy))
    equip(method, Engine(strategy="zero2"))


def test_forward_mode_is_refused_where_hooks_have_none():
    roles = lambda: {"teacher": places.mlp(), "student": places.mlp()}  # noqa: E731
    with pytest.raises(BadInput, match="method.jvp: zero3 has no forward-mode derivative; set method.jvp=difference"):
        equip(methods.SCM(roles()), Engine(strategy="zero3"))
    equip(methods.SCM(roles(), jvp="difference"), Engine(strategy="zero3"))


@pytest.mark.parametrize(
    "content, says",
    [
        ({"fp16": {"enabled": True}}, "sets fp16, which engine.precision decides"),
        ({"zero_optimization": {"stage": 3}}, "sets stage 3; use engine.strategy=zero3"),
    ],
)
def test_a_deepspeed_file_does_not_overrule_the_run(tmp_path, content, says):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=says):
        build_placement(places.engine("zero2", deepspeed=str(tmp_path / "ds.json")), 2)


def test_the_shipped_deepspeed_files_fit_their_strategies():
    for path in sorted((Path(__file__).parents[2] / "launch" / "deepspeed").glob("*.json")):
        placement = build_placement(places.engine(path.stem[:5], deepspeed=str(path)), 2)
        found = placement.config(clip=1.0)["zero_optimization"]
        assert found["stage"] == int(path.stem[4]) and found["overlap_comm"] is True


def test_zero_without_deepspeed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(BadInput, match="ZeRO needs deepspeed .* pip install deepspeed, or use fsdp"):
        build_placement(places.engine("zero1"), 2)


def test_a_network_is_cut_at_the_items_of_its_lists():
    network = places.vit().net
    assert blocks(network) == list(network.blocks)
    assert blocks(places.mlp().net) == []  # its items are dictionaries, which nobody calls


def test_recomputed_activations_give_the_same_gradient():
    x, t = torch.randn(3, 1, 4, 4, requires_grad=True), torch.rand(3)
    plain = places.vit()
    lean = copy.deepcopy(plain)
    recompute(lean)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.numel()) or v, lambda v: v):
        one = plain(x, t).square().sum()
        before = sum(saved)
        saved.clear()
        two = lean(x, t).square().sum()
        assert sum(saved) < 0.7 * before
    one.backward()
    two.backward()
    for p, q in zip(plain.parameters(), lean.parameters()):
        torch.testing.assert_close(p.grad, q.grad)

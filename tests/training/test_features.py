"""Offload, precision, accumulation, clipping, recomputation, compilation and adapters under every strategy, on two real
processes, against one process that knows nothing of any of them."""

from __future__ import annotations

import functools
from pathlib import Path

import features
import pytest
import torch
from features import CASES, REFERENCES, RESUMED, STEPS
from reference import Reference, distance, launch

TRACED = "compile"
TRIED = [
    (feature, strategy) for feature, (strategies, *_) in CASES.items() for strategy in strategies if feature != TRACED
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks wrote, by feature and strategy: one pair of processes for all of them."""
    folder = tmp_path_factory.mktemp("features")
    launch(folder, [features.__file__, str(folder), *(feature for feature in CASES if feature != TRACED)])
    return {case: written(folder, *case) for case in TRIED}


def written(folder: Path, feature: str, strategy: str) -> list[dict]:
    return [torch.load(folder / f"{feature}-{strategy}-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def expected():
    """Networks after the last step, by reference."""
    found = {}
    for key, (name, parts, precision) in REFERENCES.items():
        build, within = functools.partial(features.build, name), functools.partial(features.autocast, precision)
        found[key] = Reference(build, parts, within, 2.0**16 if precision == "16" else 1.0).networks(STEPS)
    return found


@pytest.mark.parametrize("feature, strategy", TRIED)
def test_a_feature_trains_what_one_process_does(feature, strategy, found, expected):
    _, _, name, reference = CASES[feature]
    start = features.build(name)
    for network, weights in expected[reference].items():
        got, began = found[feature, strategy][0]["networks"][network], getattr(start, network).state_dict()
        if network in start.frozen:
            assert all(torch.equal(got[k], v) for k, v in began.items()), network
        elif feature == "difference":  # which magnifies rounding
            assert away(got, weights, began) < 0.05, network
        elif (feature, strategy) == ("bf16", "zero3"):  # its linear layers are deepspeed's own, which round elsewhere
            assert away(got, weights, began) < 0.2, network
            assert away(expected["two"][network], weights, began) > 0.5, "other data would be as near"
        else:
            assert distance(got, weights) < 1e-5, network
            assert distance(weights, began) > 1e-3, "it hardly moved"


def away(a: dict, b: dict, start: dict) -> float:
    """Distance of two networks over how far the second has come from `start`."""
    norm = lambda x, y: sum(float((x[k] - y[k]).square().sum()) for k in b) ** 0.5  # noqa: E731
    return norm(a, b) / norm(b, start)


def test_precision_is_seen(expected):
    for precision in ("bf16", "16"):
        assert distance(expected[precision]["student"], expected["plain"]["student"]) > 1e-4, precision


@pytest.mark.parametrize("feature, strategy", [case for case in TRIED if case[0] in RESUMED])
def test_resuming_with_a_feature_equals_going_on(feature, strategy, found):
    """Averages too, of adapters alone under the shared base; the scale of float16's losses among the state."""
    whole, resumed = (found[feature, strategy][0][k] for k in ("networks", "resumed"))
    for network, weights in whole.items():
        assert all(torch.equal(resumed[network][k], v) for k, v in weights.items()), network


@pytest.mark.slow
def test_compiled_roles_train_the_same(tmp_path, expected):
    """Traced by dynamo, hooks of the strategies included, and run as traced: no compiler is needed."""
    launch(tmp_path, [features.__file__, str(tmp_path), TRACED], TORCHDYNAMO_DISABLE="0")
    for strategy in CASES[TRACED][0]:
        found = written(tmp_path, TRACED, strategy)[0]
        for network, weights in expected["small"].items():
            assert distance(found["networks"][network], weights) < 1e-5, (strategy, network)

"""Steps on shapes against steps on numbers, and against counts by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import weigh
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distill.inspect.plan.meter import Accelerator, Meter, attention
from distill.inspect.plan.skeleton import experiment_of
from distill.inspect.plan.trace import trace


def traced(cfg, real=False, **keywords):
    return trace(experiment_of(cfg, real=real)[0], **keywords)


def peak(seen, role, which=0):
    return max(found[which] for found in seen.peaks[role].values())


@pytest.mark.parametrize("name", weigh.CASES)
def test_shapes_take_what_numbers_take(name):
    cfg = weigh.recipe(name)
    shapes, numbers = traced(cfg, brief=True), traced(cfg, real=True, brief=True)
    assert shapes.flops == numbers.flops > 0 and shapes.peaks.keys() == numbers.peaks.keys()
    for role in numbers.peaks:
        for which in (0, 1):
            assert peak(shapes, role, which) == pytest.approx(peak(numbers, role, which), rel=0.03)


def test_activations_are_what_autograd_saves():
    """The student's turn of consistency training: bytes saved for the backward pass of a real step on the CPU."""
    cfg = weigh.recipe("consistency")
    seen = traced(cfg, brief=True)
    experiment, _ = experiment_of(cfg, real=True)
    method, batch = experiment.method, next(experiment.data.loader())
    method._only("student")
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = method.loss(batch["x"], torch.randn_like(batch["x"]), {})
    assert loss.requires_grad
    print(f"\nactivations: {seen.kept['student']} planned, {sum(saved.values())} saved")
    assert seen.kept["student"] == pytest.approx(sum(saved.values()), rel=0.05)
    assert peak(seen, "student") > seen.kept["student"], "the frozen networks work meanwhile"


def test_operations_of_a_transformer_by_hand():
    """TDM: K - 1 calls in the roll-out, one for the critic's samples, then 1 + 2 for each trained call and the frozen two."""
    cfg = weigh.recipe("tdm")
    net, batch, tokens, w = cfg.roles.teacher.net, 8, 16, 48
    per_token = net.depth * 12 * w**2 + 2 * w * net.channels * 4
    per_sample = net.depth * 6 * w**2 + 2 * w**2 + 11 * w + w**2  # modulations, the last one's, the embedding of time
    forward = 2 * batch * (tokens * per_token + per_sample) + 4 * net.depth * batch * tokens**2 * w
    calls = 3 + (1 + 3) + (3 + 2 + 1)  # guidance 2 asks the teacher twice
    assert traced(cfg, brief=True).flops == pytest.approx(calls * forward, rel=0.01)


def test_steps_are_averaged_over_their_pattern():
    """Of DMD2's steps every second updates the student; the roll-out has 0 or 1 calls before the one that is kept."""
    once = traced(weigh.recipe("dmd2"), brief=True)
    cfg = weigh.recipe("dmd2")
    cfg.method.student_every = 1
    every, mean = traced(cfg, brief=True), traced(weigh.recipe("dmd2"))
    assert once.flops < every.flops and mean.flops < every.flops
    assert mean.steps > 4 and "student" in mean.peaks


def test_recomputed_activations_take_less_memory_and_more_operations():
    plain, lean = (traced(weigh.recipe("tdm", checkpoint_activations=on), brief=True) for on in (False, True))
    assert peak(lean, "student") < 0.6 * peak(plain, "student") and lean.flops > 1.1 * plain.flops


def test_memory_is_a_line_in_the_batch():
    from distill.inspect.plan import between

    experiment, _ = experiment_of(weigh.recipe("tdm"))
    one, two, five = (trace(experiment, n, brief=True) for n in (8, 16, 40))
    guess = between(one, two, 40)
    assert guess.flops == pytest.approx(five.flops)
    for role in five.peaks:
        assert peak(guess, role) == pytest.approx(peak(five, role), rel=0.02)


def test_tracing_leaves_global_state_unchanged():
    experiment, _ = experiment_of(weigh.recipe("dmd2"))
    placement, forward = experiment.method.placement, experiment.method.student.net.forward
    trace(experiment, brief=True)
    assert experiment.method.placement is placement and experiment.method.step == 0
    assert experiment.method.student.net.forward.__func__ is forward.__func__
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in experiment.method.student.parameters())


# -- what an accelerator would do ---------------------------------------------------------------------------------


def test_autocast_of_shapes_is_autocast():
    """Layers whose rule is the same on CPU and GPU: every type, and what is saved, is what real autocast makes."""

    def saved(device, modes):
        net = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)).to(device)
        x, kinds = torch.randn(3, 8, device=device), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kinds.append((tuple(t.shape), t.dtype)) or t, lambda t: t
        ):
            with modes, torch.autocast("cpu", torch.bfloat16):
                out = net(x) + net(x)
        return out.dtype, sorted(map(str, kinds))

    assert saved("meta", Accelerator(torch.bfloat16)) == saved("cpu", torch.enable_grad())


def test_weights_that_were_cast_stay_unless_the_cache_is_off():
    cfg = weigh.recipe("tdm", precision="bf16", checkpoint_activations=True)
    experiment, _ = experiment_of(cfg)
    weights = sum(p.numel() for p in experiment.method.student.parameters() if p.ndim > 1)
    kept, free = (
        peak(trace(experiment, None, torch.bfloat16, cache, brief=True), "student") for cache in (True, False)
    )
    assert 2 * weights < kept - free < 2 * 2 * weights * 1.1  # the critic's, of the turn before, and the student's


def test_what_is_computed_again_is_cast_again():
    layer = nn.Linear(4, 4, device="meta")
    for differentiate in (torch.autograd.backward, lambda y: torch.autograd.grad(y, layer.weight)):
        with Accelerator(torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
            x = torch.randn(3, 4, device="meta", requires_grad=True)
            differentiate(checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False).sum())  # raises if it is not


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 64, 64, device="meta")])
def test_attention_keeps_no_square_matrix(mask):
    q = torch.randn(2, 4, 64, 16, device="meta", requires_grad=True)
    with Meter() as meter, Accelerator():
        out = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert out.shape == q.shape and meter.live < 2 * 4 * 64 * 64 * 4
    assert meter.flops == 2 * (2 * 4 * 64 * 64 * 16 * 2)
    assert attention(q.bfloat16(), q.bfloat16(), q.bfloat16()).dtype == torch.bfloat16


def test_the_meter_sees_what_lives_and_what_is_gone():
    with Meter() as meter:
        a = torch.zeros(1000)
        b = a * 2
        view = b[:10]
        assert meter.live == 8000
        del a, b
        assert meter.live == 4000, "the view keeps its storage"
        del view
    assert meter.live == 0 and meter.peaks["", None][0] == 8000


CUDA = """
import json, sys, torch, weigh
from distill.inspect.plan import plan, machine_of
from distill.training.trainer import fit
from distill.training.experiment import build_experiment
found = {}
for name in weigh.METHODS:
    cfg = weigh.recipe(name, accelerator="cuda")
    cfg.roles.teacher.net |= {"width": 512, "heads": 8, "depth": 8}
    cfg.data.batch_size = 64
    rows = plan(cfg, machine_of("32", 1, "h100"))["rows"]
    planned = next(r["total"] for r in rows if r["strategy"] == "single" and r["layout"] == "full")
    session = build_experiment(cfg)
    torch.cuda.reset_peak_memory_stats()
    fit(session.method, session.data, 6, engine=cfg.engine)
    found[name] = planned, torch.cuda.max_memory_allocated()
    del session
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to compare with torch.cuda.max_memory_allocated")
def test_a_gpu_takes_what_was_planned():
    out = subprocess.check_output([sys.executable, "-c", CUDA], text=True, cwd=weigh.Path(weigh.__file__).parent)
    for name, (planned, measured) in json.loads(out.splitlines()[-1]).items():
        assert planned == pytest.approx(measured, rel=0.15), name


def test_networks_that_need_values_are_run(monkeypatch):
    from distill.inspect.plan import machine_of, plan
    from distill.models.small import Transformer

    inner = Transformer.forward

    def asks(self, x, *rest, **kw):
        return inner(self, x, *rest, **kw) if float(x.abs().max()) > 0 else x

    monkeypatch.setattr(Transformer, "forward", asks)
    found = plan(weigh.recipe("consistency"), machine_of("32", 1))
    assert "run as they are" in found["notes"][0]
    monkeypatch.undo()
    assert found["flops"] == plan(weigh.recipe("consistency"), machine_of("32", 1))["flops"]

"""What every method keeps, found by itself: each Method in distill/methods and each recipe in configs/toy."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch

from distill import config, methods
from distill.denoise import Denoiser, Gaussian
from distill.errors import BadInput
from distill.inspect import curves
from distill.inspect.measure import toy_scores
from distill.metrics.training_free import Counted
from distill.models.small import MLP, Transformer
from distill.noise import VE, RectifiedFlow
from distill.training import checkpoints
from distill.training.experiment import build_experiment
from distill.training.run import train

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs" / "toy").glob("*.yaml"))
STEPS = 4


def small(recipe: Path, *overrides: str):
    """A toy recipe, shortened: one step of warm start, few samples."""
    cfg = config.load([recipe], ["log.wandb=disabled", "train.threads=1", *overrides])
    cfg.data.batch_size = 16
    cfg.method.pop("warm_start", None)
    return cfg


def by_hand(experiment, until: int = STEPS, resume: dict | None = None):
    """Train a run of STEPS steps without a trainer, up to step `until`."""
    method = experiment.method
    optimizers = method.configure_optimizers()
    method.optimizers = lambda: optimizers
    method.manual_backward = lambda loss: loss.backward()
    method.total_steps = STEPS
    if resume:
        method.restore(resume)
    for batch in experiment.data.loader(start=method.step):
        if method.step == until:
            return
        method.training_step(batch)


def state(module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_only_the_role_in_turn_moves(recipe):
    experiment = build_experiment(small(recipe))
    method, log = experiment.method, []
    inner, watched = method._update, (*method.trainable, *method.frozen)

    def update(role, value):
        assert torch.isfinite(value), role
        before = {r: state(getattr(method, r)) for r in watched}
        needing = {r for r in method.trainable if any(p.requires_grad for p in getattr(method, r).parameters())}
        inner(role, value)
        after = {r: state(getattr(method, r)) for r in watched}
        log.append((role, {r for r in watched if not same(before[r], after[r])}, needing))

    method._update = update
    by_hand(experiment)
    assert log and {role for role, _, _ in log} <= set(method.trainable)
    for role, moved, needing in log:
        assert moved == {role}, f"{role}'s turn moved {moved}"
        assert needing == {role}, f"in {role}'s turn {needing} required gradients"
    assert {role for role, _, _ in log} == set(method.trainable), "a trainable role never had a turn"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_resumed_run_equals_an_uninterrupted_one(recipe, tmp_path):
    whole, first, second = (build_experiment(small(recipe)) for _ in range(3))
    torch.manual_seed(0)
    by_hand(whole)
    torch.manual_seed(0)
    by_hand(first, STEPS // 2)
    saved = checkpoints.save(tmp_path, first.method.snapshot())
    torch.manual_seed(999)  # a new process is elsewhere in its random stream
    by_hand(second, STEPS, checkpoints.load(saved))
    assert second.method.step == STEPS
    for role in (*whole.method.trainable, "ema"):
        assert same(state(getattr(whole.method, role)), state(getattr(second.method, role))), role


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_sampling_costs_k_evaluations_for_points_and_images(recipe):
    method = build_experiment(small(recipe)).method
    images = image_twin(recipe)
    for m, z in ((method, torch.randn(5, *method.shape)), (images, torch.randn(5, 1, 4, 4))):
        m.ema = Counted(m.ema)
        x = m.sample(z, {}, generator=torch.Generator().manual_seed(0))
        assert x.shape == z.shape and torch.isfinite(x).all()
        assert m.ema.evaluations == m.grid.steps


def image_twin(recipe: Path):
    """The recipe's method with small image networks in every role that the method does not make itself."""
    cfg = small(recipe)
    cls = config.resolve(cfg.method["_target_"])
    extra = {"guided": True} if "guided" in str(cfg.roles) else {}
    extra |= {"flow_map": True} if "flow_map" in str(cfg.roles) else {}
    net = Transformer(size=4, channels=1, patch=2, width=16, depth=1, heads=2, **extra)
    net = Denoiser(net, RectifiedFlow(), "flow")
    roles = {r: copy.deepcopy(net) for r in ("teacher", "student") if r in cls.trainable + cls.frozen}
    return config.build(cfg.method, (), "method", roles=roles, optim={})


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_misspelt_key_raises_with_a_suggestion(recipe):
    cfg = small(recipe)
    known = next(k for k in cfg.method if k != "_target_")
    cfg.method[known + "e"] = 1
    with pytest.raises(BadInput, match=f"method.{known}e.*Did you mean"):
        build_experiment(cfg)


@pytest.mark.parametrize("name", methods.names())
def test_a_method_names_its_source_and_has_a_toy_and_a_page(name):
    module = importlib.import_module(methods.names()[name])
    assert re.search(r"https?://arxiv\.org/abs/\d{4}\.\d{4,5}", module.__doc__), "no source in the module's docstring"
    used = [p for p in RECIPES if f"distill.methods.{name}" in p.read_text()]
    assert used, f"no toy recipe in configs/toy trains {name}"
    page = ROOT / "docs" / "methods" / f"{module.__name__.rsplit('.', 1)[1]}.md"
    assert page.exists(), f"{name} has no page {page.relative_to(ROOT)}"


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_short_and_imports_no_other(name):
    source = Path(importlib.import_module(methods.names()[name]).__file__).read_text()
    assert len(source.splitlines()) <= 160
    assert not re.search(r"distill\.methods\.(?!base\b)", source), "a method imports another"


SOON = ("teacher", "tdm", "consistency")  # the other toy runs are `make test-all`


# What these alarms say is so: pairs pull diffusion_dpo into one mode, four guided steps narrow diversity, and the norm of sct's
# gradient jumps once while the tangent warms up. All other toys raise none.
LOUD = {"diffusion_dpo": {"collapse", "contrast"}, "diversity": {"collapse", "mode loss"}, "sct": {"student gradient"}}


RUNS = [pytest.param(p, marks=[] if p.stem in SOON else [pytest.mark.slow]) for p in RECIPES]


@pytest.mark.parametrize("recipe", RUNS, ids=lambda p: p.stem)
def test_the_toy_run_reaches_its_stated_distance(recipe, tmp_path):
    cfg = config.load([recipe], ["log.wandb=disabled", "train.threads=1"])
    assert cfg.expect, f"{recipe.name} states no distance"
    experiment = train(cfg, tmp_path / "run")
    scores = toy_scores(experiment)
    for key, bound in cfg.expect.items():
        assert scores[key] <= bound, f"{key} is {scores[key]:.4g}, promised {bound}"
    assert {alarm.kind for alarm in experiment.validation.alarms} == LOUD.get(recipe.stem, set())
    left, _ = curves.compare_run(tmp_path / "run", recipe, metrics=scores)
    assert not left, "; ".join(map(str, left))


def test_a_student_of_an_exploding_schedule_starts_from_its_own_noise():
    oracle = Gaussian([0.0], 0.5, VE())
    method = methods.Diffusion({"student": Denoiser(oracle_net(oracle), VE(), "x")}, grid=64)
    x = method.sample(torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)), {})
    assert x.std().item() == pytest.approx(0.5, rel=0.1)


def oracle_net(oracle):
    """The oracle as a network, so that it has the attributes that a method asks of one."""
    net = MLP(dim=1, width=8, depth=1)
    net.forward = lambda x, t, **_: oracle(x, t)
    return net

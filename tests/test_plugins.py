"""Objects from outside distill: by an entry point, by --allow, and what a saved run may bring back of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from click.testing import CliRunner

import distill as distill_package
from distill import config
from distill.cli import main
from distill.config import plugins
from distill.errors import BadInput
from distill.models.diffusers import FAMILIES, Family, encode, load, register_family
from distill.models.diffusers import tiny_parts as twins

CLASS = '''
"""Regression of the student on the teacher at random times."""
import torch
from distill.losses.regression import mse
from distill.methods import Method

class Regression(Method):
    """L = E |student(x_t, t) - teacher(x_t, t)|^2.

    Args:
        floor: smallest t.
        base: arguments of Method.
    """

    def __init__(self, roles, *, floor: float = 0.0, **base):
        super().__init__(roles, **base)
        self.floor = floor

    def turns(self, step):
        yield "student", self.loss

    def loss(self, x, z, cond):
        t = self.floor + (1 - self.floor) * torch.rand(len(x), device=x.device)
        x_t = self.student.schedule.add_noise(x, t, z)
        with torch.no_grad():
            target = self.teacher(x_t, t, **cond)
        return mse(self.student(x_t, t, **cond), target)
'''
RECIPE = """
# Regression on the digits' teacher.
base: digits/base
name: outside
method: {_target_: PACKAGE.regression.Regression, grid: 2, floor: 0.01}
data: {batch_size: 8}
train: {steps: 2, threads: 1, log_every: 1}
log: {wandb: disabled}
eval: {samples: 60, validation_samples: 20, evaluations: [2]}
"""
PAGE = "# Regression\n\nMatches the teacher's E[x | x_t] at every t.\n"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Each test runs in an empty folder, from which packages are imported; no disk is waited for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(plugins, "imported", [])
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def distill(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def package(name: str, entry_point: bool = False) -> Path:
    """A method from outside, in three files: class, recipe, page. With `entry_point`, as an installed plugin."""
    folder = Path(name)
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "regression.py").write_text(CLASS)
    (folder / "regression.yaml").write_text(RECIPE.replace("PACKAGE", name))
    (folder / "regression.md").write_text(PAGE)
    if entry_point:
        install(name)
    return folder


def install(name: str, module: str = "regression:Regression") -> None:
    """What an installer leaves of a distribution with an entry point."""
    about = Path(f"{name}_dist-1.0.dist-info")
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[distill.plugins]\nany = {name}.{module}\n")
    plugins._installed.cache_clear()


def refuses(result, *says: str) -> None:
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, (result.output, result.exception)
    for text in says:
        assert text in result.stderr


def test_an_entry_point_allows_its_top_level_package_and_no_other():
    package("installed_one", entry_point=True)
    package("lying_about")
    assert "installed_one" in plugins.installed() and "lying_about" not in plugins.installed()
    assert config.resolve("installed_one.regression.Regression").__name__ == "Regression"
    with pytest.raises(BadInput, match="--allow lying_about"):
        config.resolve("lying_about.regression.Regression")
    with pytest.raises(BadInput, match="comes from outside distill"):
        config.resolve("installed_one.regression.torch.load")


TOY = """
name: a
roles:
  teacher: {_target_: distill.denoise.GaussianMixture.ring, schedule: {_target_: distill.noise.RectifiedFlow}}
  student:
    _target_: distill.denoise.Denoiser
    net: {_target_: distill.models.small.MLP, dim: 2, width: 8, depth: 1}
    schedule: {_target_: distill.noise.RectifiedFlow}
    prediction: flow
method: {_target_: PACKAGE.regression.Regression, grid: 2}
data: {_target_: distill.data.toy.Samples, source: "${roles.teacher}", batch_size: 16, classes: 0}
train: {steps: 2, threads: 1, log_every: 1}
log: {wandb: disabled}
eval: {samples: 200, validation_samples: 40, evaluations: [2]}
"""


def toy(name: str) -> str:
    """A config of two-dimensional points for the package's method."""
    Path("toy.yaml").write_text(TOY.replace("PACKAGE", name))
    return "toy.yaml"


def test_allow_stands_before_or_after_the_verb_and_is_recorded():
    package("twice_allowed")
    refuses(
        distill("train", toy("twice_allowed")),
        "'twice_allowed.regression.Regression' is outside distill",
        "--allow twice_allowed",
    )
    before = distill("--allow", "twice_allowed", "train", toy("twice_allowed"), "name=before")
    after = distill("train", toy("twice_allowed"), "name=after", "--allow", "twice_allowed")
    for name, result in (("before", before), ("after", after)):
        assert result.exit_code == 0, (result.output, result.exception)
        assert config.read(f"runs/{name}/config.yaml").allow == ["twice_allowed"]


def test_a_saved_run_grants_nothing_to_a_package_without_an_entry_point():
    package("named_again")
    assert distill("train", toy("named_again"), "--allow", "named_again", "name=a").exit_code == 0
    before = tiny.files(Path("runs"))
    says = ("runs/a was trained with objects of the package 'named_again'", "add --allow named_again again")
    for verb in (("sample", "runs/a", "a.png"), ("eval", "runs/a"), ("export", "runs/a", "out"), ("report", "runs/a")):
        refuses(distill(*verb), *says)
    refuses(distill("train", toy("named_again"), "name=a", "--resume"), "--allow named_again")
    assert tiny.files(Path("runs")) == before
    assert distill("sample", "runs/a", "a.png", "--allow", "named_again").exit_code == 0
    install("named_again")
    assert distill("sample", "runs/a", "b.png").exit_code == 0
    assert distill("train", toy("named_again"), "name=a", "train.steps=3", "--resume").exit_code == 0


def test_what_a_config_says_under_allow_grants_nothing():
    package("selfmade")
    refuses(distill("train", toy("selfmade"), "allow=[selfmade]"), "--allow selfmade")
    assert not Path("runs").exists()


@pytest.mark.parametrize("target", ["distill.training.records.Alarms", "distill.config.build", "os.remove"])
def test_a_hostile_run_folder_is_refused_by_every_verb(target):
    package("harmless", entry_point=True)
    assert distill("train", toy("harmless"), "name=a").exit_code == 0
    cfg = config.read("runs/a/config.yaml")
    cfg.data, cfg.allow = {"_target_": target, "path": "victim", "allow": ["os"]}, ["os", "harmless"]
    config.save(cfg, "runs/a/config.yaml")
    Path("victim").write_text("mine")
    before = tiny.files(Path("."))
    for verb in (
        ("sample", "runs/a", "a.png"),
        ("eval", "runs/a"),
        ("export", "runs/a", "out"),
        ("report", "runs/a"),
        ("merge", "runs/a", "runs/a", "out"),
        ("train", "runs/a/config.yaml", "name=a", "--resume"),
        ("train", "runs/a/config.yaml", "name=b"),
        ("check", "runs/a/config.yaml"),
        ("bench", "runs/a/config.yaml"),
        ("plan", "runs/a/config.yaml"),
    ):
        named_again = target == "os.remove" and verb[1] == "runs/a"
        outside = "is outside distill" if target == "os.remove" else "cannot be used in a config"
        refuses(distill(*verb), "--allow os again" if named_again else outside)
    assert tiny.files(Path(".")) == before


def test_a_method_from_outside_is_three_files_and_trains_evaluates_and_exports():
    folder = package("three_files", entry_point=True)
    assert sorted(p.name for p in folder.iterdir()) == [
        "__init__.py",
        "regression.md",
        "regression.py",
        "regression.yaml",
    ]
    assert distill("data", "digits", "data/digits").exit_code == 0
    for verb in (
        ("train", folder / "regression.yaml", "--no-check"),
        ("sample", "runs/outside", "a.png", "-n", "4"),
        ("eval", "runs/outside"),
        ("export", "runs/outside", "student"),
    ):
        result = distill(*verb)
        assert result.exit_code == 0, (verb, result.output, result.exception)
    assert set(json.loads(Path("runs/outside/metrics.json").read_text())["student"]) == {"2"}
    assert json.loads(Path("student/distill.json").read_text())["method"] == "Regression"
    shutil.rmtree("three_files_dist-1.0.dist-info")


FAMILY = '''
"""AuraFlow. Conditions: text."""
from distill.models.diffusers import Family, register_family

def call(net, x, time, text):
    return net.stock(x, encoder_hidden_states=text, timestep=time).sample

def encode_prompt(encode, prompts, pipeline):
    return {"text": encode(prompt=prompts, device="cpu", do_classifier_free_guidance=False)[0]}

FAMILY = Family(
    network="AuraFlowTransformer2DModel",
    call=call,
    encode_prompt=encode_prompt,
    embeddings=("time_step_proj",),
    model_time="n / N",
)
register_family(FAMILY)
'''
AURAFLOW = """
name: a
roles:
  teacher: {_target_: distill.models.diffusers.loading.load, path: pipeline, size: [8, 8]}
  student: teacher
method: {_target_: distill.methods.TDM, grid: 2, warm_start: 0}
data: {_target_: distill.data.shards.Shards, path: prompts/train, batch_size: 2}
train: {steps: 1, threads: 1, validate_every: 0}
log: {wandb: disabled}
eval: {samples: 2, validation_samples: 2, evaluations: [2]}
"""


def auraflow() -> None:
    """A tiny AuraFlow in the folder `pipeline`."""
    torch.manual_seed(2)
    sizes = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=16, **sizes
    )
    diffusers.AuraFlowPipeline(
        tokenizer=twins.t5_tokenizer(),
        text_encoder=twins.t5(16, umt5=True),
        vae=twins.vae(),
        transformer=twins.shake(network, 0.05),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    ).save_pretrained("pipeline")


@pytest.fixture
def families():
    """What a test registers is forgotten after it."""
    kept = dict(FAMILIES)
    yield FAMILIES
    FAMILIES.clear()
    FAMILIES.update(kept)


def flow_package(name: str) -> Path:
    package(name)
    Path(name, "flow.py").write_text(FAMILY)
    Path(name, "__init__.py").write_text(f"import {name}.flow\n")
    return Path(name)


def test_a_family_from_outside_loads_encodes_trains_and_exports(families):
    auraflow()
    flow_package("flow_allowed")
    with pytest.raises(BadInput, match="its network is AuraFlowTransformer2DModel, .* add --allow PACKAGE"):
        load("pipeline")
    Path("p.txt").write_text("a cat\na dog\n")
    Path("a.yaml").write_text(AURAFLOW)
    outside = ("--allow", "flow_allowed")
    for verb in (
        (
            "data",
            "prompts",
            "p.txt",
            "prompts",
            "--pipeline",
            "pipeline",
            "--length",
            "8",
            *"--workers 2 --per-shard 1".split(),
        ),
        ("train", "a.yaml", "--no-check"),
        ("sample", "runs/a", "a.png", "-n", "2"),
        ("export", "runs/a", "student"),
        ("verify", "student"),
    ):
        result = distill(*verb, *outside)
        assert result.exit_code == 0, (verb, result.output, result.exception)
    assert config.read("runs/a/config.yaml").allow == ["flow_allowed"]
    assert json.loads(Path("student/distill.json").read_text())["network"] == "AuraFlowTransformer2DModel"


def test_a_family_of_an_installed_plugin_is_found_when_a_folder_needs_it(families):
    auraflow()
    flow_package("flow_installed")
    Path("flow_installed", "__init__.py").write_text("")
    install("flow_installed", "flow")
    denoiser = load("pipeline", size=(8, 8))
    assert denoiser.net.family.origin == "flow_installed.flow"
    out = denoiser(torch.randn(1, 4, 8, 8), torch.ones(1), **encode("pipeline", ["a cat"]))
    assert out.shape == (1, 4, 8, 8)
    with pytest.raises(BadInput, match="flow_installed.flow supports AuraFlowTransformer2DModel already"):
        register_family(dataclasses.replace(denoiser.net.family, sign=-1))
    with pytest.raises(BadInput, match="is no family; pass a distill.models.diffusers.Family"):
        register_family(dict)
    with pytest.raises(BadInput, match="the family of Allegro has no `call`"):
        register_family(Family(network="Allegro"))


def test_a_plugin_that_cannot_be_imported_is_named(families):
    auraflow()
    package("broken_one")
    install("broken_one", "absent")
    with pytest.raises(BadInput, match="the installed plugin 'broken_one.absent' cannot be imported"):
        load("pipeline")
    refuses(distill("recipes", "--allow", "nowhere_at_all"), "--allow nowhere_at_all: the package", "is not installed")


METRIC = """
class Length:
    def __call__(self, x, data=None, **cond):
        return x.flatten(1).norm(dim=1)
"""


@pytest.mark.parametrize("entry_point", [False, True], ids=["allowed", "installed"])
def test_a_metric_from_outside_is_measured(entry_point):
    name = f"measured_{entry_point}".lower()
    recipe = package(name, entry_point) / "regression.yaml"
    Path(name, "length.py").write_text(METRIC)
    assert distill("data", "digits", "data/digits").exit_code == 0
    train = ("train", recipe, "--no-check", f"eval.metrics.length_score._target_={name}.length.Length")
    if not entry_point:
        refuses(distill(*train, "method={_target_: distill.methods.TDM, grid: 2}"), f"--allow {name}")
    outside = () if entry_point else ("--allow", name)
    for verb in (train, ("eval", "runs/outside")):
        result = distill(*verb, *outside)
        assert result.exit_code == 0, (verb, result.output, result.exception)
    measured = json.loads(Path("runs/outside/metrics.json").read_text())["student"]["2"]
    samples = distill_package.open_run("runs/outside", outside[1:]).sample(60)
    assert measured["length_score"] == pytest.approx(float(samples.flatten(1).norm(dim=1).mean()), rel=0.2)

"""Every recipe of a published model: at its real size without weights, and trained for two steps on its tiny twin."""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path

import published
import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from distill import config
from distill.cli import main
from distill.denoise import network_of
from distill.errors import BadInput
from distill.inspect.check import findings
from distill.inspect.check.base import CheckContext, first_samples
from distill.inspect.check.updates import DryRun
from distill.models.diffusers import folder, load, tiny
from distill.models.diffusers import loading as teacher
from distill.models.heads import FeatureExtractor, Head
from distill.training import experiment as experiment
from distill.training.experiment import build_experiment
from distill.training.run import train

CONFIGS = Path(__file__).parents[1] / "configs"
FAMILIES = ("sd15", "sdxl", "pixart", "sd3", "flux", "sana", "cogvideox", "wan")
RECIPES = [f"{family}/{method}" for family in FAMILIES for method in ("lcm_lora", "dmd2", "tdm")]
RECIPES += [f"sd15/{method}" for method in ("tdm_lora", "dmd2_lora", "scm", "guidance", "dpo", "diversity")]


@pytest.fixture(autouse=True, scope="module")
def cheap(tmp_path_factory):
    """Tiny pipelines go to a folder of the tests, and no test waits for a busy disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(os, "fsync", lambda file: None)
        yield


def test_each_is_a_small_difference_and_says_what_it_follows():
    assert sorted(
        f"{p.parent.name}/{p.stem}" for f in FAMILIES for p in (CONFIGS / f).glob("*.yaml") if p.stem != "base"
    ) == sorted(RECIPES)
    page = (CONFIGS.parent / "docs" / "recipes.md").read_text()
    for name in RECIPES:
        lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
        said = " ".join(line for line in lines if line.startswith("#"))
        assert len([line for line in lines if not line.startswith("#")]) <= 25, name
        assert "Not reproduced here." in said and "Expected cost: about" in said, name
        hours = said.split("Expected cost: about ")[1].split(" A100")[0]
        assert re.search(rf"\[{name}\].* \| {hours} \| [0-9,]* \|", page), (name, hours)
        assert "https://" in said or "No published row" in said, name


# -- at its real size ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    """The network of the last recipe, for the next one of its model."""
    return {}


@pytest.fixture
def meta(made, tmp_path_factory, monkeypatch):
    """`load` without weights: the hub's files are configs, and networks are on the meta device."""
    root = tmp_path_factory.mktemp("hub")

    def fetched(path, revision=None, more=()):
        out = root / path
        return out if out.exists() else published.folder(out, path)

    def weights(kind, path, dtype):
        settings = folder.read_json(path / "config.json")
        if made.get("settings") != settings:
            with torch.device("meta"):
                made.update(settings=settings, network=kind.from_config(settings).to(dtype))
        return made["network"]

    for placement in (folder, teacher):
        monkeypatch.setattr(placement, "folder_of", fetched)
    monkeypatch.setattr(teacher, "load_weights", weights)
    monkeypatch.setattr(
        teacher, "_encode_null", lambda *asked: pytest.fail("a text encoder was asked; the shards hold the null")
    )


AT_ONCE = ("tdm", "sd15/lcm_lora", "sd15/tdm_lora")  # the others are `make test-all`
SIZED = [pytest.param(name, marks=[] if name.endswith(AT_ONCE) else [pytest.mark.slow]) for name in RECIPES]


@pytest.mark.parametrize("name", SIZED)
def test_at_its_real_size(name, meta):
    """Shapes, conditions, adapter targets and layers resolve; the network has the published number of parameters."""
    cfg = config.load([CONFIGS / f"{name}.yaml"])
    assert cfg.roles.teacher["null"] is None
    model = published.MODELS[cfg.roles.teacher.path][1]
    shape, conditions, billions = model.shape, model.conditions, model.parameters
    recipe = cfg.data.path
    assert recipe.startswith(f"data/{name.split('/')[0]}")
    cfg.data = {
        "_target_": "distill.data.toy.Tensors",
        "shape": list(shape),
        "batch_size": 1,
        "conditions": {k: list(v) for k, v in conditions.items()},
        "samples": not recipe.endswith("prompts/train"),
    }
    if "metric" in cfg.method:  # a reward with weights of its own
        cfg.method.metric = {"_target_": "distill.metrics.rewards.Ink"}
    method = experiment.build_experiment(cfg).method
    network = getattr(method.teacher.net, "net", method.teacher.net).stock
    count = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in method.student.parameters())
    assert abs(count / 1e9 / billions - 1) < (1e-6 if billions != round(billions, 3) else 5e-3)
    lora = cfg.roles.get("layout") == "shared_base"
    guided = network_of(method.student).guided  # has an embedding of w more than the teacher
    assert (
        (0.001 < trained / count < 0.3)
        if lora
        else (trained - count in range(1, 10**7) if guided else trained == count)
    )
    batch = {
        k: torch.empty(1, *s, device="meta", dtype=torch.long if "mask" in k else None) for k, s in conditions.items()
    }
    x, t = torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert method.student(x, t, **batch).shape == x.shape
    if hasattr(method, "head"):
        found = FeatureExtractor(method.critic, method.layers)(x, t, **batch)
        assert [h.shape[-1] for h in found] == method.head.channels
    print(
        f"{name}: {count / 1e9:.3f} B parameters, {trained / 1e6:.1f} M trained, {counter.get_total_flops() / 1e12:.3f} "
        "TFLOP a call"
    )


# -- on its tiny twin ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_on_its_tiny_twin(name, tmp_path):
    cfg = config.load([CONFIGS / f"{name}.yaml"], ["model=tiny"])
    assert cfg.name.endswith("-tiny") and cfg.roles.teacher.path == f"tiny:{name.split('/')[0]}"
    method = train(cfg, tmp_path / "run").method
    assert method.step == 2
    for role in set(method.trainable) - {"head", "balance"}:
        net = getattr(method, role).net
        pairs = (
            ((up, torch.zeros_like(up)) for up in net.up)
            if hasattr(net, "up")
            else zip(net.parameters(), method.teacher.net.parameters())
        )
        assert any(not torch.equal(now, before) for now, before in pairs), role
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("validation/latent_fd")
    assert all(math.isfinite(float(v)) for v in (r.split(",")[column] for r in rows[1:]) if v)
    kept = (tmp_path / "run" / "reference.safetensors").exists()
    assert kept == (not cfg.data.samples) and len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2


def _null_changes_gradients(experiment, folder) -> bool:
    """Whether another null condition changes the gradient of a step."""
    steps = DryRun(CheckContext(experiment, folder, 1, first_samples(experiment.data)))
    before, method = steps.all(), experiment.method
    _, cond = CheckContext(experiment, folder, 1, steps.batch).samples(1)
    draw = torch.Generator().manual_seed(0)
    other = {
        name: torch.randn(v.shape, generator=draw) if v.is_floating_point() else v
        for name, v in method.teacher.null(cond).items()
    }
    for role in (*method.frozen, *method.trainable):
        network_of(getattr(method, role)).set_null(other)
    after = steps.all()
    pairs = [(g, after[role].gradients[n]) for role in before for n, g in before[role].gradients.items()]
    return any(a is not None and not torch.allclose(a, b, rtol=1e-4, atol=0) for a, b in pairs)


@pytest.mark.parametrize("name", SIZED)
def test_the_checks_raise_no_false_alarm_on_its_tiny_twin(name, tmp_path):
    experiment = build_experiment(config.load([CONFIGS / f"{name}.yaml"], ["model=tiny"]))
    found = findings(experiment, tmp_path)
    print(name, *found, sep="\n")
    assert not [str(f) for f in found if f.level == "FAIL"]
    assert {f.name for f in found} >= {"data", "start", "grid", "gradients", "sign", "rates"}
    by_name = {f.name: f for f in found}
    assert by_name["guidance"].level == "ok", "guidance, null condition and text change what the teacher says"
    assert by_name["conditions"].level == "ok", "the text, and guidance where there is some, change what is learnt"
    assert ("and with guidance" in by_name["conditions"].text) == (experiment.method.guidance != 1)
    assert _null_changes_gradients(experiment, tmp_path) == (experiment.method.guidance != 1)
    assert not any("failed to run" in f.text for f in found)
    assert by_name["pipeline"].level == "ok", by_name["pipeline"]


def test_as_a_new_user_would_try_it(tmp_path):
    """The commands of docs/recipes.md: the tiny twin from the command line, with its checks, measured and drawn."""
    ask = CliRunner().invoke
    recipe, runs = str(CONFIGS / "sd15" / "tdm.yaml"), str(tmp_path)
    out = ask(main, ["train", recipe, "model=tiny", "train.steps=3", "--runs", runs])
    assert out.exit_code == 0 and "sd15-tdm-tiny: 3 of 3 steps done" in out.output, out.output
    where = f"{runs}/sd15-tdm-tiny"
    reference = (tmp_path / "sd15-tdm-tiny" / "reference.safetensors").stat().st_mtime_ns
    out = ask(main, ["eval", where])
    assert out.exit_code == 0 and "latent_fd" in out.output, out.output
    assert (tmp_path / "sd15-tdm-tiny" / "reference.safetensors").stat().st_mtime_ns == reference
    out = ask(main, ["sample", where, f"{runs}/few.png", "-n", "4"])
    assert out.exit_code == 0, out.output
    out = ask(main, ["train", recipe, "engine.devices=1", "--runs", runs])
    assert out.exit_code == 2 and "data/sd15-prompts/train does not exist" in out.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15/lcm_lora", "sd3/tdm"])
def test_a_tiny_run_leaves_in_every_form(name, tmp_path):
    """From a recipe to files that stock code reads, by the command line alone; each export is verified as it is written."""
    ask = CliRunner().invoke
    out = ask(main, ["train", str(CONFIGS / f"{name}.yaml"), "model=tiny", "name=run", "--runs", str(tmp_path)])
    assert out.exit_code == 0, out.output
    for kind in ("pipeline", "lora", "single-file", "onnx"):
        out = ask(main, ["export", str(tmp_path / "run"), str(tmp_path / kind), "--as", kind])
        assert out.exit_code == 0 and "loads without distill" in out.output, (kind, out.output)


def test_overrides_come_above_the_twin_and_a_saved_run_is_not_merged_again(tmp_path):
    cfg = config.load([CONFIGS / "sd15" / "tdm.yaml"], ["train.steps=7", "model=tiny", "name=mine"])
    assert (cfg.train.steps, cfg.name, cfg.engine.precision) == (7, "mine", "32") and not cfg.tiny
    config.save(cfg, tmp_path / "config.yaml")
    assert config.load([tmp_path / "config.yaml"], ["model=tiny"]).train.steps == 7
    assert config.load([CONFIGS / "sd15" / "tdm.yaml"]).model == "full"
    with pytest.raises(BadInput, match="has no section 'tiny'.*copy the one of configs/sd15/base.yaml"):
        config.load([CONFIGS / "toy" / "tdm.yaml"], ["model=tiny"])
    with pytest.raises(BadInput, match="'tinny' must be one of full, tiny"):
        config.load([CONFIGS / "sd15" / "tdm.yaml"], ["model=tinny"])


# -- what is wrong, in one sentence --------------------------------------------------------------------------------


def refused(match, *overrides, recipe="sd15/tdm"):
    with pytest.raises(BadInput, match=match):
        experiment.build_experiment(config.load([CONFIGS / f"{recipe}.yaml"], ["model=tiny", *overrides]))


def test_a_recipe_that_cannot_be(tmp_path, monkeypatch):
    refused(
        r"adapter.targets: no linear layer of UNet2DConditionModel matches '\*.to_qq'. Did you mean '\*.to_q'",
        'roles.adapter.targets=["*.to_k","*.to_qq"]',
        recipe="sd15/lcm_lora",
    )
    refused("'tiny:sd14' is not a tiny pipeline. Did you mean 'sd15'", "roles.teacher.path=tiny:sd14")
    refused(r"holds samples of shape \(4, 16, 16\), the network of critic expects \(4, 8, 8\)", "data.shape=[4,16,16]")
    refused("holds no samples, and Consistency trains on them", "data.samples=false", recipe="sd15/lcm_lora")
    with pytest.raises(BadInput, match="needs text: give roles.head: {_target_: distill.models.heads.Head"):
        Head.of(FeatureExtractor(load("tiny:sd15"), "unet.mid_block"), (4, 8, 8))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused(
        "roles.teacher: 'some/body' is neither a local folder nor a model that the hub provides.*download it",
        "roles.teacher.path=some/body",
    )


def test_a_pipeline_without_the_expected_part(tmp_path):
    for part, match in (("unet", "the network's weights .* are missing"), ("text_encoder", "has no text_encoder")):
        there = tmp_path / part
        shutil.copytree(tiny.folder("sd15"), there)
        shutil.rmtree(there / part)
        refused(match, f"roles.teacher.path={there}")

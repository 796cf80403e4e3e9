"""`distill sample`, `distill.sample` and `Run.sample`: devices, dtypes, batches, prompts, labels, folders of images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import distill
from distill import config
from distill.cli import main
from distill.errors import BadInput
from distill.inspect import drawing
from distill.models.diffusers import Latent, Prompts
from distill.training import run

CONFIGS = Path(__file__).parents[2] / "configs"
QUIET = (
    "log.wandb=disabled",
    "train.validate_every=0",
    "train.steps=1",
    "eval.samples=40",
    "eval.validation_samples=8",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A text-conditioned run on latents, a LoRA run, a class-conditional run on pixels, a toy."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("tdm", "lcm_lora"):
        run.train(config.load([CONFIGS / "sd15" / f"{name}.yaml"], ["model=tiny", "name=it", *QUIET]), root / name)
    shards = root / "shards"
    made = CliRunner().invoke(main, ["data", "digits", str(shards)])
    assert made.exit_code == 0, made.output
    pixels = [f"data.path={shards}/train", f"eval.reference.path={shards}/test", "data.batch_size=8", "name=it"]
    run.train(config.load([CONFIGS / "digits" / "tdm.yaml"], [*pixels, *QUIET]), root / "digits")
    run.train(config.load([CONFIGS / "toy" / "tdm.yaml"], ["method.warm_start=0", "name=it", *QUIET]), root / "toy")
    return root


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_of_single_images_by_prompt(runs, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\ntwo dogs\n", encoding="utf-8")
    call = ["sample", str(runs / "tdm"), str(tmp_path / "out"), "--prompt", "a hat"]
    done = CliRunner().invoke(main, [*call, "--prompts", str(tmp_path / "prompts.txt"), "--seed", "4"])
    assert done.exit_code == 0 and "3 samples" in done.output, done.output
    stems = [f"0000{i}-seed4" for i in range(3)]
    assert names(tmp_path / "out") == sorted(f"{stem}.{end}" for stem in stems for end in ("png", "txt"))
    told = [(tmp_path / "out" / f"{stem}.txt").read_text().strip() for stem in stems]
    assert told == ["a hat", "a cat", "two dogs"]
    # what a folder holds is what the student draws from these prompts, decoded by the pipeline
    opened = distill.open_run(runs / "tdm")
    x = opened.sample(seed=4, prompts=told)
    method = opened.experiment.method
    cond = Prompts("tiny:sd15")(told)
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(3, *method.shape, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(x, method.sample(z, cond, generator=generator), rtol=1e-4, atol=1e-3)
    pixels = ((Latent("tiny:sd15").decode(x).clamp(-1, 1) + 1) * 127.5).round()
    for i, stem in enumerate(stems):
        image = torch.tensor(list(Image.open(tmp_path / "out" / f"{stem}.png").tobytes())).reshape(16, 16, 3)
        assert (image.permute(2, 0, 1) - pixels[i]).abs().max() <= 1
    assert not torch.equal(x[0], opened.sample(seed=4, prompts=["something else"] * 3)[0])


def test_latents_are_drawn_in_the_given_number(runs, tmp_path):
    assert distill.sample(runs / "tdm", tmp_path / "few.png", 40).exists()
    assert Image.open(tmp_path / "few.png").width > 6 * 16  # seven columns of 16 pixels, not four
    distill.sample(runs / "tdm", tmp_path / "many", 19)
    assert len(names(tmp_path / "many")) == 19


@pytest.mark.parametrize("name", ["tdm", "lcm_lora", "digits", "toy"])
def test_samples_do_not_depend_on_the_batch_size_and_little_on_the_dtype(runs, name):
    opened = distill.open_run(runs / name)
    whole = opened.sample(6, seed=1, device="cpu")
    assert whole.dtype == torch.float32 and len(whole) == 6
    if opened.experiment.method.serving == "ode":  # others draw anew within a batch
        torch.testing.assert_close(opened.sample(6, seed=1, batch_size=4, device="cpu"), whole, rtol=1e-4, atol=1e-4)
    half = opened.sample(6, seed=1, dtype="bfloat16", device="cpu")
    assert 0 < (half - whole).abs().mean() < 0.1 * whole.abs().mean()
    assert torch.equal(opened.sample(6, seed=1, device="cpu"), whole)  # the run's own weights stay as they are
    assert {p.dtype for p in opened.student.parameters()} == {torch.float32}


def test_the_batch_size_bounds_a_call(runs, monkeypatch):
    opened, seen = distill.open_run(runs / "digits"), []
    inner = type(opened.experiment.method).sample
    monkeypatch.setattr(
        type(opened.experiment.method),
        "sample",
        lambda self, z, *a, **kw: seen.append(len(z)) or inner(self, z, *a, **kw),
    )
    assert len(opened.sample(7, batch_size=3)) == 7 and seen == [3, 3, 1]


def test_labels_are_given_by_name(runs, tmp_path):
    call = ["sample", str(runs / "digits"), str(tmp_path / "out"), "-n", "4", "--label", "7", "--label", "3"]
    done = CliRunner().invoke(main, call)
    assert done.exit_code == 0, done.output
    assert names(tmp_path / "out") == [f"0000{i}-seed0-label{label}.png" for i, label in enumerate((7, 3, 7, 3))]
    opened = distill.open_run(runs / "digits")
    sevens, all_classes = opened.sample(10, labels=[7]), opened.sample(10)
    assert torch.equal(sevens[7], all_classes[7]) and not torch.equal(sevens[3], all_classes[3])
    both, threes = opened.sample(10, labels=[7, 3]), opened.sample(10, labels=[3])
    assert torch.equal(both[::2], sevens[::2]) and torch.equal(both[1::2], threes[1::2])
    distill.sample(runs / "digits", tmp_path / "plain", 11)
    assert names(tmp_path / "plain")[10] == "00010-seed0-label0.png"  # as balanced labels are drawn


def test_samples_and_exports_are_written_to_the_given_folder(runs, monkeypatch):
    """Without an accelerator here: every tensor of the student is asked for on the device `meta`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert drawing.choose_device(None) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert drawing.choose_device(None) == "cuda"
    for name in ("tdm", "lcm_lora", "digits"):
        experiment = distill.open_run(runs / name).experiment
        drawing.move_student(experiment, "meta", "bfloat16")
        assert {(p.device.type, p.dtype) for p in experiment.method.ema.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    "name, kw, words",
    [
        ("tdm", {"labels": [1]}, "takes no class labels"),
        ("digits", {"prompts": ["a cat"]}, "is not conditioned on text; give labels"),
        ("toy", {"prompts": ["a cat"]}, "its samples are points, not images"),
        ("digits", {"labels": [10]}, "label 10 must be from -1 to 9"),
        ("digits", {"labels": [1], "prompts": ["a cat"]}, "prompts or labels, not both"),
        ("digits", {"dtype": "bf16"}, "dtype 'bf16' must be one of float32, bfloat16, float16.*'bfloat16'|float16"),
        ("digits", {"device": "cudda"}, "--device cudda cannot be used"),
        ("digits", {"batch_size": 0}, "batch size 0"),
    ],
)
def test_what_a_student_does_not_take_is_refused(runs, tmp_path, name, kw, words):
    with pytest.raises(BadInput, match=words):
        distill.sample(runs / name, tmp_path / "out", 2, **kw)
    assert not list(tmp_path.iterdir())


def test_points_are_no_images(runs, tmp_path):
    with pytest.raises(BadInput, match="its samples are points, not images"):
        distill.sample(runs / "toy", tmp_path / "out", 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, kind", [("digits", "pipeline"), ("lcm_lora", "lora"), ("tdm", "pipeline")])
def test_exports_in_half_precision_are_verified_once(runs, tmp_path, name, kind, monkeypatch):
    from safetensors import safe_open

    from distill.export import verify as module

    calls = []
    inner = module.stock_differences
    monkeypatch.setattr(module, "stock_differences", lambda *a, **kw: calls.append(a) or inner(*a, **kw))
    out = tmp_path / "student"
    done = CliRunner().invoke(main, ["export", str(runs / name), str(out), "--as", kind, "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert len(calls) == 1 and "in bfloat16 on cpu (at most 0.05)" in done.output
    part = {"lora": "*.safetensors", "pipeline": "unet/*.safetensors"}[kind]
    for file in out.glob(part):
        if file.name == "reference.safetensors":
            continue
        with safe_open(file, "pt") as weights:
            assert {str(weights.get_tensor(key).dtype) for key in weights.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    card = (out / "README.md").read_text()
    assert "dtype=torch.bfloat16" in card and "import torch\n" in card and "| weights | bfloat16 |" in card


@pytest.mark.slow
def test_what_other_libraries_say_and_draw_does_not_come_first(runs, tmp_path):
    """In a real process: no warnings of transformers on optional packages, no bars of components and weights."""
    for verb in (
        ("sample", str(runs / "tdm"), str(tmp_path / "out"), "--prompt", "a cat"),
        ("eval", str(runs / "tdm")),
    ):
        done = subprocess.run([sys.executable, "-m", "distill.cli", *verb], capture_output=True, text=True)
        assert done.returncode == 0 and "torchvision" not in done.stderr and "Loading" not in done.stderr, done.stderr
        assert done.stdout and not done.stdout.startswith("[")

"""Students that are told text, in every kind of export, drawn by stock code that cannot import us."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from distill.errors import BadInput
from distill.export import export, text
from distill.export.snippet import pipeline_tag
from distill.export.verify import stock_differences
from distill.models.diffusers import FAMILIES as CLASSES
from distill.models.diffusers import TensorConditioned, grid_of, load, tiny_parts
from distill.models.diffusers import tiny as families
from distill.models.lora import SharedBase
from distill.times import Grid

SIGMA = families.builders()["pixart_sigma"]
FAMILIES = {  # how it is built, and how it is loaded
    "sd1": (families.builders()["sd15"], {}),
    "sd2-v": (families.builders()["sd2"], {}),
    "sdxl": (families.builders()["sdxl"], {}),
    "pixart-alpha": (families.builders()["pixart"], {"size": (8, 8)}),
    "pixart-sigma": (SIGMA, {}),
    "sd3": (families.builders()["sd3"], {}),
    "flux-dev": (families.builders()["flux"], {"size": (8, 8)}),
    "flux-schnell": (families.builders()["flux_schnell"], {"size": (8, 8)}),
    "sana": (families.builders()["sana"], {"size": (16, 16)}),
    "wan": (families.builders()["wan"], {"size": (2, 4, 4)}),
    "ltx": (families.builders()["ltx"], {"size": (2, 2, 2)}),
    "cogvideox-2b": (families.builders()["cogvideox"], {}),
    "cogvideox-5b": (families.builders()["cogvideox_5b"], {}),
    "z-image": (families.builders()["z_image"], {"size": (8, 8)}),
}
LORA = (
    "sd1",
    "sd2-v",
    "sdxl",
    "pixart-alpha",
    "pixart-sigma",
    "sd3",
    "flux-dev",
    "flux-schnell",
    "sana",
    "wan",
    "ltx",
    "cogvideox-2b",
    "cogvideox-5b",
    "z-image",
)
FILE = ("sd1", "sd2-v", "sdxl", "sd3", "flux-dev", "sana", "wan", "ltx", "z-image")
QUICK = {  # kinds that every run of the tests proves; the rest is slow
    "pipeline-ode": FAMILIES,
    "pipeline-renoise": ("sd1", "sd3", "flux-dev"),
    "lora-ode": ("sd1", "sd3"),
    "single-file-ode": ("sdxl", "wan"),
}


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """A function that gives a family's folder, made once."""
    root = tmp_path_factory.mktemp("teachers")

    def folder(name):
        if not (root / name).exists():
            FAMILIES[name][0]().save_pretrained(root / name)
        return root / name

    return folder


def student(teachers, name, adapter=False, **kw):
    """A student that is not its teacher; as an adapter, with alpha other than rank."""
    one = load(teachers(name), **FAMILIES[name][1] | kw)
    if adapter:
        one.net = SharedBase(one.net, rank=3, alpha=6, targets="unet.*" if one.net.part == "unet" else "transformer.*")
        one = copy.deepcopy(one)
    tiny_parts.shake(one.net, 0.2 if adapter else 0.03, seed=9)
    return one


def ship(teachers, out, jobs):
    """Exports of (kind, sampler, family), proven in one process: name -> difference."""
    folders = {}
    for kind, sampler, name in jobs:
        one = student(teachers, name, kind == "lora")
        key = f"{name} {kind} {sampler}"
        folders[key] = export(one, 4, sampler, out / key.replace(" ", "-"), kind=kind, w=2.0)
    return dict(zip(folders, stock_differences(list(folders.values())))), folders


def jobs_of(table):
    return [(*kind.rsplit("-", 1), name) for kind, names in table.items() for name in names]


@pytest.fixture(scope="module")
def shipped(teachers, tmp_path_factory):
    return ship(teachers, tmp_path_factory.mktemp("shipped"), jobs_of(QUICK))


def judge(found, folders):
    assert len(found) == len(folders)
    for key, value in found.items():
        print(f"{key}: {value if isinstance(value, str) else format(value, '.1e')}")
    for key, value in found.items():
        assert not isinstance(value, str) and value < 1e-5, (key, value)
        samples = load_file(folders[key] / "reference.safetensors")["samples"]
        assert samples.std() > 0.1 and samples.isfinite().all(), key


def test_stock_pipelines_draw_the_trainers_samples(shipped):
    judge(*shipped)


@pytest.mark.slow
def test_every_kind_of_every_family(teachers, tmp_path):
    rest = {
        "pipeline-renoise": [n for n in FAMILIES if n not in QUICK["pipeline-renoise"]],
        "lora-ode": [n for n in LORA if n not in QUICK["lora-ode"]],
        "lora-renoise": ("sdxl", "sana"),
        "single-file-ode": [n for n in FILE if n not in QUICK["single-file-ode"]],
        "single-file-renoise": ("sd1", "wan"),
    }
    judge(*ship(teachers, tmp_path, jobs_of(rest)))


def test_the_folder_is_the_teachers_with_another_network_and_scheduler(shipped, teachers):
    found, folders = shipped
    for name in ("sd1", "sd3"):
        out, base = folders[f"{name} pipeline ode"], teachers(name)
        part = json.loads((out / "distill.json").read_text())["part"]
        for file in base.rglob("*"):
            here = out / file.relative_to(base)
            if file.is_file() and file.parent.name not in (part, "scheduler") and file.parent != base:
                assert here.read_bytes() == file.read_bytes(), file
                linked = file.suffix == ".safetensors"
                assert (here.stat().st_ino == file.stat().st_ino) == linked, file
        assert str(base) not in "".join(p.read_text() for p in out.rglob("*/*.json"))


def test_the_record_and_the_card_say_how_to_call_it(shipped):
    _, folders = shipped
    calls = {key: json.loads((out / "distill.json").read_text()) for key, out in folders.items()}
    assert calls["sd1 pipeline ode"]["call"] == {"num_inference_steps": 4}  # guidance is off in the network
    assert calls["sd1 pipeline renoise"]["call"] == {}  # LatentConsistencyModelPipeline has four steps
    assert calls["sd3 pipeline ode"]["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert calls["sd1 lora ode"]["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert calls["flux-dev pipeline ode"]["call"] == {"num_inference_steps": 4, "height": 16, "width": 16}
    assert calls["sd3 pipeline ode"]["shift"] == 3.0 and calls["sd3 pipeline ode"]["times"] == [1, 0.75, 0.5, 0.25, 0]
    for key, out in folders.items():
        readme = (out / "README.md").read_text()
        code = readme.split("```")[1].removeprefix("python\n")
        compile(code, key, "exec")
        assert "distill" not in code and "![samples](samples.png)" in readme and "2, in the weights" in readme, key
        for word, value in calls[key]["call"].items():
            assert f"{word}={value!r}" in code, (key, word)
    wan = folders["wan pipeline ode"]
    assert "text-to-video" in (wan / "README.md").read_text()


def test_a_bare_call_of_the_lcm_pipeline_is_right(shipped):
    _, folders = shipped
    out = folders["sd1 pipeline renoise"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    asked, forward = [], pipe.unet.forward
    pipe.unet.forward = lambda x, t, **kw: asked.append((len(x), int(t))) or forward(x, t, **kw)
    pipe("a cat", output_type="latent")
    assert asked == [(1, 999), (1, 749), (1, 499), (1, 249)]


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("even", [False, True])
def test_flow_schedulers_serve_uniform_grids_under_any_shift(shift, even):
    from distill.denoise import Denoiser
    from distill.export.schedulers import flow_scheduler, served_sigmas
    from distill.noise import RectifiedFlow

    net = torch.nn.Linear(1, 1)
    net.timesteps = 1000
    one = Denoiser(net, RectifiedFlow(shift), "flow")
    for steps in (1, 2, 3, 4, 8):
        for sampler in ("ode", "renoise"):
            scheduler, call = flow_scheduler(one, Grid.uniform(steps), sampler, even, False)
            times = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
            wanted = shift * times / (1 + (shift - 1) * times)
            assert call == {} and (served_sigmas(scheduler, steps, even) - wanted).abs().max() < 1e-6
    plain = grid_of("FlowMatchEulerDiscreteScheduler", 4, shift=shift)
    if not even:  # the stock class's own spacing, under its own shift
        assert flow_scheduler(one, plain, "ode", even, False)[0].config.shift == shift
    odd = Grid.of([1, 0.9, 0.2, 0.1, 0])
    assert flow_scheduler(one, odd, "ode", even, True)[1] == {"sigmas": [1, 0.9, 0.2, 0.1]}
    with pytest.raises(BadInput, match=r"serves \[.*trained on \[1.0, 0.9"):
        flow_scheduler(one, odd, "ode", even, False)


def test_guidance_inputs_fold_and_free_grids_are_named_in_the_call(teachers, tmp_path):
    guided = student(teachers, "sd1", null=None, guided=True, flow_map=True)
    free = student(teachers, "sd3"), Grid.of([1, 0.9, 0.3, 0.2, 0])
    lattice = student(teachers, "sd1"), Grid.of([1, 0.9, 0.25, 0])
    folders = [
        export(guided, 4, "ode", tmp_path / "guided", w=3.0),
        export(*free, "ode", tmp_path / "free"),
        export(*lattice, "renoise", tmp_path / "lattice"),
    ]
    calls = [json.loads((f / "distill.json").read_text())["call"] for f in folders]
    assert "sigmas" in calls[1] and calls[2] == {"num_inference_steps": 3, "timesteps": [999, 899, 249]}
    for value in stock_differences(folders):
        assert not isinstance(value, str) and value < 1e-5, value


@pytest.mark.parametrize(
    "kind, name, kw, words",
    [
        ("lora", "sd1", {}, "full fine-tune has no LoRA.*shared_base"),
        ("single-file", "pixart-sigma", {}, "PixArtTransformer2DModel reads no single file"),
        ("single-file", "cogvideox-2b", {}, "CogVideoXTransformer3DModel reads no single file"),
        ("safetensors", "sd1", {}, "not a kind of export.*lora"),
        ("pipeline", "sd1", {"grid": [1, 0.3, 0]}, "trained on"),
    ],
)
def test_what_has_no_such_form_is_refused_and_leaves_nothing(teachers, tmp_path, kind, name, kw, words):
    with pytest.raises(BadInput, match=words):
        export(student(teachers, name), kw.get("grid", 4), "ode", tmp_path / "out", kind=kind)
    assert not list(tmp_path.iterdir())


def test_stable_audio_has_no_stock_sampler_for_a_grid():
    from distill.denoise import Denoiser
    from distill.export.schedulers import flow_scheduler
    from distill.noise import TrigFlow

    with pytest.raises(BadInput, match="'v' under TrigFlow has no stock scheduler"):
        flow_scheduler(Denoiser(torch.nn.Linear(1, 1), TrigFlow(), "v"), Grid.uniform(4), "ode", False, False)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_bare_call_does(teachers, tmp_path, name):
    """The table of docs/export.md: evaluations and rows of one prompt that `pipe(prompt)` costs without its call."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(export(student(teachers, name), 4, "ode", tmp_path / "out"))
    pipe.set_progress_bar_config(disable=True)
    record = json.loads((tmp_path / "out" / "distill.json").read_text())
    sizes = {k: v for k, v in record["reference"]["call"].items() if k != "num_inference_steps"}
    network, asked = getattr(pipe, record["part"]), []
    forward = network.forward
    network.forward = lambda *args, **kw: (
        asked.append(len(args[0] if args else kw["hidden_states"])) or forward(*args, **kw)
    )
    pipe("a cat", output_type="latent", **sizes)
    default = inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
    print(
        f"{name}: {default} steps of {sum(asked) / default:g} evaluation(s)"
    )  # Wan asks twice, others in a batch of two
    assert sum(asked) == default * (1 if "guidance_scale" not in record["call"] else 2) and default != 4
    asked.clear()
    pipe("a cat", output_type="latent", **sizes | record["call"])
    assert asked == [1] * 4


@pytest.mark.parametrize("name, stock", [("flux", "FluxTransformer2DModel"), ("ltx", "LTXVideoTransformer3DModel")])
def test_a_subclass_of_a_family_is_called_as_its_family(name, stock, monkeypatch):
    """Sigmas of its own pipeline, guidance and number of frames are those that the family states, under any name."""

    def called():
        student = load(f"tiny:{name}", null=None)
        base, grid = text.source(student.net), Grid.uniform(3)
        kind = getattr(diffusers, json.loads((base / "model_index.json").read_text())["_class_name"])
        scheduler, call = text.serving(student, grid, "ode", base)
        return student.net, dict(scheduler.config), text.call_arguments(kind, student.net, grid, call, guided=True)

    family, *expected = called()
    renamed_family = dataclasses.replace(CLASSES[stock], adapter=type("Renamed", (TensorConditioned,), {}))
    monkeypatch.setitem(CLASSES, stock, renamed_family)
    renamed, *found = called()
    assert type(renamed).__name__ == "Renamed" and found == expected
    record = {"base": "a/b", "network": "RenamedTransformer"}
    monkeypatch.setitem(CLASSES, record["network"], renamed_family)
    assert pipeline_tag(record) == ("text-to-video" if family.family.frames else "text-to-image")
    assert ("guidance_scale" in found[1]) == (name != "flux")
    sizes = [text.output_size(net, net.shape) for net in (family, renamed)]
    assert sizes[0] == sizes[1] and ("num_frames" in sizes[0]) == bool(family.family.frames)
    if family.family.frames:
        renamed.family = dataclasses.replace(renamed.family, frames=0)
        with pytest.raises(BadInput, match="The family of LTXVideoTransformer3DModel has no `frames`"):
            text.output_size(renamed, renamed.shape)

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from distill.denoise import Guided
from distill.errors import BadInput
from distill.methods.consistency import Consistency
from distill.methods.tdm import TDM
from distill.models.diffusers import FAMILIES, Family, Geometry, Twin, grid_of, load, scheduler_of, tiny_parts
from distill.models.diffusers import tiny as families
from distill.models.diffusers.prompts import Latent, decode, encode
from distill.noise import TrigFlow
from distill.solvers import DDIM, Ancestral, solve
from distill.times import Grid

PROMPTS, STEPS, W = ["a cat", "two dogs"], 10, 3.5


@dataclass
class Case:
    """A twin that a family declares, with what the family says of the stock call."""

    family: Family
    twin: Twin
    pixels: int = 0  # a side of a latent, by the folder
    served: Any = None  # sigmas of the last call

    @property
    def shape(self):
        return self.twin.shape


CASES = {name: Case(family, twin) for family in FAMILIES.values() for name, twin in family.twins.items() if twin.parity}


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    """(case, stock pipeline, its folder, our Denoiser, initial noise)."""
    case = CASES[request.param]
    pipe = case.twin.build()
    pipe.set_progress_bar_config(disable=True)
    path = tmp_path_factory.mktemp("families") / request.param
    pipe.save_pretrained(path)
    denoiser, case.pixels = load(path, **case.twin.load), Geometry.of(path).pixels
    z = torch.randn(2, *case.shape, generator=torch.Generator().manual_seed(5))
    return case, pipe, path, denoiser, z


def stock(case, pipe, z, steps=STEPS, output="latent"):
    """The stock pipeline called as its users call it, from the noise z."""
    layout, twin = case.family.layout, case.twin
    pixels = case.pixels
    height, width = (pixels * side for side in z.shape[-2:])
    out = pipe(
        list(PROMPTS),
        height=height,
        width=width,
        num_inference_steps=steps,
        latents=layout.pack(z.clone()),
        output_type=output,
        return_dict=False,
        **{case.family.guidance_argument: W - case.family.guidance_offset} | twin.call,
    )[0]
    case.served = getattr(pipe.scheduler, "sigmas", torch.zeros(1)).double()
    return (layout.unpack(out, z.shape) if output == "latent" else out).float()


def conditions(case, path):
    cond = encode(path, PROMPTS)
    if "guidance_scale" in case.twin.call:  # an input of the network
        cond["guide"] = torch.full((2,), case.twin.call["guidance_scale"])
    return cond


@torch.no_grad()
def ours(case, path, denoiser, z, cond):
    """Our DDIM on the times of the stock call: the scheduler's own, evenly spaced ones, or what its last call had."""
    if scheduler_of(path).config.get("shift_terminal"):
        sigma = case.served
        grid = Grid(denoiser.schedule.time(2 * ((1 - sigma).log() - sigma.log())).tolist())
    else:
        grid = Grid.uniform(STEPS) if case.family.even_sigmas else grid_of(path, STEPS)
    return solve(Guided(denoiser, W), z, grid, DDIM(), **cond).float()


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_our_solver_lands_where_the_stock_pipeline_does(family):
    case, pipe, path, denoiser, z = family
    assert denoiser.net.shape[0] == case.shape[0]
    cond, theirs = conditions(case, path), stock(case, pipe, z)
    found = difference(ours(case, path, denoiser, z, cond), theirs)
    print(f"{path.name}: {found:.1e}")
    assert theirs.isfinite().all() and theirs.std() > 0.1
    assert found < 1e-4
    for key, value in cond.items():  # every condition counts, so a forgotten one would show
        broken = cond | {key: torch.ones_like(value) if key.endswith("mask") else torch.zeros_like(value)}
        assert difference(ours(case, path, denoiser, z, broken), theirs) > 1e-3, key


def test_parity_breaks_where_a_convention_does(family, monkeypatch):
    case, pipe, path, denoiser, z = family
    cond, t = encode(path, PROMPTS), torch.tensor([0.9, 0.31])
    asked = partial(Guided(denoiser, W), z, t, **cond)
    right = asked()
    monkeypatch.setattr(denoiser.net, "timestep", lambda t: 500 * t)
    assert difference(asked(), right) > 1e-4
    monkeypatch.undo()
    kept = denoiser.net.null_is_zero
    monkeypatch.setattr(denoiser.net, "null_is_zero", not kept)
    if kept:
        denoiser.net.set_null(encode(path, [""]))
    assert difference(asked(), right) > 1e-4


@torch.no_grad()
def test_any_time_is_answered_and_no_prompt_is_another_condition(family):
    case, pipe, path, denoiser, z = family
    cond = encode(path, PROMPTS)
    null = denoiser.null(cond)
    assert {k: v.shape for k, v in null.items()} == {k: v.shape for k, v in cond.items()}
    assert difference(null["text"], cond["text"]) > 1e-3
    for time in (1.0, 0.5, 0.1234, 0.0):
        t = torch.full((2,), time)
        conditions, untold = denoiser(z, t, **cond), denoiser(z, t, **null)
        assert conditions.shape == z.shape and conditions.isfinite().all()
        assert time == 0 or difference(conditions, untold) > 1e-5
    sizes = denoiser(z[..., :2, :4], t + 0.5, **cond)
    assert sizes.shape == z[..., :2, :4].shape and sizes.isfinite().all()


@torch.no_grad()
def test_student_with_guidance_and_gap_inputs(family):
    case, pipe, path, denoiser, z = family
    cond, t, w, s = (
        encode(path, PROMPTS),
        torch.tensor([0.9, 0.31]),
        torch.tensor([2.0, 2.0]),
        torch.tensor([0.7, 0.11]),
    )
    student = load(path, null=None, guided=True, flow_map=True, **case.twin.load)
    student.load_state_dict(denoiser.state_dict(), strict=False)
    torch.testing.assert_close(student(z, t, w=w, s=s, **cond), denoiser(z, t, **cond), rtol=1e-5, atol=1e-5)
    for part in (student.net.guidance, student.net.gap):
        tiny_parts.shake(part, 0.3)
    conditions = student(z, t, w=w, s=s, **cond)
    assert difference(conditions, denoiser(z, t, **cond)) > 1e-3
    plain = type(denoiser.net).wrap(
        denoiser.net.family, student.net.fold(w=2.0, gap=0.2), schedule=denoiser.schedule, timesteps=1000
    )
    plain.pixels = student.net.pixels
    out = plain(z, t, **cond)
    torch.testing.assert_close(out, student.net(z, t, w=w, s=s, **cond), rtol=1e-4, atol=1e-4)


def test_weights_in_half_precision_and_gradients(family):
    case, pipe, path, denoiser, z = family
    cond, t = encode(path, PROMPTS), torch.tensor([0.9, 0.31])
    half = load(path, null=None, dtype="bfloat16", guided=True, **case.twin.load)
    out = half(z, t, w=2.0, **cond)
    assert out.dtype == torch.float32 and half.net.stock.dtype == torch.bfloat16
    assert difference(out, denoiser(z, t, **cond)) < 0.1
    again = load(path, null=None, checkpointing=True, **case.twin.load).train()
    for model in (denoiser, again):
        model(z, t, **cond).square().mean().backward()
    ours, theirs = (sum(p.grad.abs().sum() for p in m.parameters() if p.grad is not None) for m in (denoiser, again))
    assert ours > 0 and abs(ours - theirs) < 1e-4 * ours
    denoiser.zero_grad()


def test_every_tensor_follows_the_device(family):
    case, pipe, path, denoiser, z = family
    there = copy.deepcopy(denoiser).to("meta")  # where a tensor left behind on the CPU is refused
    cond = {k: v.to("meta") for k, v in encode(path, PROMPTS).items()}
    out = Guided(there, W)(z.to("meta"), torch.tensor([0.9, 0.31], device="meta"), **cond)
    assert out.device.type == "meta" and out.shape == z.shape


@torch.no_grad()
def test_latents_become_the_pixels_of_the_stock_pipeline(family):
    case, pipe, path, denoiser, z = family
    x, pixels = stock(case, pipe, z, steps=2), stock(case, pipe, z, steps=2, output="pt")
    pixels = pixels.transpose(1, 2) if pixels.ndim == 5 else pixels
    latent = Latent(path)
    assert (denoiser.net.latent_scale, denoiser.net.latent_shift) == (latent.scale, latent.shift)
    torch.testing.assert_close((decode(path, x) / 2 + 0.5).clamp(0, 1), pixels, rtol=0, atol=1e-5)
    a = latent.vae.encode(2 * pixels - 1)
    a = a.latent_dist.mean if hasattr(a, "latent_dist") else a.latent
    again = latent.encode(2 * pixels - 1)
    torch.testing.assert_close(latent.vae.decode(a).sample, latent.decode(again), rtol=0, atol=1e-5)


# -- sound ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_stable_audio_without_its_sampler_noise(tmp_path, monkeypatch):
    """Its stock sampler is stochastic: with the noise switched off on both sides it is the posterior's mean."""
    monkeypatch.setitem(
        sys.modules, "torchsde", types.ModuleType("torchsde")
    )  # optional: only its noise comes from there
    from diffusers.schedulers import scheduling_cosine_dpmsolver_multistep as cosine

    monkeypatch.setattr(diffusers, "CosineDPMSolverMultistepScheduler", cosine.CosineDPMSolverMultistepScheduler)
    pipe, path = families.builders()["stable_audio"](), tmp_path / "audio"
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(path)
    monkeypatch.setattr(cosine, "BrownianTreeNoiseSampler", lambda x, *a, **kw: lambda *step: torch.zeros_like(x))
    z = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(5))

    def theirs(output):
        return pipe(PROMPTS, num_inference_steps=STEPS, guidance_scale=W, latents=z.clone(), output_type=output).audios

    denoiser, cond = load(path), encode(path, PROMPTS)
    assert denoiser.schedule == TrigFlow() and denoiser.prediction == "v" and denoiser.net.shape == (3, 8)
    pipe.scheduler.set_timesteps(STEPS)
    times = (2 / math.pi * pipe.scheduler.sigmas.double().atan()).tolist()

    def ours(cond, w=W):
        x = z.double()
        for t, s in zip(times, times[1:]):
            t, s = (torch.full((2,), a, dtype=torch.float64) for a in (t, s))
            x = Ancestral()(Guided(denoiser, w), x, t, s, noise=torch.zeros_like(x), **cond)
        return x.float()

    latents = theirs("latent")
    found = difference(ours(cond), latents)
    print(f"stable-audio: {found:.1e}")
    assert latents.std() > 0.01 and found < 1e-4
    assert difference(ours(cond, W + 1), latents) > 1e-3
    for key, value in cond.items():
        assert difference(ours(cond | {key: torch.zeros_like(value)}), latents) > 1e-3, key
    torch.testing.assert_close(decode(path, latents), theirs("pt"), rtol=0, atol=1e-5)
    null = denoiser.null(cond)
    assert not null["text"].any() and null["duration"] is cond["duration"]
    with pytest.raises(BadInput, match="no TimestepEmbedding"):
        load(path, guided=True)


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Consistency, TDM], ids=lambda k: k.__name__)
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_methods_train_on_conditions_that_are_tensors(name, kind, tmp_path):
    case = CASES[name]
    case.twin.build().save_pretrained(tmp_path / name)
    teacher, student = load(tmp_path / name), load(tmp_path / name, guided=kind is Consistency)
    method = kind({"teacher": teacher, "student": student}, grid=2, guidance=3.0)
    before = [p.clone() for p in method.student.parameters()]
    optimizers = method.configure_optimizers()
    method.optimizers, method.manual_backward, method.total_steps = lambda: optimizers, lambda loss: loss.backward(), 2
    batch = {"x": torch.randn(2, *case.shape)} | encode(tmp_path / name, PROMPTS)
    for _ in range(2):
        method.training_step(batch)
    assert all(math.isfinite(v) for v in method.logs.values() if isinstance(v, float))
    moved = [not torch.equal(a, b) for a, b in zip(before, method.student.parameters())]
    assert any(moved) and all(p.isfinite().all() for p in method.student.parameters())
    cond = {k: v for k, v in batch.items() if k != "x"}
    assert method.sample(torch.randn(2, *case.shape), cond).isfinite().all()


# -- what is wrong, in one sentence --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    path = tmp_path_factory.mktemp("families") / "flux"
    families.builders()["flux"]().save_pretrained(path)
    return path


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_unknown_or_missing_conditions_raise(flux):
    denoiser = load(flux, null=None)
    assert denoiser.net.shape == (4, 128, 128)
    cond, z, t = encode(flux, PROMPTS), torch.randn(2, 4, 8, 8), torch.full((2,), 0.5)
    with pytest.raises(BadInput, match="no condition 'texts'. Did you mean 'text'"):
        denoiser(z, t, texts=cond["text"])
    with pytest.raises(BadInput, match="needs the condition 'pooled'"):
        denoiser(z, t, text=cond["text"])
    with pytest.raises(BadInput, match="even height and width"):
        denoiser(z[..., :7], t, **cond)
    with pytest.raises(BadInput, match="no null 'text'"):
        denoiser.null(cond)
    denoiser.net.set_null(encode(flux, [""], max_sequence_length=8))
    with pytest.raises(BadInput, match="same max_sequence_length"):
        denoiser.null(cond)
    with pytest.raises(BadInput, match="FluxAttnProcessor.*math_attention"):
        load(flux, null=None, math_attention=True)


def test_the_shift_of_flux_follows_the_size(flux):
    shifts = [load(flux, null=None, size=size).schedule.shift for size in (None, (32, 32), (128, 128))]
    assert shifts[0] == shifts[2] == pytest.approx(math.exp(1.15)) and shifts[1] == pytest.approx(math.exp(0.5))
    edit(flux / "scheduler" / "scheduler_config.json", time_shift_type="linear")
    with pytest.raises(BadInput, match="only .exponential. is supported"):
        load(flux, null=None)


def test_folders_that_cannot_be_read_as_a_teacher(tmp_path):
    families.builders()["wan"]().save_pretrained(tmp_path / "wan")
    edit(tmp_path / "wan" / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(BadInput, match="two networks"):
        load(tmp_path / "wan")
    edit(tmp_path / "wan" / "model_index.json", transformer_2=[None, None])
    shutil.rmtree(tmp_path / "wan" / "text_encoder")
    with pytest.raises(BadInput, match="wan has no text_encoder, .* copy that folder"):
        load(tmp_path / "wan")
    assert load(tmp_path / "wan", null=None).net.shape == (16, 21, 60, 104)
    edit(tmp_path / "wan" / "model_index.json", transformer=["diffusers", "DiTTransformer2DModel"])
    with pytest.raises(BadInput, match="is not conditioned on text"):
        encode(tmp_path / "wan", PROMPTS)


def test_text_encoders_from_the_hub_come_with_their_tokenizers(tmp_path, monkeypatch):
    import huggingface_hub

    families.builders()["sd15"]().save_pretrained(tmp_path / "sd")
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **kw: asked.append(kw["allow_patterns"]) or str(tmp_path / "sd"),
    )
    assert load("somebody/sd").net.null_text.shape == (1, tiny_parts.LENGTH, 16)
    assert asked == [["*.json", "*/*.safetensors"], ["*.json", "*/*.safetensors", "*.txt", "*.model"]]


def test_the_model_of_the_docs_is_a_teacher(tmp_path, monkeypatch):
    """As a new user: both listings written to files, the command below them given."""
    from click.testing import CliRunner

    from distill.cli import main

    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text().split("## Bring your own model")[1]
    for kind, name in (("python", "mine.py"), ("yaml", "mine.yaml")):
        (tmp_path / name).write_text(page.split(f"```{kind}")[1].split("```")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command = page.split("PYTHONPATH=. distill ")[1].splitlines()[0].split()
    out = CliRunner().invoke(main, [*command, "train.steps=2"])
    assert out.exit_code == 0 and "2 of 2 steps done" in out.output, out.output
    import mine

    z, cond = torch.randn(2, *mine.Mine.shape), {"text": torch.randn(2, 3, 6)}
    teacher = mine.load()
    x = solve(Guided(teacher, W), z, Grid.uniform(4), DDIM(), **cond)
    assert x.shape == z.shape and x.isfinite().all()
    assert difference(x, solve(Guided(teacher, 0.0), z, Grid.uniform(4), DDIM(), **cond)) > 1e-3

"""Pipelines that are not supported are refused by name, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from distill import config
from distill.denoise import Guided
from distill.errors import BadInput
from distill.models.diffusers import Geometry, Prompts, grid_of, load, tiny, tiny_parts
from distill.models.diffusers.prompts import Latent
from distill.models.families.refusals import REFUSALS
from distill.noise import VE
from distill.solvers import DDIM, solve
from distill.training.experiment import build_experiment

CONFIGS = Path(__file__).parents[2] / "configs"
FLUX, UNET = "flux", "sd15"
# pipeline class, base, changes of the network's config, changes of model_index.json, what the message must name
KINDS = [
    ("StableDiffusionInpaintPipeline", UNET, {"in_channels": 9}, {}, "an inpainting model reads a mask"),
    ("StableDiffusionXLInpaintPipeline", "sdxl", {"in_channels": 9}, {}, "an inpainting model reads a mask"),
    ("StableDiffusionPipeline", UNET, {"in_channels": 9}, {}, "an inpainting model reads a mask"),
    ("FluxFillPipeline", FLUX, {"in_channels": 24, "out_channels": 16}, {}, "FLUX Fill .* load FLUX.1-dev"),
    ("FluxControlPipeline", FLUX, {"in_channels": 32, "out_channels": 16}, {}, "FLUX Control .* load FLUX.1-dev"),
    ("FluxKontextPipeline", FLUX, {}, {}, "FLUX Kontext"),
    ("FluxPipeline", FLUX, {}, {"controlnet": ["diffusers", "FluxControlNetModel"]}, "a ControlNet"),
    ("StableDiffusionUpscalePipeline", UNET, {"in_channels": 7}, {}, "an upscaler reads a low-resolution image"),
    ("StableDiffusionLatentUpscalePipeline", UNET, {"in_channels": 8}, {}, "an upscaler"),
    ("StableDiffusionXLImg2ImgPipeline", "sdxl", {}, {"requires_aesthetics_score": True}, "the SDXL refiner"),
    (
        "StableDiffusionControlNetPipeline",
        UNET,
        {},
        {"controlnet": ["diffusers", "ControlNetModel"]},
        "a ControlNet .* base model",
    ),
    (
        "StableDiffusionAdapterPipeline",
        UNET,
        {},
        {"adapter": ["diffusers", "T2IAdapter"]},
        "a ControlNet or adapter pipeline",
    ),
    ("AnimateDiffPipeline", UNET, {}, {"motion_adapter": ["diffusers", "MotionAdapter"]}, "an AnimateDiff pipeline"),
    ("LatentConsistencyModelPipeline", UNET, {"time_cond_proj_dim": 256}, {}, "an LCM U-Net"),
    ("StableDiffusionInstructPix2PixPipeline", UNET, {"in_channels": 8}, {}, "InstructPix2Pix reads the image to edit"),
    ("StableDiffusionDepth2ImgPipeline", UNET, {"in_channels": 5}, {}, "a depth-to-image model"),
    ("StableDiffusionImageVariationPipeline", UNET, {}, {}, "an image-variation model"),
    ("CogVideoXFunControlPipeline", "cogvideox", {}, {}, "a control model"),
    ("WanPipeline", "wan", {}, {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "Wan 2.2 .* load Wan 2.1"),
    ("WanPipeline", "wan", {}, {"expand_timesteps": True}, "Wan 2.2 .* load Wan 2.1"),
]


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "pipeline, base, network, index, message", KINDS, ids=[f"{k[0]}-{i}" for i, k in enumerate(KINDS)]
)
def test_pipelines_that_are_not_supported_are_refused_by_name(tmp_path, pipeline, base, network, index, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder(base), folder)
    edit(folder / "model_index.json", _class_name=pipeline, **index)
    part = "unet" if (folder / "unet").is_dir() else "transformer"
    edit(folder / part / "config.json", **network)
    for entry in (load, Prompts, Geometry.of):  # teachers, `distill data encode` and `plan`
        with pytest.raises(BadInput, match=rf"model \({pipeline}\): {message}"):
            entry(folder)


def test_every_refusal_is_tried():
    tried = {message.split(" reads")[0].split(" .*")[0] for *_, message in KINDS}
    assert all(any(name in refusal.kind for name in tried) for refusal in REFUSALS)


def test_supported_pipelines_are_not_refused():
    for family in tiny.builders():
        if family != "stable_audio":  # whose scheduler needs torchsde
            assert Geometry.of(f"tiny:{family}").shape


@pytest.mark.parametrize("family, part, wide", [("sd15", "unet", 6), ("flux", "transformer", 24)])
def test_unknown_networks_that_read_more_channels_are_refused(tmp_path, family, part, wide):
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder(family), folder)
    kind = getattr(diffusers, json.loads((folder / "model_index.json").read_text())[part][1])
    config = dict(kind.load_config(folder / part))
    kind.from_config(config | {"in_channels": wide, "out_channels": config["in_channels"]}).save_pretrained(
        folder / part
    )
    with pytest.raises(BadInput, match=f"from {wide} to .* channels reads an image beside"):
        load(folder, null=None)


# -- pipelines that are supported in a form of their own -------------------------------------------------------------


def halve(folder, parts):
    """The folder's weights in half precision under the names of the variant fp16, as many models are published."""
    index = json.loads((folder / "model_index.json").read_text())
    for part in parts:
        library, name = index[part]
        module = __import__(library)
        model = getattr(module, name).from_pretrained(folder / part).half()
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        model.save_pretrained(folder / part, variant="fp16")


@pytest.mark.parametrize("parts", [("unet", "vae", "text_encoder"), ("unet",)], ids=["whole", "network"])
@torch.no_grad()
def test_folders_with_weights_in_half_precision_only(tmp_path, parts):
    folder, x, t = tmp_path / "half", torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.3])
    shutil.copytree(tiny.folder("sd15"), folder)
    whole = load(folder)
    cond = Prompts(folder)(["a cat", "a dog"])
    expected, pixels = Guided(whole, 3.0)(x, t, **cond), Latent(folder).decode(x)
    halve(folder, parts)
    half = load(folder)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    found = Guided(half, 3.0)(x, t, **Prompts(folder)(["a cat", "a dog"]))
    assert 0 < (found - expected).abs().max() < 1e-2 * expected.abs().max()
    assert (Latent(folder).decode(x) - pixels).abs().max() < 1e-2 * pixels.abs().max()


def ltx_with_timestep():
    pipe = tiny.builders()["ltx"]()
    torch.manual_seed(3)
    settings = {key: value for key, value in pipe.vae.config.items() if not key.startswith("_")}
    vae = tiny_parts.shake(diffusers.AutoencoderKLLTXVideo(**settings | {"timestep_conditioning": True}), 0.05)
    pipe.register_modules(vae=vae)
    return pipe


@torch.no_grad()
def test_decoders_with_a_timestep_decode_as_the_stock_pipeline(tmp_path):
    """LTX 0.9.1 and later."""
    pipe = ltx_with_timestep()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "ltx")
    x = torch.randn(1, 8, 2, 2, 2, generator=torch.Generator().manual_seed(5))
    call = {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
    call |= {"latents": pipe._pack_latents(x), "return_dict": False}
    latents = pipe("a cat", output_type="latent", **call)[0]
    pixels = pipe("a cat", output_type="pt", **call)[0].transpose(1, 2)
    found = Latent(tmp_path / "ltx").decode(pipe._unpack_latents(latents, 2, 2, 2))
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), pixels, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@torch.no_grad()
def test_edm_pipelines_denoise_as_the_stock_scheduler(tmp_path, kind):
    """Playground 2.5: a U-Net of SDXL under EDM, with sigma_data 0.5 and normalised latents."""
    pipe = tiny.builders()["sdxl"]()
    pipe.register_modules(scheduler=getattr(diffusers, kind)(sigma_max=80.0, sigma_min=0.002, sigma_data=0.5))
    pipe.vae.register_to_config(
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[2.0, 3.0, 4.0, 5.0], scaling_factor=0.5
    )
    pipe.save_pretrained(tmp_path / "edm")
    model = load(tmp_path / "edm")
    assert (model.prediction, model.sigma_data, model.schedule) == ("edm", 0.5, VE(80.0, 7.0))
    assert model.net.latent_scale == (0.25, 0.5 / 3, 0.125, 0.1) and model.net.latent_shift == (0.1, -0.2, 0.3, 0.0)

    steps, cond = 4, Prompts(tmp_path / "edm")(["a cat", "a dog"])
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    stock = diffusers.EDMEulerScheduler.from_config(pipe.scheduler.config)
    stock.set_timesteps(steps)
    added = {"text_embeds": cond["pooled"], "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
    x = 80.0 * z
    for n in stock.timesteps:
        x_in = stock.scale_model_input(x, n)
        out = pipe.unet(x_in, n, encoder_hidden_states=cond["text"], added_cond_kwargs=added).sample
        x = stock.step(out, n, x).prev_sample
    model.net.pixels = 2
    found = solve(model, 80.0 * z, grid_of(stock, steps).times, DDIM(), **cond)
    assert (found - x).abs().max() < 1e-4 * x.abs().max()


@torch.no_grad()
def test_the_time_of_flux_is_rounded_as_by_the_stock_pipeline(tmp_path, monkeypatch):
    """In bfloat16 the stock pipeline rounds the timestep before it divides by 1000."""
    pipe = tiny.builders()["flux_schnell"]()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "flux")
    pipe.to(torch.bfloat16)
    model = load(tmp_path / "flux", dtype="bfloat16", size=(8, 8))
    sigmas = [0.998, 0.966, 0.951, 0.942]  # each is rounded to another number if it is divided first
    seen = {"stock": [], "ours": []}

    def watch(network, name):
        project = network.time_text_embed.time_proj
        project.register_forward_pre_hook(lambda module, args: seen[name].append(float(args[0].flatten()[0])))

    watch(pipe.transformer, "stock")
    watch(model.net.stock, "ours")
    z = torch.randn(1, 4, 8, 8)
    latents = pipe._pack_latents(z, *z.shape).bfloat16()
    pipe("a cat", height=16, width=16, sigmas=sigmas, latents=latents, output_type="latent", guidance_scale=0.0)
    cond = Prompts(tmp_path / "flux")(["a cat"])
    for sigma in pipe.scheduler.sigmas[:-1].double():
        model(z, model.schedule.time(2 * ((1 - sigma).log() - sigma.log()))[None], **cond)
    assert seen["ours"] == seen["stock"] and len(seen["stock"]) == 4


# -- settings of the scheduler ---------------------------------------------------------------------------------------


def test_settings_of_a_loaded_scheduler_are_replaced():
    assert load("tiny:wan", null=None).schedule.shift == 3.0
    model = load("tiny:wan", null=None, scheduler={"shift": 5.0})
    assert model.schedule.shift == 5.0 and model.net.scheduler_settings == {"shift": 5.0}
    assert load("tiny:sd15", null=None, scheduler={"prediction_type": "v_prediction"}).prediction == "v"
    table = load("tiny:sd15", null=None, scheduler={"beta_end": 0.02}).schedule
    assert table.alphas_cumprod[-1] < load("tiny:sd15", null=None).schedule.alphas_cumprod[-1]
    fixed = {"use_dynamic_shifting": False, "shift": 2.0}
    assert load("tiny:flux", null=None, size=(8, 8), scheduler=fixed).schedule.shift == 2.0
    with pytest.raises(
        BadInput,
        match="FlowMatchEulerDiscreteScheduler has no setting 'flow_shift'.* It has base_image_seq_len, .*shift, ",
    ):
        load("tiny:wan", null=None, scheduler={"flow_shift": 5.0})


def test_the_shift_of_wan_at_720p_and_a_config_that_sets_it():
    folder = tiny.folder("wan")
    assert load(folder, null=None).net.scheduler_settings == {}
    asked = ["model=tiny", "roles.teacher.scheduler={shift: 5.0}", "train.steps=1"]
    experiment = build_experiment(config.load([CONFIGS / "wan" / "tdm.yaml"], asked))
    roles = [experiment.method.teacher, experiment.method.student, experiment.method.ema]
    assert [role.schedule.shift for role in roles] == [5.0] * 3
    assert experiment.method.student.net.scheduler_settings == {"shift": 5.0}  # through the adapter too
    with pytest.raises(BadInput, match=r"has no setting 'shft'. Did you mean 'shift'\? It has .*use_dynamic_shifting"):
        build_experiment(
            config.load([CONFIGS / "wan" / "tdm.yaml"], ["model=tiny", "roles.teacher.scheduler={shft: 5}"])
        )


def test_the_scheduler_of_wans_own_folder_takes_its_flow_shift(tmp_path):
    pipe = tiny.builders()["wan"]()
    stock = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe.register_modules(scheduler=diffusers.UniPCMultistepScheduler(**stock))
    pipe.save_pretrained(tmp_path / "wan")
    assert load(tmp_path / "wan", null=None).schedule.shift == 3.0
    assert load(tmp_path / "wan", null=None, scheduler={"flow_shift": 5.0}).schedule.shift == 5.0

r"""Students that are told text, as the teacher's own pipeline folder with another network and another scheduler.

The stock call has its number of steps and its guidance as defaults of Python code that no file of a folder changes.
What a folder can change is changed: the scheduler serves the student's times, with its shift; a U-Net of Stable
Diffusion says that it takes guidance as an input (`time_cond_proj_dim`, through weights that are zero), which turns
classifier-free guidance off; and four steps of LCM under Stable Diffusion 1 or 2 are `LatentConsistencyModelPipeline`,
whose defaults they are. What is left is the record's "call": `pipe(prompt, **call)`.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from distill.denoise import Denoiser, network_of
from distill.errors import BadInput
from distill.export.folder import SAMPLERS, FlowMap, gap_of, stock_scheduler, strip
from distill.export.job import SEED, Job
from distill.export.schedulers import flow_scheduler, lattice_scheduler
from distill.grid import Grid
from distill.nets.diffusers import Conditioned, Latent, Prompts
from distill.nets.diffusers.folder import folder_of
from distill.nets.diffusers.schedulers import read_json, scheduler_of
from distill.noise import Table

PROMPTS = ["a cat on a sofa", "two dogs in the snow"]  # of the reference samples
FRAMES = {"Wan": 4, "CogVideoX": 4, "LTX": 8}  # frames of video a latent frame, after the first
EVEN = ("Flux", "LTX")  # their pipelines pass sigmas of their own, evenly spaced
MUTED = 256  # features of the guidance input that a U-Net gets, and does not listen to


def told(student: Denoiser) -> bool:
    """Whether a student is told text, that is, comes from a pipeline folder."""
    return isinstance(network_of(student), Conditioned)


def write(job: Job) -> dict:
    """The teacher's folder with the student's network and scheduler; the record of distill.json.

    Raises:
        BadInput: if the teacher's folder is gone or no stock scheduler serves the student.
    """
    base, net = source(job.student.net), job.student.net
    index = read_json(base / "model_index.json")
    scheduler, call = serving(job.student, job.grid, job.sampler, base)
    model, muted = network(job), net.part == "unet"
    if muted:
        mute(model)
        scheduler.register_to_config(steps_offset=1)  # not read under trailing spacing, but asked for by the stock class
    lcm = index["_class_name"] == "StableDiffusionPipeline" and type(scheduler).__name__ == "LCMScheduler"
    if lcm and job.grid.steps == 4 and not call:
        index["_class_name"] = "LatentConsistencyModelPipeline"
    kind = pipeline_class(index)
    copy_parts(base, job.staging, but=("scheduler", net.part))
    model.save_pretrained(job.staging / net.part)
    strip(job.staging / net.part)
    scheduler.save_pretrained(job.staging / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (job.staging / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    call = ask(kind, net, job.grid, call, guided=not muted)
    return describe(job, scheduler, call) | {"pipeline": kind.__name__} | references(job, base, kind)


def network(job: Job) -> Any:
    """The plain stock network of the student, w and t - s folded in."""
    net = job.student.net
    if not told(job.student):
        raise BadInput(f"{type(net).__name__} is not told text: export it as a pipeline or as onnx.")
    gap = gap_of(job.grid, job.sampler) if net.flow_map else None
    return net.fold(w=job.w if net.guided else None, gap=gap)


@torch.no_grad()
def mute(unet: Any) -> None:
    """Make stock pipelines ask without classifier-free guidance: a guidance input with weights of zero."""
    if unet.config.time_cond_proj_dim is None:
        layer = unet.time_embedding
        layer.cond_proj = nn.Linear(MUTED, layer.linear_1.in_features, bias=False, dtype=layer.linear_1.weight.dtype)
        layer.cond_proj.weight.zero_()
        unet.register_to_config(time_cond_proj_dim=MUTED)


def serving(student: Denoiser, grid: Grid, sampler: str, base: Path) -> tuple[Any, dict]:
    """The stock scheduler that walks the student's grid, and what the call must be told besides.

    Raises:
        BadInput: if there is none.
    """
    kind = pipeline_class(read_json(base / "model_index.json"))
    takes = inspect.signature(kind.__call__).parameters
    if not isinstance(student.schedule, Table):
        return flow_scheduler(student, grid, sampler, type(student.net).__name__ in EVEN, "sigmas" in takes)
    own = read_json(base / "model_index.json")["scheduler"][1]
    first = [scheduler_of(base, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
             ] if own == "CogVideoXDDIMScheduler" and sampler == "ode" else []
    try:
        return stock_scheduler(student, grid, sampler, first), {}
    except BadInput:
        if sampler != "renoise" or "timesteps" not in takes:
            raise
        return lattice_scheduler(student, grid)


def ask(kind: type, net: Conditioned, grid: Grid, call: dict, guided: bool) -> dict:
    """What `pipe(prompt, **call)` must be told because the defaults of `kind` are others."""
    takes = {k: p.default for k, p in inspect.signature(kind.__call__).parameters.items()}
    if takes["num_inference_steps"] != grid.steps:
        call = {"num_inference_steps": grid.steps} | call
    if guided and type(net).__name__ != "Flux":  # whose default is no second evaluation
        call = call | {"guidance_scale": 1.0}
    here, usual = size(net, net.shape), size(net, net.default_shape(net.stock.config))
    there = {k: takes[k] or usual[k] for k in here}
    if here != there:
        call = call | here | ({"use_resolution_binning": False} if "use_resolution_binning" in takes else {})
    return call


def size(net: Conditioned, shape: tuple[int, ...]) -> dict[str, int]:
    """Height and width in pixels, and number of frames, as stock calls take them, of latents of `shape`."""
    *frames, height, width = shape[1:]
    found = {"height": net.pixels * height, "width": net.pixels * width}
    return found | ({"num_frames": FRAMES[type(net).__name__] * (frames[0] - 1) + 1} if frames else {})


def describe(job: Job, scheduler: Any, call: dict) -> dict:
    """The conventions of an exported student, for distill.json."""
    student = job.student
    scheduler.set_timesteps(**{k: v for k, v in call.items() if k in ("sigmas", "timesteps")}
                            or {"num_inference_steps": job.grid.steps})
    asked = student.net.timestep(job.grid.tensor()[:-1]).tolist()
    return {
        "part": student.net.part, "network": type(student.net.stock).__name__, "steps": job.grid.steps,
        "timesteps": [round(n, 4) for n in asked], "times": list(job.grid.times), "sampler": job.sampler,
        "scheduler": type(scheduler).__name__, "prediction": student.prediction, "guidance": job.w,
        "shift": getattr(student.schedule, "shift", None), "call": call, "classes": 0, "null_class": True,
        "latent": {"shape": list(student.net.shape), "scale": student.net.latent_scale, "shift": student.net.latent_shift},
        "base": source_name(student.net),
    }


@torch.no_grad()
def references(job: Job, base: Path, kind: type) -> dict:
    """Noise and samples of the trainer's own sampler, the student unfolded; their prompts and call; their pictures."""
    from safetensors.torch import save_file

    student, net = job.student, job.student.net
    cond = Prompts(base)(PROMPTS) | ({"w": torch.full((len(PROMPTS),), float(job.w))} if net.guided else {})
    teller = FlowMap(student, gap_of(job.grid, job.sampler)) if net.flow_map else student
    enter, leave = LAYOUTS.get(type(net).__name__, (lambda x: x, lambda x, shape: x))
    shape = (len(PROMPTS), *net.shape)
    packed = enter(torch.empty(shape)).shape
    generator = torch.Generator().manual_seed(SEED)
    draw = lambda: torch.randn(packed, generator=generator)
    noise = draw()
    x, solver = leave(noise, shape), SAMPLERS[job.sampler]
    for t, s in zip(job.grid.times, job.grid.times[1:]):
        t, s = (torch.full((len(PROMPTS),), time) for time in (t, s))
        x = solver(teller, x, t, s, noise=leave(draw(), shape) if solver.stochastic else None, **cond)
    save_file({"noise": noise, "samples": enter(x).contiguous()}, job.staging / "reference.safetensors")
    told = size(net, net.shape)
    if "use_resolution_binning" in inspect.signature(kind.__call__).parameters:
        told["use_resolution_binning"] = False
    return {"reference": {"seed": SEED, "prompts": PROMPTS, "call": told}} | pictures(base, x)


def pictures(base: Path, x: Tensor) -> dict[str, Tensor]:
    """The samples in pixels, of a video its first, middle and last frame; nothing where no autoencoder decodes them."""
    pixels = Latent(base).decode(x).clamp(-1, 1)
    if pixels.ndim == 5:
        frames = sorted({0, pixels.shape[2] // 2, pixels.shape[2] - 1})
        pixels = pixels[:, :, frames].transpose(1, 2).flatten(0, 1)
    return {"pictures": pixels}


def source_name(net: Conditioned) -> str:
    """The folder or hub name that a network was loaded from, as stock code finds it."""
    if net.source is None:
        raise BadInput(f"{type(net).__name__} was not loaded from a pipeline folder, whose text encoders and autoencoder "
                       "an export needs: load it by distill.nets.diffusers.load.")
    name = net.source[0]
    return str(folder_of(name)) if name.startswith("tiny:") else name


def source(net: Conditioned) -> Path:
    """The whole pipeline folder that a network was loaded from."""
    path = source_name(net)
    return folder_of(path, net.source[1], ("*.txt", "*.model"))


def pipeline_class(index: dict) -> type:
    """The stock class that model_index.json names."""
    kind = getattr(diffusers, index["_class_name"], None)
    if kind is None:
        raise BadInput(f"diffusers has no pipeline '{index['_class_name']}'.")
    return kind


def copy_parts(base: Path, out: Path, but: tuple[str, ...]) -> None:
    """Every part of a pipeline but these, never saved again: weights as hard links where the file system has them."""
    parts = [p for p, value in read_json(base / "model_index.json").items() if isinstance(value, list) and p not in but]
    for part in parts:
        for file in (base / part).rglob("*") if (base / part).is_dir() else ():
            if file.is_file():
                there = out / part / file.relative_to(base / part)
                there.parent.mkdir(parents=True, exist_ok=True)
                try:
                    (os.link if file.suffix in (".safetensors", ".bin") else shutil.copyfile)(file.resolve(), there)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(file, there)


def _pack_flux(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    tokens = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, height // 2 * (width // 2), channels * 4)


def _unpack_flux(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    batch, channels, height, width = shape
    return x.reshape(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(shape)


# Families whose pipelines take and give latents in another order: to it, and back to that of `shape`.
LAYOUTS = {
    "Flux": (_pack_flux, _unpack_flux),
    "LTX": (lambda x: x.flatten(2).transpose(1, 2), lambda x, shape: x.transpose(1, 2).reshape(shape)),
    "CogVideoX": (lambda x: x.transpose(1, 2), lambda x, shape: x.transpose(1, 2)),
}

r"""Pipeline folders of text-conditioned students: the teacher's folder with another network and another scheduler.

The number of steps and the guidance of a stock call are defaults in Python code, which no file of a folder can change.
Everything else is in the folder: the scheduler has the student's times and shift; some families can turn guidance off in
the network (`Family.mute`) or have a stock pipeline whose defaults are the student's (`Family.bare_calls`). The remaining
arguments are in the record's "call": `pipe(prompt, **call)`.
"""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from distill.denoise import Denoiser, network_of
from distill.errors import BadInput
from distill.export.folder import all_of, gap_of, reference_samples, stock_scheduler, strip
from distill.export.request import SEED, ExportRequest
from distill.export.schedulers import flow_scheduler, lattice_scheduler
from distill.files import read_json, write_json, write_text
from distill.models.diffusers import Latent, Prompts, StockNetwork, TensorConditioned
from distill.models.diffusers.folder import folder_of, pipeline_variant, weight_variant
from distill.models.diffusers.schedulers import scheduler_of
from distill.noise import Table
from distill.times import Grid

PROMPTS = ["a cat on a sofa", "two dogs in the snow"]  # of the reference samples


def takes_text(student: Denoiser) -> bool:
    """Whether a student is conditioned on text, that is, was loaded from a pipeline folder."""
    return isinstance(network_of(student), TensorConditioned)


def write(request: ExportRequest) -> dict:
    """Write the teacher's folder with the student's network and scheduler; return the record for distill.json.

    Raises:
        BadInput: the teacher's folder is gone or no stock scheduler serves the student.
    """
    base, net = source(request.student.net), request.student.net
    index = read_json(base / "model_index.json")
    student, grid, sampler = request.student, request.grid, request.sampler
    model, (scheduler, call) = all_of(lambda: folded_network(request), lambda: serving(student, grid, sampler, base))
    if net.family.mute:
        net.family.mute(model)
    scheduler.register_to_config(**net.family.scheduler_settings)
    served = (index["_class_name"], type(scheduler).__name__, request.grid.steps)
    if not call:
        index["_class_name"] = net.family.bare_calls.get(served, index["_class_name"])
    kind = pipeline_class(index)
    copy_parts(base, request.staging, but=("scheduler", net.part))
    model.save_pretrained(request.staging / net.part)
    strip(request.staging / net.part)
    scheduler.save_pretrained(request.staging / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    write_json(request.staging / "model_index.json", index)
    call = call_arguments(kind, net, request.grid, call, guided=not net.family.mute)
    return describe(request, scheduler, call) | {"pipeline": kind.__name__} | write_references(request, base, kind)


def kinds_of(net: Any) -> str:
    """The kinds of export of a network that is not conditioned on text."""
    return "as a pipeline or as onnx" if isinstance(net, StockNetwork) else "as onnx"


def folded_network(request: ExportRequest) -> Any:
    """The plain stock network of the student, w and t - s folded in."""
    net = request.student.net
    if not takes_text(request.student):
        raise BadInput(f"{type(net).__name__} is not conditioned on text: export it {kinds_of(net)}.")
    gap = gap_of(request.grid, request.sampler) if net.flow_map else None
    return net.fold(w=request.w if net.guided else None, gap=gap)


def serving(student: Denoiser, grid: Grid, sampler: str, base: Path) -> tuple[Any, dict]:
    """The stock scheduler that serves the student's grid, and the arguments that the call needs for it.

    Raises:
        BadInput: there is none.
    """
    kind = pipeline_class(read_json(base / "model_index.json"))
    takes = inspect.signature(kind.__call__).parameters
    if not isinstance(student.schedule, Table):
        return flow_scheduler(student, grid, sampler, student.net.family.even_sigmas, "sigmas" in takes)
    own = read_json(base / "model_index.json")["scheduler"][1]
    first = (
        [scheduler_of(base, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)]
        if own == student.net.family.ode_scheduler and sampler == "ode"
        else []
    )
    try:
        return stock_scheduler(student, grid, sampler, first), {}
    except BadInput:
        if sampler != "renoise" or "timesteps" not in takes:
            raise
        return lattice_scheduler(student, grid)


def call_arguments(kind: type, net: TensorConditioned, grid: Grid, call: dict, guided: bool) -> dict:
    """The arguments of `pipe(prompt, **call)` in which this student differs from the defaults of `kind`."""
    takes = {k: p.default for k, p in inspect.signature(kind.__call__).parameters.items()}
    if takes["num_inference_steps"] != grid.steps:
        call = {"num_inference_steps": grid.steps} | call
    call = call | (net.family.no_guidance if guided else {})
    trained, usual = output_size(net, net.shape), output_size(net, net.family.default_shape(net.stock.config))
    default = {k: takes[k] or usual[k] for k in trained}
    if trained != default:
        call = call | trained | ({"use_resolution_binning": False} if "use_resolution_binning" in takes else {})
    return call


def output_size(net: TensorConditioned, shape: tuple[int, ...]) -> dict[str, int]:
    """Height and width in pixels, and number of frames, as stock calls take them, of latents of `shape`.

    Raises:
        BadInput: a family of video does not state its `frames`.
    """
    *frames, height, width = shape[1:]
    if frames and not net.family.frames:
        raise BadInput(
            f"The family of {net.family.network} has no `frames`: set it to the video frames per latent frame."
        )
    found = {"height": net.pixels * height, "width": net.pixels * width}
    return found | ({"num_frames": net.family.frames * (frames[0] - 1) + 1} if frames else {})


def describe(request: ExportRequest, scheduler: Any, call: dict) -> dict:
    """The conventions of an exported student, for distill.json."""
    student = request.student
    scheduler.set_timesteps(
        **{k: v for k, v in call.items() if k in ("sigmas", "timesteps")} or {"num_inference_steps": request.grid.steps}
    )
    timesteps = student.net.timestep(request.grid.tensor()[:-1]).tolist()
    return {
        "part": student.net.part,
        "network": type(student.net.stock).__name__,
        "steps": request.grid.steps,
        "timesteps": [round(n, 4) for n in timesteps],
        "times": list(request.grid.times),
        "sampler": request.sampler,
        "scheduler": type(scheduler).__name__,
        "prediction": student.prediction,
        "guidance": request.w,
        "shift": getattr(student.schedule, "shift", None),
        "call": call,
        "classes": 0,
        "null_class": True,
        "latent": {
            "shape": list(student.net.shape),
            "scale": student.net.latent_scale,
            "shift": student.net.latent_shift,
        },
        "base": base_name(student.net),
        "variant": pipeline_variant(source(student.net)),
    }


@torch.no_grad()
def write_references(request: ExportRequest, base: Path, kind: type) -> dict:
    """Write noise and samples of the trainer's own sampler; return their prompts and call, and their pictures."""
    from safetensors.torch import save_file

    student, net, device = request.student, request.student.net, request.device
    cond = Prompts(base, dtype=request.dtype, device=device)(PROMPTS)
    cond |= {"w": torch.full((len(PROMPTS),), float(request.w))} if net.guided else {}
    cond = {name: value.to(device) for name, value in cond.items()}
    shape, layout = (len(PROMPTS), *net.shape), net.family.layout
    packed = layout.pack(torch.empty(shape)).shape
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(packed, generator=generator)
    # The stock scheduler of a table draws in the dtype of the latents, that of a flow in float32.
    drawn = getattr(torch, request.dtype) if isinstance(student.schedule, Table) else torch.float32

    def draw() -> Tensor:
        return layout.unpack(torch.randn(packed, generator=generator, dtype=drawn), shape)

    x = reference_samples(request, layout.unpack(noise, shape), draw, cond)
    save_file({"noise": noise, "samples": layout.pack(x).contiguous()}, request.staging / "reference.safetensors")
    sizes = output_size(net, net.shape)
    if "use_resolution_binning" in inspect.signature(kind.__call__).parameters:
        sizes["use_resolution_binning"] = False
    return {"reference": {"seed": SEED, "prompts": PROMPTS, "call": sizes}} | pictures(base, x, device)


def pictures(base: Path, x: Tensor, device: str = "cpu") -> dict[str, Tensor]:
    """The samples in pixels, of a video its first, middle and last frame; nothing where no autoencoder decodes them."""
    pixels = Latent(base, device=device).decode(x).clamp(-1, 1)
    if pixels.ndim == 5:
        frames = sorted({0, pixels.shape[2] // 2, pixels.shape[2] - 1})
        pixels = pixels[:, :, frames].transpose(1, 2).flatten(0, 1)
    return {"pictures": pixels}


def base_name(net: TensorConditioned) -> str:
    """The folder or hub name that a network was loaded from, as stock code finds it."""
    if net.source is None:
        raise BadInput(
            f"{net.family.network} was not loaded from a pipeline folder, whose text encoders and autoencoder "
            "an export needs: load it by distill.models.diffusers.load."
        )
    name = net.source[0]
    return str(folder_of(name)) if name.startswith("tiny:") else name


def source(net: TensorConditioned) -> Path:
    """The whole pipeline folder that a network was loaded from."""
    path = base_name(net)
    return folder_of(path, net.source[1], ("*.txt", "*.model"))


def pipeline_class(index: dict) -> type:
    """The stock class that model_index.json names."""
    kind = getattr(diffusers, index["_class_name"], None)
    if kind is None:
        raise BadInput(
            f"diffusers has no pipeline '{index['_class_name']}'; install the version of diffusers that has it."
        )
    return kind


def copy_parts(base: Path, out: Path, but: tuple[str, ...]) -> None:
    """Copy every part of a pipeline except `but`; weights are hard links where the file system has them."""
    parts = [p for p, value in read_json(base / "model_index.json").items() if isinstance(value, list) and p not in but]
    for part in parts:
        for file in (base / part).rglob("*") if (base / part).is_dir() else ():
            if file.is_file():
                # The variant of a part that has no other becomes the plain one, which needs no argument to load.
                name = file.name.replace(".fp16", "") if weight_variant(base / part) == "fp16" else file.name
                copy = out / part / file.relative_to(base / part).with_name(name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                if name != file.name and file.suffix == ".json":  # the index of a split file
                    write_text(copy, file.read_text(encoding="utf-8").replace(".fp16", ""))
                    continue
                try:
                    (os.link if file.suffix in (".safetensors", ".bin") else shutil.copyfile)(file.resolve(), copy)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(file, copy)

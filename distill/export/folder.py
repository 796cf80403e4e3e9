r"""A trained Denoiser to a folder that `diffusers.DiffusionPipeline.from_pretrained` serves without our code.

The network picks the stock pipeline: `ConsistencyModelPipeline` for a U-Net (pixels, optional class labels), `DiTPipeline`
for a transformer (class labels, and an autoencoder: `export.pixels` passes pixels through). The student's way of walking
its grid picks the stock scheduler:

    ode      x_s = alpha_s x + sigma_s eps      DDIMScheduler, trailing spacing
    renoise  x_s = alpha_s x + sigma_s noise    LCMScheduler, original_inference_steps chosen to hit the grid

`grid_of` reads the times back from that very scheduler, so a student that it would serve at other times is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from distill.denoise import Denoiser, network_of
from distill.errors import BadInput
from distill.export.job import SEED, Job
from distill.export.pixels import autoencoder
from distill.grid import Grid
from distill.noise import Table
from distill.solvers import DDIM, Renoise, solve

SAMPLERS = {"ode": DDIM(), "renoise": Renoise()}
REFERENCES = 4  # how many samples `verify` repeats


def write(job: Job) -> dict:
    """The pipeline, its reference samples and what distill.json says of it.

    Raises:
        BadInput: if no stock network, scheduler or prediction type serves this student.
    """
    scheduler = stock_scheduler(job.student, job.grid, job.sampler)
    network = stock_network(job.student, job.grid, job.sampler, job.w)
    _write(job.staging, network, scheduler, job.student.net)
    _save_references(job.student, job.grid, job.sampler, job.w, job.staging / "reference.safetensors")
    return describe(job.student, job.grid, job.sampler, scheduler, job.w)



def stock_network(student: Denoiser, grid: Grid, sampler: str, w: float | None):
    """The stock network that answers as the student does on this grid, w and t - s folded in.

    Raises:
        BadInput: for networks without a stock class, and for flow maps whose t - s varies along the walk.
    """
    from distill.nets.diffusers import DiT, UNet2D

    net = network_of(student)
    if not isinstance(net, (DiT, UNet2D)):
        raise BadInput(f"{type(net).__name__} has no stock class in diffusers: networks that export are UNet2D, DiT and "
                       "those that `distill.nets.diffusers.load` reads from a pipeline folder.")
    if net.part == "transformer" and not net.classes:
        raise BadInput("DiTPipeline draws by class only: export a DiT with classes, or a UNet2D.")
    if net.timesteps != len(student.schedule.alphas_cumprod):
        raise BadInput(f"The network counts timesteps={net.timesteps} but its schedule has "
                       f"{len(student.schedule.alphas_cumprod)}: train with the same number in both.")
    gap = gap_of(grid, sampler) if net.flow_map else None
    return net.fold(w=w if net.guided else None, gap=gap)


def stock_scheduler(student: Denoiser, grid: Grid, sampler: str, first: list | None = None):
    """The stock scheduler that walks the student's grid the way the student does; one of `first` if it is of the same table.

    Raises:
        BadInput: if there is none; the message shows the times that the stock scheduler would serve.
    """
    from distill.nets.diffusers import PREDICTIONS, schedule_of, scheduler_of

    if sampler not in SAMPLERS:
        raise BadInput(f"sampler '{sampler}' is none of {', '.join(SAMPLERS)}.")
    stock = {ours: theirs for theirs, ours in PREDICTIONS.items() if ours in ("eps", "x", "v")}
    if student.prediction not in stock or not isinstance(student.schedule, Table):
        raise BadInput(
            f"A student that predicts '{student.prediction}' under {type(student.schedule).__name__} has no stock "
            f"scheduler here: export needs {', '.join(stock)} under a Table (`schedule_of` makes one)."
        )
    settings = stock_table(student.schedule) | {
        "prediction_type": stock[student.prediction], "clip_sample": False, "set_alpha_to_one": True,
    }
    if sampler == "ode":
        ours = scheduler_of("DDIMScheduler", **settings, timestep_spacing="trailing")
        return _serving(grid, [*(s for s in first or () if schedule_of(s) == student.schedule), ours])
    # K itself gives the uniform grid, multiples of it and others the coarser choices out of a finer lattice.
    total = len(student.schedule.alphas_cumprod)
    lattices = [grid.steps, *(m for m in range(grid.steps + 1, total) if total % m == 0)]
    # The default scaling of 10 leaves a trace of x_t in the prediction at small timesteps.
    lcm = scheduler_of("LCMScheduler", **settings, timestep_scaling=1e4)
    return _serving(grid, [scheduler_of(lcm, original_inference_steps=m) for m in lattices])


def _serving(grid: Grid, candidates: list):
    """The first of the candidates that serves the grid; else BadInput with the first one's reason."""
    from distill.nets.diffusers import grid_of

    reasons = []
    for scheduler in candidates:
        name, total = type(scheduler).__name__, scheduler.config.num_train_timesteps
        try:
            served = grid_of(scheduler, grid.steps)
        except BadInput as error:
            reasons.append(error)
            continue
        if any(abs(a - b) * total > 1e-2 for a, b in zip(served.times, grid.times)):
            reasons.append(BadInput(
                f"{name} serves {_show(served)} in {grid.steps} steps, but the student was trained on {_show(grid)}: "
                f"train on the served times, or on grid: {grid.steps}."
            ))
        elif name == "LCMScheduler" and round(served.times[-2] * total) == 1:
            reasons.append(BadInput(f"{name} ignores the network at timestep 0: take fewer steps than {grid.steps}."))
        else:
            return scheduler
    raise reasons[0]


def stock_table(schedule: Table) -> dict:
    r"""Settings of a stock scheduler with this table: its formula where one gives it bit for bit, else the betas.

    beta_n = 1 - abar_n / abar_{n-1}, each with the rounding of the ones before it made up for, so that the stock
    product of 1 - beta in float32 stays within one rounding of the table.
    """
    from distill.nets.diffusers import scheduler_of

    abar, total = schedule.alphas_cumprod, len(schedule.alphas_cumprod)
    first, last = (float(f"{beta:.3g}") for beta in (1 - abar[0], 1 - abar[-1] / (1.0, *abar)[-2]))
    for formula in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        settings = {"num_train_timesteps": total, "beta_schedule": formula}
        settings |= {} if "cos" in formula else {"beta_start": first, "beta_end": last}
        if tuple(scheduler_of("DDIMScheduler", **settings).alphas_cumprod.tolist()) == abar:
            return settings
    betas, product = [], 1.0
    for a in abar:
        betas.append(torch.tensor(1 - a / product, dtype=torch.float32))
        product *= (1 - betas[-1]).item()
    return {"num_train_timesteps": total, "trained_betas": [beta.item() for beta in betas]}


def describe(student: Denoiser, grid: Grid, sampler: str, scheduler, w: float | None) -> dict:
    """The conventions of an exported student, for distill.json."""
    scheduler.set_timesteps(grid.steps)
    return {
        "part": student.net.part,
        "steps": grid.steps,
        "timesteps": scheduler.timesteps.tolist(),
        "times": list(grid.times),
        "sampler": sampler,
        "prediction": student.prediction,
        "guidance": w,
        "classes": student.net.classes,
        "null_class": student.net.null_class,
        "reference": {"seed": SEED},
    }


@torch.no_grad()
def _save_references(student: Denoiser, grid: Grid, sampler: str, w: float | None, file: Path) -> None:
    """Noise, class rows and samples of the trainer's own sampler, the student unfolded."""
    from safetensors.torch import save_file

    net, cond, tensors = student.net, {}, {}
    if net.classes:
        labels = torch.arange(REFERENCES) % net.classes
        if net.null_class:
            labels[-1] = -1
        cond["label"] = labels
        tensors["labels"] = torch.where(labels < 0, net.classes, labels)
    if net.guided:
        cond["w"] = w
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(REFERENCES, *net.shape, generator=generator)
    told = FlowMap(student, gap_of(grid, sampler)) if net.flow_map else student
    samples = solve(told, noise, grid.times, SAMPLERS[sampler], generator=generator, **cond)
    save_file(tensors | {"noise": noise, "samples": samples.contiguous()}, file)


class FlowMap(Denoiser):
    """A flow map that is always asked for the step t -> t - gap."""

    def __init__(self, student: Denoiser, gap: float):
        super().__init__(None, student.schedule, "x")
        self.student, self.gap = student, gap

    def native(self, x_t: Tensor, t: Tensor, **cond) -> Tensor:
        return self.student(x_t, t, s=t - self.gap, **cond)


def gap_of(grid: Grid, sampler: str) -> float:
    """t - s of every step of the walk: s is the next time for ode, data for renoise."""
    ends = grid.times[1:] if sampler == "ode" else (0.0,) * grid.steps
    gaps = [t - s for t, s in zip(grid.times, ends)]
    if max(gaps) - min(gaps) > 1e-6:
        raise BadInput(f"A stock network cannot be told the second time of a flow map, and t - s varies with "
                       f"'{sampler}' on {_show(grid)}: export it with a uniform grid and 'ode', or with one step.")
    return gaps[0]


def _write(staging: Path, network, scheduler, net) -> None:
    """model_index.json and the parts of the pipeline."""
    import diffusers

    staging.mkdir(parents=True, exist_ok=True)
    if net.part == "transformer":
        names = {i: str(i) for i in range(net.classes)}
        pipeline = diffusers.DiTPipeline(network, autoencoder(net.shape[0]), scheduler, names)
    else:
        pipeline = diffusers.ConsistencyModelPipeline(network, scheduler)
    pipeline.save_pretrained(staging)
    strip(staging)


def strip(folder: Path) -> None:
    """Take out of configs where their weights came from, and what diffusers notes of a tiny autoencoder and warns of."""
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text())
        noted = {"_name_or_path"} | ({"block_out_channels"} if file.parent.name == "vae" else set())
        if noted & config.keys():
            config = {k: v for k, v in config.items() if k not in noted}
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _show(grid: Grid) -> str:
    return f"[{', '.join(f'{t:g}' for t in grid.times)}]"

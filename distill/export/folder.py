r"""Pipeline folders of class-conditional and unconditional students, for stock diffusers.

The network's family has the stock pipeline; where that needs an autoencoder, `identity_vae` passes pixels through. The
student's sampler picks the stock scheduler:

    ode      x_s = alpha_s x + sigma_s eps      DDIMScheduler, trailing spacing
    renoise  x_s = alpha_s x + sigma_s noise    LCMScheduler, original_inference_steps chosen to hit the grid

`grid_of` reads the times back from that scheduler; a student that was trained on other times is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.denoise import Denoiser, network_of
from distill.errors import BadInput
from distill.export.identity_vae import identity_vae
from distill.export.request import SEED, ExportRequest
from distill.files import read_json, write_json
from distill.noise import Table
from distill.solvers import DDIM, Renoise, solve
from distill.times import Grid

SAMPLERS = {"ode": DDIM(), "renoise": Renoise()}
REFERENCES = 4  # number of reference samples


def write(request: ExportRequest) -> dict:
    """Write the pipeline and its reference samples; return the record for distill.json.

    Raises:
        BadInput: no stock network, scheduler or prediction type serves this student.
    """
    student, grid, sampler = request.student, request.grid, request.sampler
    network, scheduler = all_of(
        lambda: stock_network(student, grid, sampler, request.w), lambda: stock_scheduler(student, grid, sampler)
    )
    _write(request.staging, network, scheduler, request.student.net)
    _save_references(request, request.staging / "reference.safetensors")
    return describe(request.student, request.grid, request.sampler, scheduler, request.w)


def all_of(*builders: Callable[[], Any]) -> list[Any]:
    """What each builder returns.

    Raises:
        BadInput: some of them raise it; one sentence with the obstacles of all, in their order.
    """
    built, obstacles = [], []
    for build in builders:
        try:
            built.append(build())
        except BadInput as error:
            obstacles.append(str(error).rstrip("."))
    if obstacles:
        first, *others = obstacles
        raise BadInput("; and ".join([first, *(text.replace("A student", "a student", 1) for text in others)]) + ".")
    return built


def stock_network(student: Denoiser, grid: Grid, sampler: str, w: float | None):
    """The stock network that computes what the student does on this grid, with w and t - s folded in.

    Raises:
        BadInput: the network has no stock class, or is a flow map whose t - s varies from step to step.
    """
    from distill.models.diffusers import LABEL_FAMILIES, StockNetwork

    net = network_of(student)
    if not isinstance(net, StockNetwork) or not net.family.takes_labels:
        known = ", ".join(family.adapter.__name__ for family in LABEL_FAMILIES.values())
        raise BadInput(
            f"{type(net).__name__} has no stock class in diffusers: export {known} or a network that "
            "`distill.models.diffusers.load` read from a pipeline folder, or export as onnx."
        )
    if net.family.needs_classes and not net.classes:
        free = [family.adapter.__name__ for family in LABEL_FAMILIES.values() if not family.needs_classes]
        raise BadInput(
            f"{net.family.label_pipeline} needs classes: export a {type(net).__name__} that has some, or a "
            f"{' or '.join(free)}."
        )
    if isinstance(student.schedule, Table) and net.timesteps != len(student.schedule.alphas_cumprod):
        raise BadInput(
            f"The network counts timesteps={net.timesteps} but its schedule has "
            f"{len(student.schedule.alphas_cumprod)}: train with the same number in both."
        )
    gap = gap_of(grid, sampler) if net.flow_map else None
    return net.fold(w=w if net.guided else None, gap=gap)


def stock_scheduler(student: Denoiser, grid: Grid, sampler: str, first: list | None = None):
    """The stock scheduler that samples on the student's grid as the student does; one of `first` if its table is equal.

    Raises:
        BadInput: there is none; the message shows the times that the stock scheduler would use.
    """
    from distill.models.diffusers import PREDICTIONS, schedule_of, scheduler_of

    if sampler not in SAMPLERS:
        raise BadInput(f"sampler '{sampler}' is none of {', '.join(SAMPLERS)}.")
    stock = {ours: theirs for theirs, ours in PREDICTIONS.items() if ours in ("eps", "x", "v")}
    if student.prediction not in stock or not isinstance(student.schedule, Table):
        raise BadInput(
            f"A student that predicts '{student.prediction}' under {type(student.schedule).__name__} has no stock "
            f"scheduler: export needs {', '.join(stock)} under a Table (`distill.noise.Table.of` makes one)."
        )
    settings = stock_table(student.schedule) | {
        "prediction_type": stock[student.prediction],
        "clip_sample": False,
        "set_alpha_to_one": True,
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
    """The first of the candidates that samples on the grid; else BadInput with the first one's reason."""
    from distill.models.diffusers import grid_of

    reasons = []
    for scheduler in candidates:
        name, total = type(scheduler).__name__, scheduler.config.num_train_timesteps
        try:
            served = grid_of(scheduler, grid.steps)
        except BadInput as error:
            reasons.append(error)
            continue
        if any(abs(a - b) * total > 1e-2 for a, b in zip(served.times, grid.times)):
            reasons.append(
                BadInput(
                    f"{name} serves {_show(served)} in {grid.steps} steps, but the student was trained on {_show(grid)}: "
                    f"train on the served times, or on grid: {grid.steps}."
                )
            )
        elif name == "LCMScheduler" and round(served.times[-2] * total) == 1:
            reasons.append(BadInput(f"{name} ignores the network at timestep 0: use fewer steps than {grid.steps}."))
        else:
            return scheduler
    raise reasons[0]


def stock_table(schedule: Table) -> dict:
    r"""Settings of a stock scheduler with this table: its formula where one gives it bit for bit, else the betas.

    beta_n = 1 - abar_n / abar_{n-1}, each corrected for the rounding of those before it, so that the stock
    product of 1 - beta in float32 stays within one rounding of the table.
    """
    from distill.models.diffusers import scheduler_of

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
        "call": {"num_inference_steps": grid.steps, **student.net.family.no_guidance},
        "reference": {"seed": SEED},
    }


@torch.no_grad()
def _save_references(request: ExportRequest, file: Path) -> None:
    """Write noise, labels and samples of the trainer's own sampler, of the student before folding."""
    from safetensors.torch import save_file

    net, cond, tensors = request.student.net, {}, {}
    if net.classes:
        labels = torch.arange(REFERENCES) % net.classes
        if net.null_class:
            labels[-1] = -1
        cond["label"] = labels.to(request.device)
        tensors["labels"] = torch.where(labels < 0, net.classes, labels)
    if net.guided:
        cond["w"] = request.w
    generator = torch.Generator().manual_seed(SEED)
    draw = partial(torch.randn, REFERENCES, *net.shape, generator=generator, dtype=getattr(torch, request.dtype))
    noise = draw()  # on the CPU in the dtype of the weights, as stock pipelines draw
    x = reference_samples(request, noise.float(), draw, cond)
    save_file(tensors | {"noise": noise, "samples": x.contiguous()}, file)


def reference_samples(
    request: ExportRequest,
    noise: Tensor,
    draw: Callable[[], Tensor],
    cond: dict[str, Any],
    student: Denoiser | None = None,
) -> Tensor:
    """Samples (B, ...) of the request's student by the trainer's own sampler, float32 on the CPU.

    Args:
        request: the grid, the sampler, the device and the student.
        noise: the state (B, ...) at time 1.
        draw: further noise of that shape for each step of a stochastic sampler.
        cond: conditions, w included.
        student: evaluated instead of the request's; by default t - s of a flow map is fixed as the export fixes it.
    """
    if student is None:
        flow_map = request.student.net.flow_map
        student = FixedGap(request.student, gap_of(request.grid, request.sampler)) if flow_map else request.student
    solver, fresh = SAMPLERS[request.sampler], lambda x: draw().to(x)
    return solve(student, noise.to(request.device), request.grid, solver, generator=fresh, **cond).float().cpu()


class FixedGap(Denoiser):
    """A flow map evaluated at s = t - gap, with one gap for all steps."""

    def __init__(self, student: Denoiser, gap: float):
        super().__init__(None, student.schedule, "x")
        self.student, self.gap = student, gap

    def native(self, x_t: Tensor, t: Tensor, **cond) -> Tensor:
        return self.student(x_t, t, s=t - self.gap, **cond)


def gap_of(grid: Grid, sampler: str) -> float:
    """t - s of every step: s is the next time for "ode", and 0 for "renoise".

    Raises:
        BadInput: t - s varies from step to step.
    """
    ends = grid.times[1:] if sampler == "ode" else (0.0,) * grid.steps
    gaps = [t - s for t, s in zip(grid.times, ends)]
    if max(gaps) - min(gaps) > 1e-6:
        raise BadInput(
            f"The stock network has no input for the second time s of a flow map, and t - s varies with '{sampler}' on "
            f"{_show(grid)}: export on a uniform grid with 'ode', or with one step."
        )
    return gaps[0]


def _write(staging: Path, network, scheduler, net) -> None:
    """model_index.json and the parts of the pipeline."""
    staging.mkdir(parents=True, exist_ok=True)
    net.family.build_pipeline(network, scheduler, identity_vae(net.shape[0]), net.classes).save_pretrained(staging)
    strip(staging)


def strip(folder: Path) -> None:
    """Remove from all configs the path their weights came from, and the keys of a tiny VAE that diffusers warns about."""
    for file in folder.rglob("*.json"):
        config = read_json(file)
        removed = {"_name_or_path"} | ({"block_out_channels"} if file.parent.name == "vae" else set())
        if removed & config.keys():
            config = {k: v for k, v in config.items() if k not in removed}
            write_json(file, dict(sorted(config.items())))


def _show(grid: Grid) -> str:
    return f"[{', '.join(f'{t:g}' for t in grid.times)}]"

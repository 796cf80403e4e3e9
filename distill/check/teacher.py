r"""Whether the model that training starts from denoises this data: the one sight of most wrong conventions.

With x_t = alpha_t x + sigma_t z and v the data's variance about its mean, the best linear denoiser errs by

    w(t) = sigma_t^2 / (alpha_t^2 v + sigma_t^2)    of v,

0 at t = 0 and 1 at t = 1, below both trivial ones, the mean (1) and x_t / alpha_t (sigma_t^2 / (alpha_t^2 v)). A trained
model stays below w at every t; one that is asked in a wrong chart, at a wrong time or on another scale does not.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.check.base import Probe, Said
from distill.denoise import PREDICTIONS, has_network, network_of
from distill.errors import BadInput
from distill.grid import Grid
from distill.nets.lora import Adapter
from distill.noise import Table, bcast
from distill.solvers import DDIM, Renoise, solve

BETTER = 0.8  # another convention whose error is below this share of the present one's is the right one
SHIFTS = (1 / 3, 0.5, 2.0, 3.0)
SCALES = (0.13025, 0.18215, 0.2, 0.5, 0.67, 1.5, 2.0, 5.0, 1 / 0.18215, 1 / 0.13025)


def denoises(p: Probe) -> Said:
    """The error against the noise level, and the convention that fits better if there is one."""
    role, model = p.model()
    if model is None:
        yield "skipped", "no role has learnt anything yet."
        return
    if not p.readable or float(p.x.var(0).mean() if len(p.x) > 1 else 0) == 0:
        yield "skipped", "it needs samples that are finite and differ."
        return
    if fault := _schedule_fault(model.schedule):
        yield "FAIL", f"roles.{role}.schedule: {fault}"
        return
    trial = Trial(model, p.x, p.cond)
    now = trial.score()
    found, fit = _alternative(trial, role, now)
    allowed = 1.1 + 4 / math.sqrt(p.x.numel())
    if found and fit < BETTER * now:
        yield "FAIL", f"{found} (error {fit:.2f} instead of {now:.2f} of the best linear denoiser's)."
    elif now > allowed or not math.isfinite(now):
        yield "FAIL", (f"roles.{role} denoises worse than a linear map (error {now:.2f} of its; at most 1 is right): "
                       "its prediction, schedule, time or scale of the data is wrong, or it is not trained.")  # fmt: skip
    else:
        rises = all(b > a - 0.1 for a, b in pairwise(trial.errors))
        shape = f"from {trial.errors[0]:.2f} of the data's variance at t = {trial.times[0]:.2f} to " \
                f"{trial.errors[-1]:.2f} at {trial.times[-1]:.2f}"  # fmt: skip
        if rises:
            yield "ok", f"roles.{role} errs {shape}: {now:.2f} of the best linear denoiser's."
        else:
            yield "WARN", f"roles.{role}'s error does not rise with the noise ({shape}); look at its schedule."


class Trial:
    """A model on fixed samples and noise: mean log ratio of its error to the best linear denoiser's, as a factor."""

    def __init__(self, model: Any, x: Tensor, cond: dict[str, Tensor]):
        big = sum(p.numel() for p in model.parameters()) > 2e7
        n = min(len(x), 16 if big else 32 if x[0].numel() > 16 else 256)
        self.model, self.x, self.cond = model.eval(), x[:n], {k: v[:n] for k, v in cond.items()}
        self.v = float((x - x.mean(0)).square().mean())
        self.z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)[:n]
        self.times = _times(model.schedule, math.sqrt(self.v), 5 if big else 8)
        self.errors: list[float] = []
        self.raw: dict[float, Tensor] = {}  # what the network says at its own times, in whatever chart

    @torch.no_grad()
    def score(self, prediction: str | None = None, told: Any = None, scale: float = 1.0) -> float:
        """exp of the mean over times of log(error / w); `told` maps t to the time that the network is told."""
        logs, errors, schedule = [], [], self.model.schedule
        x = self.x * scale
        for time in self.times:
            t = torch.full((len(x),), time, device=x.device)
            x_t = schedule.add_noise(x, t, self.z)
            if told is None and prediction is None:
                found = self.model(x_t, t, **self.cond)
            else:
                out = self._native(x_t, time, told(t) if told else t, scale)
                found = to_x(self.model, out, x_t, t, prediction or self.model.prediction)
            alpha, sigma = (float(c) for c in schedule(t[:1]))
            v = self.v * scale**2
            errors.append(float((found - x).square().mean()) / v)
            logs.append(math.log(max(errors[-1] * (alpha**2 * v + sigma**2) / sigma**2, 1e-12)))
        if prediction is None and told is None and scale == 1:
            self.errors = errors
        value = sum(logs) / len(logs)
        return math.exp(min(value, 50)) if math.isfinite(value) else math.inf

    def _native(self, x_t: Tensor, time: float, told: Tensor, scale: float) -> Tensor:
        if scale != 1 or float(told[0]) != torch.tensor(time).item():
            return self.model.native(x_t, told, **self.cond)
        if time not in self.raw:
            self.raw[time] = self.model.native(x_t, told, **self.cond)
        return self.raw[time]


def to_x(model: Any, out: Tensor, x_t: Tensor, t: Tensor, prediction: str) -> Tensor:
    """`model.to_x` as if it predicted something else."""
    own, model.prediction = model.prediction, prediction
    try:
        return model.to_x(out, x_t, t)
    finally:
        model.prediction = own


def _times(schedule: Any, std: float, count: int) -> list[float]:
    """Times at which noise and data are within a factor of ten of each other, evenly spread."""
    t = torch.linspace(0, 1, 402, dtype=torch.float64)[1:-1]
    alpha, sigma = schedule(t)
    ratio = sigma / (alpha * std)
    inside = t[(ratio > 0.1) & (ratio < 10)]
    inside = inside if len(inside) >= count else t
    return inside[torch.linspace(0, len(inside) - 1, count).round().long()].tolist()


def _schedule_fault(schedule: Any) -> str:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = schedule(t)
    if abs(float(alpha[0]) - 1) > 1e-3 or float(sigma[0]) > 1e-3:
        return (f"at t = 0 alpha is {float(alpha[0]):.3g} and sigma {float(sigma[0]):.3g}, but data has 1 and 0; "
                "alpha and sigma are swapped, or time runs backwards.")  # fmt: skip
    if bool((alpha.diff() > 1e-6).any()) or bool((sigma.diff() < -1e-6).any()):
        return "alpha rises or sigma falls somewhere between data (t = 0) and noise (t = 1); give a schedule of noise.py."
    return ""


def _alternative(trial: Trial, role: str, now: float) -> tuple[str, float]:
    """The convention with the smallest error but the present one, as a sentence, and that error."""
    model, tried = trial.model, []
    if not has_network(model):
        return "", math.inf
    for other in PREDICTIONS:
        if other not in (model.prediction, "edm") and "edm" != model.prediction:
            tried.append((trial.score(prediction=other),
                          f"roles.{role}.prediction: {model.prediction} fits the network worse than {other}; set {other}"))
    for shift in SHIFTS:
        tried.append((trial.score(told=lambda t, k=shift: k * t / (1 + (k - 1) * t)),
                      f"roles.{role}.schedule: the network expects another noise level at the times it is told, as if "
                      f"time were shifted by {shift:.2g}; give it the schedule it was trained under"))
    tried.append((trial.score(told=lambda t: 1 - t), f"roles.{role}: the network's time runs from noise to data; "
                  "tell it 1 - t"))  # fmt: skip
    for factor in (1000.0, 0.001):
        tried.append((trial.score(told=lambda t, k=factor: t * k),
                      f"roles.{role}: the network counts time in units of {1 / factor:g}; tell it {factor:g} t"))
    if now > BETTER:
        for scale in SCALES:
            tried.append((trial.score(scale=scale),
                          f"data: the samples are not on the scale roles.{role} knows; multiply them by about {scale:.3g}"))
    fit, text = min(tried)
    return text, fit


# -- the stock pipeline ------------------------------------------------------------------------------------------


def matches_stock(p: Probe) -> Said:
    """A loaded model draws the samples kept in its folder, or denoises as the stock scheduler there does."""
    from distill.nets.diffusers import Stock

    for role in (*p.method.frozen, *p.method.trainable):
        network = network_of(getattr(p.method, role))
        if network.folder and isinstance(network.base, Stock):
            yield from _against(p, getattr(p.method, role), Path(network.folder), f"roles.{role}.path")
            return
    yield "skipped", "no role is loaded from a diffusers folder."


@torch.no_grad()
def _against(p: Probe, model: Any, folder: Path, key: str) -> Said:
    stored = folder / "reference.safetensors"
    if stored.is_file() and (folder / "distill.json").is_file():
        gap, what = _references(model, stored, json.loads((folder / "distill.json").read_text())), "the samples kept there"
    else:
        try:
            gap, what = _scheduler(p, model, folder), "what its stock scheduler makes of the network"
        except BadInput as error:
            yield "skipped", str(error)
            return
    if gap <= 1e-3:
        yield "ok", f"{folder} repeats {what} to {gap:.0e}."
    else:
        yield "FAIL", (f"{key}: {folder} does not repeat {what} (difference {gap:.2g}); its weights, scheduler or "
                       "null_class were changed: copy the folder again, or read it as it was made.")  # fmt: skip


def _references(model: Any, stored: Path, record: dict) -> float:
    from safetensors.torch import load_file

    kept, device, net = load_file(stored), next(model.parameters()).device, network_of(model)
    cond = {"w": record["guidance"]} if net.guided and record.get("guidance") is not None else {}
    if "labels" in kept and net.classes:
        cond["label"] = torch.where(kept["labels"] >= net.classes, -1, kept["labels"]).to(device)
    generator = torch.Generator().manual_seed(record["reference"]["seed"])
    torch.randn(kept["noise"].shape, generator=generator)
    walk = {"ode": DDIM(), "renoise": Renoise()}[record["sampler"]]
    x = solve(model, kept["noise"].to(device), Grid(tuple(record["times"])), walk, generator=generator, **cond)
    return float((x.cpu() - kept["samples"]).abs().max() / kept["samples"].abs().max().clamp(min=1))


def _scheduler(p: Probe, model: Any, folder: Path) -> float:
    """Largest difference to `pred_original_sample` of stock DDIM over ten timesteps, under conditions of the data."""
    from diffusers import DDIMScheduler

    from distill.nets.diffusers import scheduler_of

    stock, net, worst = scheduler_of(folder), network_of(model).base, 0.0
    if not isinstance(model.schedule, Table):
        raise BadInput(f"{type(stock).__name__} does not tell its estimate of the data, to which ours would compare.")
    table = stock.alphas_cumprod
    stock = DDIMScheduler.from_config(stock.config, clip_sample=False, thresholding=False)
    stock.alphas_cumprod = table  # some classes shift theirs
    total = len(stock.alphas_cumprod)
    stock.set_timesteps(10)
    _, cond = p.some(2)
    if not net.told:
        cond = {"label": torch.zeros(2, dtype=torch.long)} if net.classes else {}
    device = next(model.parameters()).device
    cond = {k: v.to(device) for k, v in cond.items()}
    x = torch.randn(len(next(iter(cond.values()), [0, 0])), *net.shape, generator=torch.Generator().manual_seed(0)).to(device)
    for n in stock.timesteps.tolist():
        out = net.call(x, torch.full((len(x),), float(n), device=device), cond if net.told else cond.get("label"))
        theirs = stock.step(out, n, x).pred_original_sample
        ours = model(x, torch.full((len(x),), (n + 1) / total, device=device), **cond)
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)))
    return worst


# -- guidance and the start --------------------------------------------------------------------------------------


def guides(p: Probe) -> Said:
    """The condition changes the teacher, there is a null condition, and w is in this project's convention."""
    role, model = p.model()
    w, drawn = p.method.guidance, p.cfg.method.get("guidance_range")
    used = drawn is not None or w != 1
    if "weak" in p.method.frozen:
        yield "skipped", "guidance is by the weaker model roles.weak."
        return
    if drawn is None and w < 1:
        yield "WARN", (f"method.guidance: {w:g} is below 1, and 1 is the conditional model, 0 the unconditional one; a "
                       "paper that counts from 0 calls ours its w + 1.")  # fmt: skip
    if model is None and p.random and "teacher" in p.method.frozen:
        role, model = "teacher", p.method.teacher  # random weights listen to conditions too
    if model is None:
        yield "skipped", "no role has learnt a condition yet."
        return
    if not p.cond:
        if used:
            yield "FAIL", (f"method.guidance: {w:g} does nothing, because the data carries no condition; give labelled "
                           "data, or set guidance: 1.")  # fmt: skip
        else:
            yield "skipped", "there is no condition and no guidance."
        return
    yield from _conditions(p, role, model, used)


@torch.no_grad()
def _conditions(p: Probe, role: str, model: Any, used: bool) -> Said:
    x, cond = p.some(32)
    t = torch.full((len(x),), 0.6, device=x.device)
    x_t = model.schedule.add_noise(x, t, torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x))
    net, level = network_of(model), "FAIL" if used else "WARN"
    if used and net.classes and not net.null_class:
        yield "FAIL", (f"roles.{role}: the network has no class for 'no class', which guidance asks for; set guidance: 1, "
                       "or null_class: true if its last class is that.")  # fmt: skip
        return
    try:
        null = model.null(cond) if net.null_class else None
    except BadInput as error:
        if used:
            yield "FAIL", str(error)
            return
        null = None
    if null is None:
        yield "ok", "the conditional model alone is used, and there is no null condition."
        return
    given, free = model(x_t, t, **cond), model(x_t, t, **null)
    apart = float((given - free).norm() / given.norm().clamp(min=1e-12))
    told = any(bool((v != null[k]).any()) for k, v in cond.items())
    if not told and bool((cond.get("label", torch.zeros(1)) == -1).all()):
        if used:
            yield "FAIL", "data: every label is 'no class' (-1), so guidance does nothing; label the data."
        else:
            yield "skipped", "every label is 'no class'."
    elif apart < 1e-6:
        same = "equals the condition" if not told else "changes nothing in its output"
        yield level, (f"roles.{role}: the null condition {same}, so guidance does nothing; "
                      "give the network a null class that it was trained on.")  # fmt: skip
    elif p.readable and not p.random and _prefers_none(model, p):
        yield "WARN", (f"roles.{role} denoises better without its condition than with it; the classes of the data may be "
                       "numbered differently from the model's.")  # fmt: skip
    else:
        yield "ok", f"the condition changes the {role}'s estimate by {apart:.0%}; w = {p.method.guidance:g}, 1 is conditional."


def _prefers_none(model: Any, p: Probe) -> bool:
    with_it, without = Trial(model, p.x, p.cond), Trial(model, p.x, model.null(p.cond))
    return with_it.score() > 1.02 * without.score()


@torch.no_grad()
def starts_equal(p: Probe) -> Said:
    """The student answers as the teacher does before its first update, whatever it is told of w and s."""
    teacher, student, given = getattr(p.method, "teacher", None), p.method.student, p.cfg.roles.get("student")
    if not (has_network(student) and has_network(teacher)):
        yield "skipped", "there is no teacher with a network."
        return
    if p.method.warm_start:
        yield "skipped", f"the student first imitates the teacher for {p.method.warm_start} steps (method.warm_start)."
        return
    ours, theirs = student.net, teacher.net
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    if not isinstance(ours, Adapter) and any(shapes.get(k) != v.shape for k, v in theirs.state_dict().items()):
        yield "skipped", "student and teacher have different networks."
        return
    gap = _gap(p, student, teacher)
    if gap <= 1e-4:
        yield "ok", f"the student is the teacher before its first update (difference {gap:.0e})."
        return
    copied = given is None or isinstance(given, str) or _source(given) == _source(p.cfg.roles.get("teacher"))
    yield ("FAIL" if copied else "WARN"), (
        f"roles.student does not answer as the teacher before its first update (difference {gap:.2g}); "
        + ("something changed its weights, or its new inputs w and s do not start at zero." if copied else
           "leave it out to start from the teacher's weights, or set method.warm_start.")
    )  # fmt: skip


def _source(settings: Any) -> Any:
    return (settings.get("_target_"), settings.get("path")) if hasattr(settings, "get") and settings.get("path") else settings


def _gap(p: Probe, student: Any, teacher: Any) -> float:
    x, cond = p.some(8)
    draw, worst = torch.Generator().manual_seed(2), 0.0
    for w, frac in ((1.0, 1.0), (4.0, 0.3)):
        t = (0.05 + 0.9 * torch.rand(len(x), generator=draw)).to(x.device)
        x_t = bcast(t, x) * torch.randn(x.shape, generator=draw).to(x) + x
        told = {"w": torch.full_like(t, w)} if network_of(student).guided else {}
        told |= {"s": frac * t} if network_of(student).flow_map else {}
        theirs = teacher(x_t, t, **cond)
        worst = max(worst, float((student(x_t, t, **cond, **told) - theirs).abs().max() / theirs.abs().max().clamp(min=1)))
    return worst

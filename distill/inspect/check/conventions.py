r"""Checks that the pretrained model denoises this data: most wrong conventions show here.

With x_t = alpha_t x + sigma_t z and v the variance of the data about its mean, the best linear denoiser has the error

    w(t) = sigma_t^2 / (alpha_t^2 v + sigma_t^2)    as a share of v:

0 at t = 0 and 1 at t = 1, below that of both trivial denoisers, the mean (1) and x_t / alpha_t (sigma_t^2 / (alpha_t^2 v)).
The error of a trained model is below w at every t; with a wrong prediction type, time or scale it is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.denoise import PREDICTIONS, has_network, network_of
from distill.errors import BadInput
from distill.inspect.check.base import CheckContext, Finding, Findings
from distill.noise import RectifiedFlow, Table
from distill.solvers import DDIM, Renoise, solve
from distill.times import Grid

BETTER = 0.8  # another convention whose error is below this share of the present one's fits better
FINALISTS = 4  # alternatives that are tried at all times, of those that are best at a third of them
SHIFTS = (1 / 3, 0.5, 2.0, 3.0)
SCALES = (0.13025, 0.18215, 0.2, 0.5, 0.67, 1.5, 2.0, 5.0, 1 / 0.18215, 1 / 0.13025)


def denoises(context: CheckContext) -> Findings:
    """Compare the model's error with that of the best linear denoiser, also under other conventions."""
    role, model = context.pretrained()
    if model is None:
        yield Finding.skipped("no role is trained yet.")
        return
    if not context.readable or float(context.x.var(0).mean() if len(context.x) > 1 else 0) == 0:
        yield Finding.skipped("it needs samples that are finite and differ.")
        return
    if fault := _schedule_fault(model.schedule):
        yield Finding.fail(f"roles.{role}.schedule: {fault}")
        return
    fit = ConventionFit(model, context.x, context.cond)
    now, allowed = fit.score(), largest_error(context.x)
    mend, error = _alternative(fit, role, now)
    if mend and error < BETTER * now and error <= allowed:
        certain = now > BETTER  # below, the present conventions fit too: data that differ a little may do that
        text = f"{mend} (error {error:.2f} instead of {now:.2f} of the best linear denoiser's)."
        yield Finding("FAIL" if certain else "WARN", text)
    elif not math.isfinite(now):
        yield Finding.fail(
            f"roles.{role} returns values that are not finite; look at its weights, and at engine.precision."
        )
    elif now > allowed:
        level = "FAIL" if context.method.frozen else "WARN"  # without a teacher, training may start from random weights
        text = (
            "no other prediction type, time, sign, scale or orientation that was tried fits: the data may not be of "
            "the kind that it was trained on (other pictures, order of channels or autoencoder), or it is not trained."
            if has_network(model)
            else "it has no network: it is not the distribution of this data."
        )
        text = f"roles.{role} denoises worse than a linear map (error {now:.2f} of its; at most 1 is right), and {text}"
        yield Finding(level, text + " Continue if it starts untrained." * (level == "WARN"))
    else:
        rises = all(b > a - 0.1 for a, b in pairwise(fit.errors))
        shape = (
            f"from {fit.errors[0]:.2f} of the data's variance at t = {fit.times[0]:.2f} to "
            f"{fit.errors[-1]:.2f} at {fit.times[-1]:.2f}"
        )
        if rises:
            yield Finding.ok(f"roles.{role} has an error {shape}: {now:.2f} of the best linear denoiser's.")
        else:
            yield Finding.warn(f"roles.{role}'s error does not rise with the noise ({shape}); look at its schedule.")


def largest_error(x: Tensor) -> float:
    """The error over the best linear denoiser's up to which a model counts as trained on x, sampling error included."""
    return 1.1 + 4 / math.sqrt(x.numel())


class ConventionFit:
    """The error of a model under several conventions, on fixed samples and noise, over that of the best linear denoiser."""

    def __init__(self, model: Any, x: Tensor, cond: dict[str, Tensor]):
        big = sum(p.numel() for p in model.parameters()) > 2e7
        n = min(len(x), 16 if big else 32 if x[0].numel() > 16 else 256)
        self.model, self.x, self.cond, self.all = model.eval(), x[:n], {k: v[:n] for k, v in cond.items()}, x
        self.v = float((x - x.mean(0)).square().mean())
        self.z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)[:n]
        self.times = _times(model.schedule, math.sqrt(self.v), 5 if big else 8)
        self.errors: list[float] = []
        self.raw: dict[float, Tensor] = {}  # the network's outputs at its own times

    @torch.no_grad()
    def score(
        self,
        prediction: str | None = None,
        time_map: Any = None,
        data_map: Any = None,
        sign: float = 1.0,
        screen: bool = False,
    ) -> float:
        """exp of the mean over times of log(error / w) under another prediction type, time input, data or sign.

        Args:
            time_map: t to the time that the network gets.
            data_map: the samples to those that the network gets.
            sign: multiplies the network's output.
            screen: use every third time only.
        """
        logs, errors, schedule = [], [], self.model.schedule
        x = data_map(self.x) if data_map else self.x
        v = self.v if data_map is None else float(data_map(self.all).sub(data_map(self.all).mean(0)).square().mean())
        for time in self.times[1::3] if screen else self.times:
            t = torch.full((len(x),), time, device=x.device)
            x_t = schedule.add_noise(x, t, self.z)
            if time_map is None and prediction is None and sign == 1:
                estimate = self.model(x_t, t, **self.cond)
            else:
                out = sign * self._native(x_t, time, time_map(t) if time_map else t, data_map is not None)
                estimate = to_x(self.model, out, x_t, t, prediction or self.model.prediction)
            alpha, sigma = (float(c) for c in schedule(t[:1]))
            errors.append(float((estimate - x).square().mean()) / v)
            logs.append(math.log(max(errors[-1] * (alpha**2 * v + sigma**2) / sigma**2, 1e-12)))
        if prediction is None and time_map is None and data_map is None and sign == 1:
            self.errors = errors
        value = sum(logs) / len(logs)
        return math.exp(min(value, 50)) if math.isfinite(value) else math.inf

    def _native(self, x_t: Tensor, time: float, network_time: Tensor, mapped: bool) -> Tensor:
        if mapped or float(network_time[0]) != torch.tensor(time).item():
            return self.model.native(x_t, network_time, **self.cond)
        if time not in self.raw:
            self.raw[time] = self.model.native(x_t, network_time, **self.cond)
        return self.raw[time]


def to_x(model: Any, out: Tensor, x_t: Tensor, t: Tensor, prediction: str) -> Tensor:
    """`model.to_x` with another prediction type."""
    declared, model.prediction = model.prediction, prediction
    try:
        return model.to_x(out, x_t, t)
    finally:
        model.prediction = declared


def _times(schedule: Any, std: float, count: int) -> list[float]:
    """Evenly spaced times at which alpha and sigma differ by less than a factor of ten."""
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
        return (
            f"at t = 0 alpha is {float(alpha[0]):.3g} and sigma {float(sigma[0]):.3g}, but data has 1 and 0; "
            "alpha and sigma are swapped, or time runs backwards."
        )
    if bool((alpha.diff() > 1e-6).any()) or bool((sigma.diff() < -1e-6).any()):
        return (
            "alpha rises or sigma falls somewhere between data (t = 0) and noise (t = 1); give a schedule of noise.py."
        )
    return ""


def _alternative(fit: ConventionFit, role: str, now: float) -> tuple[str, float]:
    """The convention with the smallest error besides the configured one, as a sentence, and that error."""
    if not has_network(fit.model):
        return "", math.inf
    samples = fit.all if now > BETTER else None
    others = list(_alternatives(fit.model, role, samples))
    screened = [_screened(fit, change) for change, _ in others]
    near = sorted(range(len(others)), key=lambda i: screened[i])[:FINALISTS]
    errors = {i: fit.score(**others[i][0]) for i in sorted(near) if screened[i] < math.inf}
    if not errors:
        return "", math.inf
    best = min(errors.values())
    i = next(i for i, error in errors.items() if error <= 1.03 * best)  # of ties the first
    return others[i][1], errors[i]


def _screened(fit: ConventionFit, change: dict[str, Any]) -> float:
    """The error under another convention; infinite if the network refuses its inputs."""
    try:
        return fit.score(**change, screen=True)
    except Exception:  # a user's network may raise anything
        return math.inf


def _alternatives(model: Any, role: str, samples: Tensor | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """Arguments of `ConventionFit.score` for other conventions, and what to do where one is right.

    Args:
        samples: the data, where maps of it are to be tried too.
    """
    for kind in PREDICTIONS:
        if kind not in (model.prediction, "edm") and "edm" != model.prediction:
            mend = f"{model.prediction} fits the network worse than {kind}; set {kind}"
            yield {"prediction": kind}, f"roles.{role}.prediction: {mend}"
    yield {"sign": -1.0}, f"roles.{role}: the network's output has the opposite sign of {model.prediction}; negate it"
    for shift in SHIFTS:
        yield (
            {"time_map": lambda t, k=shift: k * t / (1 + (k - 1) * t)},
            f"roles.{role}.schedule: the network expects another noise level at the times it gets, as if "
            f"time were shifted by {shift:.2g}; give it the schedule it was trained under",
        )
    yield (
        {"time_map": lambda t: 1 - t},
        f"roles.{role}: the network's time runs from noise to data; give it 1 - t",
    )
    for factor in (1000.0, 0.001):
        yield (
            {"time_map": lambda t, k=factor: t * k},
            f"roles.{role}: the network counts time in units of {1 / factor:g}; give it {factor:g} t",
        )
    if samples is not None:
        for data_map, mend in _data_maps(samples, role):
            yield {"data_map": data_map}, f"data: {mend}"


def _data_maps(samples: Tensor, role: str) -> Iterator[tuple[Any, str]]:
    """Maps of the samples that undo a usual mistake, and what to do where one is right."""
    for scale in SCALES:
        yield (
            lambda x, k=scale: k * x,
            f"the samples are not on the scale of roles.{role}; multiply them by about {scale:.3g}",
        )
    yield lambda x: -x, f"the samples have the opposite sign of what roles.{role} was trained on; negate them"
    write = "give their range when the data is written"
    yield lambda x: 2 * x - 1, f"the samples fill [0, 1], and roles.{role} was trained on [-1, 1]; {write}"
    yield lambda x: 1 - 2 * x, f"the samples fill [0, 1] with 0 for white; invert them, and {write}"
    yield lambda x: x / 127.5 - 1, f"the samples fill [0, 255], and roles.{role} was trained on [-1, 1]; {write}"
    shape = samples.shape[1:]
    pixels = len(shape) == 3 and shape[0] in (1, 3)
    if pixels and float(samples.min()) < 0 and float(samples.abs().max()) > 1.01:
        low, high = samples.amin((0, -2, -1), keepdim=True), samples.amax((0, -2, -1), keepdim=True)
        yield (
            lambda x: 2 * (x - low) / (high - low).clamp(min=1e-6) - 1,
            f"the pixels are normalised by a mean and a standard deviation, and roles.{role} was trained on [-1, 1]; "
            f"undo that, and {write}",
        )
    if len(shape) == 3 and shape[0] == 3:
        yield lambda x: x.flip(1), f"the channels are in reverse order for roles.{role}; write RGB instead of BGR"
    if len(shape) == 3 and shape[1] == shape[2]:
        for turns in range(4):
            for mirrored in (False, True):
                if turns or mirrored:
                    names = ["mirrored"] * mirrored + [f"turned by {90 * turns} degrees"] * (turns > 0)
                    yield (
                        lambda x, k=turns, m=mirrored: (x.flip(-1) if m else x).rot90(-k, (-2, -1)),
                        f"the pictures are {' and '.join(names)} for roles.{role}; write them upright",
                    )


# -- the stock pipeline ------------------------------------------------------------------------------------------


def matches_stock(context: CheckContext) -> Findings:
    """A loaded model repeats the samples stored in its folder, or denoises as the folder's stock scheduler does."""
    from distill.models.diffusers import StockNetwork

    for role in (*context.method.frozen, *context.method.trainable):
        network = network_of(getattr(context.method, role))
        if network.folder and isinstance(network.base, StockNetwork):
            yield from _against(context, getattr(context.method, role), Path(network.folder), f"roles.{role}.path")
            return
    yield Finding.skipped("no role is loaded from a diffusers folder.")


@torch.no_grad()
def _against(context: CheckContext, model: Any, folder: Path, key: str) -> Findings:
    stored = folder / "reference.safetensors"
    if stored.is_file() and (folder / "distill.json").is_file():
        gap, target = (
            _references(model, stored, json.loads((folder / "distill.json").read_text())),
            "the samples stored there",
        )
    else:
        try:
            gap, target = _scheduler(context, model, folder), "what its stock scheduler makes of the network"
        except BadInput as error:
            yield Finding.skipped(str(error))
            return
    if gap <= 1e-3:
        yield Finding.ok(f"{folder} repeats {target} to {gap:.0e}.")
    else:
        yield Finding.fail(
            f"{key}: {folder} does not repeat {target} (difference {gap:.2g}); its weights, scheduler or "
            "null_class were changed: copy the folder again, or read it as it was made."
        )


def _references(model: Any, stored: Path, record: dict) -> float:
    from safetensors.torch import load_file

    stored_samples, device, net = load_file(stored), next(model.parameters()).device, network_of(model)
    cond = {"w": record["guidance"]} if net.guided and record.get("guidance") is not None else {}
    if "labels" in stored_samples and net.classes:
        cond["label"] = torch.where(stored_samples["labels"] >= net.classes, -1, stored_samples["labels"]).to(device)
    generator = torch.Generator().manual_seed(record["reference"]["seed"])
    torch.randn(stored_samples["noise"].shape, generator=generator)
    solver = {"ode": DDIM(), "renoise": Renoise()}[record["sampler"]]
    x = solve(
        model, stored_samples["noise"].to(device), Grid(tuple(record["times"])), solver, generator=generator, **cond
    )
    return float((x.cpu() - stored_samples["samples"]).abs().max() / stored_samples["samples"].abs().max().clamp(min=1))


def _scheduler(context: CheckContext, model: Any, folder: Path) -> float:
    """Largest difference to the stock scheduler's estimate of x over ten timesteps, under conditions of the data."""
    from distill.models.diffusers import scheduler_of

    net, worst = network_of(model).base, 0.0
    stock = scheduler_of(folder, **network_of(model).scheduler_settings)
    _, cond = context.samples(2)
    if not net.conditions:
        cond = {"label": torch.zeros(2, dtype=torch.long)} if net.classes else {}
    device = next(model.parameters()).device
    cond = {k: v.to(device) for k, v in cond.items()}
    x = torch.randn(len(next(iter(cond.values()), [0, 0])), *net.shape, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    for n, t, estimate in _estimates(stock, model.schedule):
        out = net.call(x, torch.full((len(x),), n, device=device), cond if net.conditions else cond.get("label"))
        theirs, ours = estimate(out, x), model(x, torch.full((len(x),), t, device=device), **cond)
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)))
    return worst


def _estimates(stock: Any, schedule: Any) -> list[tuple[float, float, Callable[[Tensor, Tensor], Tensor]]]:
    """Ten timesteps n of a stock scheduler, their times t, and its estimate of x from the network's answer and x_t.

    Discrete schedulers: DDIM's `pred_original_sample` on their own table. Flows: x_t - sigma v.
    """
    from diffusers import DDIMScheduler

    if isinstance(schedule, RectifiedFlow):
        stock.set_timesteps(10, **({"mu": 1.0} if stock.config.get("use_dynamic_shifting") else {}))
        sigmas = stock.sigmas.double()[: len(stock.timesteps)]
        times = schedule.time(2 * ((1 - sigmas).log() - sigmas.log()))
        of = lambda sigma: lambda out, x: x - sigma * out  # noqa: E731
        return [(n, t, of(s)) for n, t, s in zip(stock.timesteps.tolist(), times.tolist(), sigmas.tolist())]
    if not isinstance(schedule, Table):
        raise BadInput(f"{type(stock).__name__} has no estimate of x to compare with.")
    table = stock.alphas_cumprod
    stock = DDIMScheduler.from_config(stock.config, clip_sample=False, thresholding=False)
    stock.alphas_cumprod = table  # some classes shift theirs
    stock.set_timesteps(10)
    stepped = lambda n: lambda out, x: stock.step(out, n, x).pred_original_sample  # noqa: E731
    return [(float(n), (n + 1) / len(table), stepped(n)) for n in stock.timesteps.tolist()]

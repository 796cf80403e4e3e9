"""Conversion of diffusers schedulers to Schedules, prediction types and Grids."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch

from distill.errors import BadInput, suggest
from distill.files import read_json
from distill.noise import VE, RectifiedFlow, Schedule, Table, TrigFlow
from distill.times import Grid

PREDICTIONS = {"epsilon": "eps", "sample": "x", "v_prediction": "v", "flow_prediction": "flow"}  # diffusers -> Denoiser
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
KARRAS = (*EDM, "CMStochasticIterativeScheduler", "KarrasVeScheduler")
# These step from n to n - N // K, even if the next timestep is another, and end at `final_alpha_cumprod`.
STRIDED = ("DDIM", "PNDM")  # parts of the class names


def scheduler_of(scheduler: Any, **config: Any) -> Any:
    """A new stock scheduler.

    Args:
        scheduler: an instance, a class name, or a diffusers folder.
        config: settings that override those of the scheduler.

    Raises:
        BadInput: for an unknown class or setting, a folder without scheduler, or missing settings.
    """
    if not isinstance(scheduler, (str, Path)):
        kind, stock = type(scheduler), scheduler.config
    elif (Path(scheduler) / "model_index.json").is_file():
        kind = stock_class(
            read_json(Path(scheduler) / "model_index.json").get("scheduler", [None, None])[1], "Scheduler"
        )
        stock = read_json(Path(scheduler) / "scheduler" / "scheduler_config.json")
    else:
        kind, stock = stock_class(str(scheduler), "Scheduler"), {}
    known = inspect.signature(kind.__init__).parameters
    for key in config:
        if key not in known:
            names = ", ".join(sorted(known.keys() - {"self"}))
            raise BadInput(f"{kind.__name__} has no setting '{key}'.{suggest(key, known)} It has {names}.")
    try:
        return kind.from_config(stock, **config)
    except (TypeError, ImportError) as error:  # arguments without default, optional packages
        raise BadInput(f"{kind.__name__} cannot be created: {str(error).strip()}") from error


def schedule_of(scheduler: Any, **config: Any) -> Schedule:
    r"""The Schedule of a stock scheduler; arguments as for `scheduler_of`.

    - `alphas_cumprod` (DDPM, DDIM, PNDM, Euler, DPM-Solver, LCM, ...; zero terminal SNR included) -> Table
    - flow matching, and `use_flow_sigmas` -> RectifiedFlow(shift)
    - EDM and Karras schedulers -> VE(sigma_max, rho); its sigma_min stays 0, since their last step is from sigma_min to 0
    - the cosine DPM-Solver of sound, whose timestep is atan(sigma) 2 / pi -> TrigFlow

    Raises:
        BadInput: for another class, and for a shift that depends on the image size (`use_dynamic_shifting`).
    """
    scheduler = scheduler_of(scheduler, **config)
    name, stock = type(scheduler).__name__, scheduler.config
    if stock.get("use_dynamic_shifting"):
        raise BadInput(f"{name} shifts time with the image size: pass use_dynamic_shifting=False and a shift.")
    if stock.get("use_flow_sigmas") and "flow_shift" in stock:
        return RectifiedFlow(float(stock.flow_shift))
    if name in FLOW:
        return RectifiedFlow(float(stock.shift))
    if name in KARRAS:
        return VE(float(stock.sigma_max), float(stock.get("rho", 7.0)))
    if name == "CosineDPMSolverMultistepScheduler" and stock.sigma_data == 1:
        return TrigFlow()
    alphas_cumprod = vars(scheduler).get("alphas_cumprod")
    if alphas_cumprod is None:
        raise BadInput(
            f"{name} has no supported noise schedule: it is none of {', '.join(FLOW + KARRAS)} and has no alphas_cumprod."
        )
    return Table(tuple(alphas_cumprod.tolist()))


def prediction_of(scheduler: Any) -> str:
    """The prediction type of a Denoiser (eps, x, v, flow or edm) for a scheduler; argument as for `scheduler_of`.

    Raises:
        BadInput: for a prediction type that Denoiser does not have.
    """
    scheduler = scheduler_of(scheduler)
    name, kind = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if name in FLOW:
        return "flow"
    if name in KARRAS:
        if name in EDM and kind == "epsilon":
            return "edm"
        raise BadInput(
            f"{name} with prediction_type={kind!r} is not supported: only EDM schedulers with 'epsilon' are."
        )
    if kind not in PREDICTIONS:
        raise BadInput(f"{name} has prediction_type={kind!r}, which must be one of {', '.join(PREDICTIONS)}.")
    return PREDICTIONS[kind]


def grid_of(scheduler: Any, steps: int, **config: Any) -> Grid:
    r"""The times of a stock scheduler in `steps` steps, which a student served by it must be trained on.

    Discrete schedulers: t = (n + 1) / N for each timestep n. Flow and Karras schedulers: the time of each sigma.

    Args:
        scheduler, config: as for `scheduler_of`.
        steps: number of steps.

    Raises:
        BadInput: if the times do not start at noise or end at data, if the scheduler steps to another time than that of
            its next call, or calls the network at several times per step.
    """
    scheduler = scheduler_of(scheduler, **config)
    name, schedule = type(scheduler).__name__, schedule_of(scheduler)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise BadInput(f"{name} cannot serve {steps} steps: {error}") from error
    times = _times_of_table(scheduler, steps) if isinstance(schedule, Table) else _times_of_sigmas(scheduler, schedule)
    times = list(dict.fromkeys(times))  # second-order schedulers call twice at the same time
    if len(times) != steps + 1:
        raise BadInput(
            f"{name} calls the network at {len(times) - 1} times in {steps} steps: use a first-order scheduler."
        )
    return Grid(tuple(times))


def _times_of_sigmas(scheduler: Any, schedule: Schedule) -> list[float]:
    if type(scheduler).__name__ == "KarrasVeScheduler":
        raise BadInput("KarrasVeScheduler has no sigmas to read times from: use EDMEulerScheduler.")
    sigma = scheduler.sigmas.double()
    if sigma[-1] != 0:
        raise BadInput(f"{type(scheduler).__name__} stops at sigma={sigma[-1]:g} instead of at data (sigma=0).")
    alpha = 1 - sigma if isinstance(schedule, RectifiedFlow) else torch.ones_like(sigma)
    return [
        round(t, 7) for t in schedule.time(2 * (alpha.log() - sigma.log())).tolist()
    ]  # the precision of float32 sigmas


def _times_of_table(scheduler: Any, steps: int) -> list[float]:
    name, stock, total = type(scheduler).__name__, scheduler.config, len(scheduler.alphas_cumprod)
    nodes = scheduler.timesteps.tolist()
    if nodes[0] != total - 1:
        lcm = "original_inference_steps" in stock
        mend = f"original_inference_steps={steps}" if lcm else "timestep_spacing='trailing'"
        raise BadInput(
            f"{name} starts {steps} steps at timestep {nodes[0]:g}, not at noise ({total - 1}): set {mend} "
            f"and use a number of steps that divides {total}."
        )
    if any(part in name for part in STRIDED):
        stride = total // steps
        for timestep, following in zip(nodes, nodes[1:]):
            if timestep - stride != following:
                raise BadInput(
                    f"{name} steps from timestep {timestep} to {timestep - stride} but calls the network at {following} "
                    f"next: use a number of steps that divides {total} (not {steps}) with trailing spacing."
                )
        if float(scheduler.final_alpha_cumprod) != 1:
            raise BadInput(f"{name} stops at timestep 0 instead of at data: set set_alpha_to_one=True.")
    if stock.get("final_sigmas_type", "zero") != "zero":
        raise BadInput(f"{name} stops at its smallest sigma instead of at data: set final_sigmas_type='zero'.")
    return [*((n + 1) / total for n in nodes), 0.0]


def stock_class(name: str | None, ending: str = "") -> Any:
    """The class of diffusers with this name.

    Args:
        name: the name of the class.
        ending: what the name must end with, such as "Scheduler".

    Raises:
        BadInput: if there is no such class.
    """
    names = [n for n in dir(diffusers) if n.endswith(ending or "Model")]
    if not name or not name.endswith(ending) or not hasattr(diffusers, name):
        raise BadInput(f"diffusers has no {ending.lower() or 'class'} '{name}'.{suggest(str(name), names)}")
    return getattr(diffusers, name)

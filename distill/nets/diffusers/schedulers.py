"""Stock schedulers become Schedules, predictions and Grids."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import diffusers
import torch

from distill.errors import BadInput, suggest
from distill.grid import Grid
from distill.noise import VE, RectifiedFlow, Schedule, Table, TrigFlow

PREDICTIONS = {"epsilon": "eps", "sample": "x", "v_prediction": "v", "flow_prediction": "flow"}  # stock -> ours
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
KARRAS = (*EDM, "CMStochasticIterativeScheduler", "KarrasVeScheduler")
# These step from n to n - N // K, whatever timestep comes next, and end at `final_alpha_cumprod`.
STRIDED = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "PNDMScheduler")


def scheduler_of(scheduler, **config):
    """A fresh stock scheduler from an instance, a class name, or a diffusers folder, with `config` overriding its own.

    Raises:
        BadInput: if diffusers has no such class, the class no such setting, the folder no scheduler, or if the class
            needs more than these settings.
    """
    if not isinstance(scheduler, (str, Path)):
        kind, stock = type(scheduler), scheduler.config
    elif (Path(scheduler) / "model_index.json").is_file():
        kind = stock_class(read_json(Path(scheduler) / "model_index.json").get("scheduler", [None, None])[1], "Scheduler")
        stock = read_json(Path(scheduler) / "scheduler" / "scheduler_config.json")
    else:
        kind, stock = stock_class(str(scheduler), "Scheduler"), {}
    known = inspect.signature(kind.__init__).parameters
    for key in config:
        if key not in known:
            raise BadInput(f"{kind.__name__} has no setting '{key}'.{suggest(key, known)}")
    try:
        return kind.from_config(stock, **config)
    except (TypeError, ImportError) as error:  # arguments without default, optional packages
        raise BadInput(f"{kind.__name__} cannot be made: {str(error).strip()}") from error


def schedule_of(scheduler, **config) -> Schedule:
    r"""The Schedule of a stock scheduler: an instance, a class name or a diffusers folder; `config` overrides its own.

    - `alphas_cumprod` (DDPM, DDIM, PNDM, Euler, DPM-Solver, LCM, ...; zero terminal SNR included) -> Table
    - flow matching, and `use_flow_sigmas` -> RectifiedFlow(shift)
    - EDM and Karras schedulers -> VE(sigma_max, rho)
    - the cosine DPM-Solver of Stable Audio, whose timestep is atan(sigma) 2 / pi -> TrigFlow

    Raises:
        BadInput: for any other class, and for a shift that depends on the image (`use_dynamic_shifting`).
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
    if not hasattr(scheduler, "alphas_cumprod"):
        raise BadInput(
            f"{name} has no noise schedule that we know: it is none of {', '.join(FLOW + KARRAS)}, "
            "and has no alphas_cumprod."
        )
    return Table(tuple(scheduler.alphas_cumprod.tolist()))


def prediction_of(scheduler) -> str:
    """What the scheduler takes the network's output for, in our names: eps, x, v, flow or edm.

    Raises:
        BadInput: if we have no name for it.
    """
    scheduler = scheduler_of(scheduler)
    name, kind = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if name in FLOW:
        return "flow"
    if name in KARRAS:
        if name in EDM and kind == "epsilon":
            return "edm"
        raise BadInput(f"{name} with prediction_type={kind!r} has no counterpart: only EDM with 'epsilon' has.")
    if kind not in PREDICTIONS:
        raise BadInput(f"{name} has prediction_type={kind!r}, none of {', '.join(PREDICTIONS)}.")
    return PREDICTIONS[kind]


def grid_of(scheduler, steps: int, **config) -> Grid:
    r"""The Grid that a stock scheduler serves in `steps` steps: what the student must be trained on.

    Discrete schedulers: t = (n + 1) / N for each of its timesteps n. Flow and Karras schedulers: the time at which the
    schedule has each of its sigmas. `scheduler` and `config` as in `schedule_of`.

    Raises:
        BadInput: if these times do not start at noise or do not end at data, if the scheduler lands elsewhere than it
            asks the network next, or asks it more than once a step at different times.
    """
    scheduler = scheduler_of(scheduler, **config)
    name, schedule = type(scheduler).__name__, schedule_of(scheduler)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise BadInput(f"{name} cannot serve {steps} steps: {error}") from error
    times = _times_of_table(scheduler, steps) if isinstance(schedule, Table) else _times_of_sigmas(scheduler, schedule)
    times = list(dict.fromkeys(times))  # schedulers of second order ask twice at one time
    if len(times) != steps + 1:
        raise BadInput(f"{name} asks the network at {len(times) - 1} times in {steps} steps: take one of first order.")
    return Grid(tuple(times))


def _times_of_sigmas(scheduler, schedule: Schedule) -> list[float]:
    sigma = getattr(scheduler, "sigmas", torch.full((1,), torch.nan)).double()
    if sigma[-1] != 0:
        raise BadInput(f"{type(scheduler).__name__} stops at sigma={sigma[-1]:g} instead of at data (sigma=0).")
    alpha = 1 - sigma if isinstance(schedule, RectifiedFlow) else torch.ones_like(sigma)
    return [round(t, 7) for t in schedule.time(2 * (alpha.log() - sigma.log())).tolist()]  # 7: float32 sigmas


def _times_of_table(scheduler, steps: int) -> list[float]:
    name, stock, total = type(scheduler).__name__, scheduler.config, len(scheduler.alphas_cumprod)
    nodes = scheduler.timesteps.tolist()
    if nodes[0] != total - 1:
        lcm = "original_inference_steps" in stock
        mend = f"original_inference_steps={steps}" if lcm else "timestep_spacing='trailing'"
        raise BadInput(
            f"{name} starts {steps} steps at timestep {nodes[0]:g}, not at noise ({total - 1}): set {mend} "
            f"and take a number of steps that divides {total}."
        )
    if name in STRIDED:
        stride = total // steps
        strays = [(a, b) for a, b in zip(nodes, nodes[1:]) if a - stride != b]
        if strays:
            raise BadInput(
                f"{name} steps from timestep {strays[0][0]} to {strays[0][0] - stride} but asks the network at "
                f"{strays[0][1]} next: take a number of steps that divides {total} (not {steps}) with trailing spacing."
            )
        if float(scheduler.final_alpha_cumprod) != 1:
            raise BadInput(f"{name} stops at timestep 0 instead of at data: set set_alpha_to_one=True.")
    if stock.get("final_sigmas_type", "zero") != "zero":
        raise BadInput(f"{name} stops at its smallest sigma instead of at data: set final_sigmas_type='zero'.")
    return [*((n + 1) / total for n in nodes), 0.0]


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read as JSON: {error}") from error


def stock_class(name: str | None, ending: str = ""):
    """The class of diffusers with this name."""
    names = [n for n in dir(diffusers) if n.endswith(ending or "Model")]
    if not name or not name.endswith(ending) or not hasattr(diffusers, name):
        raise BadInput(f"diffusers has no {ending.lower() or 'class'} '{name}'.{suggest(str(name), names)}")
    return getattr(diffusers, name)

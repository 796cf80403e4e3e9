"""Solvers: pure maps (x_t, t, s) -> x_s between any two times, and the sampling loop `solve`.

Examples:
    >>> import torch
    >>> from distill.denoise import Gaussian
    >>> from distill.noise import RectifiedFlow
    >>> from distill.solvers import solve, solver
    >>> from distill.times import Grid
    >>> exact = Gaussian([3.0], 0.1, schedule=RectifiedFlow())  # x ~ N(3, 0.1^2)
    >>> solve(exact, torch.zeros(2, 1), Grid.uniform(2), solver("ddim")).flatten().tolist()  # noise 0 lands on the mean
    [3.0, 3.0]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from distill.errors import BadInput, suggest
from distill.solvers.base import Solver, ddim
from distill.solvers.multistep import DPMSolverPP2M
from distill.solvers.onestep import DDIM, DPMSolverPP, Euler, Heun
from distill.solvers.overshoot import Overshoot
from distill.solvers.solve import RowNoise, solve
from distill.solvers.stochastic import Ancestral, Renoise

SOLVERS: dict[str, Callable[[], Solver]] = {
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "dpmpp_2s": partial(DPMSolverPP, order=2),
    "dpmpp_2m": DPMSolverPP2M,
    "ancestral": Ancestral,
    "renoise": Renoise,
    "overshoot": Overshoot,
}


def solver(name: str | Solver) -> Solver:
    """The solver of this name in `SOLVERS`; a Solver is returned unchanged.

    Raises:
        BadInput: for an unknown name.
    """
    if isinstance(name, Solver):
        return name
    if name not in SOLVERS:
        raise BadInput(f"solver '{name}' must be one of {', '.join(SOLVERS)}.{suggest(name, SOLVERS)}")
    return SOLVERS[name]()


__all__ = [
    "DDIM",
    "DPMSolverPP",
    "DPMSolverPP2M",
    "Ancestral",
    "Euler",
    "Heun",
    "Overshoot",
    "Renoise",
    "RowNoise",
    "SOLVERS",
    "Solver",
    "ddim",
    "solve",
    "solver",
]

r"""Knowledge distillation on a teacher's stored pairs or paths (Luhman and Luhman, 2021), https://arxiv.org/abs/2101.02388.

The student learns the guided teacher's ODE trajectory at the times of its grid 1 = t_K > ... > t_0 = 0:

    x_{t_K} = z,  x_{t_{k-1}} = ODE(D_w; x_{t_k}, t_k -> t_{k-1})           stored, or solved for here
    L = 1/K sum_k |ddim(G; x_{t_k}, t_k -> t_{k-1}) - x_{t_{k-1}}|^2

K = 1 is the paper's |G(z, 1) - x|^2 on pairs. Every step starts from the stored path, so errors do not accumulate in
training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.denoise import Guided
from distill.errors import BadInput
from distill.losses.regression import mse
from distill.methods.base import Method
from distill.noise import at_least_float32
from distill.solvers import DDIM, solve
from distill.solvers import solver as solver_of


class Knowledge(Method):
    """Trains on paths, from batches with `path` (or pairs, `x` and `z`, for K = 1), else solved during training.

    Args:
        solver, solver_steps: the teacher's ODE solver and its steps per segment of the grid.
        base: arguments of Method.

    Raises:
        BadInput: in the first step, stored paths whose times are not those of the grid.
    """

    needs_data = False

    def __init__(self, roles: dict[str, Any], *, solver: str = "heun", solver_steps: int = 4, **base):
        super().__init__(roles, **base)
        self.solver, self.guided = solver_of(solver), Guided(self.teacher, self.guidance)
        ends, n = self.grid.times, solver_steps
        self.times = (*(t + (s - t) * i / n for t, s in zip(ends, ends[1:]) for i in range(n)), 0.0)
        self.every = n

    def turns(self, step):
        yield "student", self.loss

    def draw(self, x, z, cond):
        plain = {k: v for k, v in cond.items() if k not in ("path", "times")}
        if not self.paired:
            return self.path(z, plain), plain
        path, times = cond.get("path", torch.stack([x, z], 1)), cond.get("times")
        stored = (0.0, 1.0) if times is None else tuple(times[0].tolist())
        if len(stored) != len(self.grid.times) or max(abs(a - b) for a, b in zip(stored[::-1], self.grid.times)) > 1e-6:
            raise BadInput(
                f"data holds paths at the times {list(stored[::-1])}, the student's grid is {list(self.grid.times)}: "
                "set method.grid to them, or solve new ones by `distill data pairs`."
            )
        return path, plain

    @property
    def path_times(self) -> tuple[float, ...]:
        """0 = t_0 < ... < t_K = 1, where a path is stored."""
        return self.grid.times[::-1]

    @torch.no_grad()
    def path(self, z: Tensor, cond: dict[str, Any]) -> Tensor:
        """The teacher's path from noise z (B, ...) at the grid's times: (B, K + 1, ...), x first and z last."""
        x_1 = self.teacher.schedule.start(z)
        states = solve(self.guided, x_1, self.times, self.solver, trajectory=True, **cond)[:: self.every]
        return torch.cat([states[1:].flip(0), z[None].to(states)]).transpose(0, 1)

    def loss(self, path, cond):
        schedule, K, n = self.student.schedule, self.grid.steps, len(path)
        states = path.transpose(0, 1)
        x_t, x_s = torch.cat([*states[1:-1], schedule.start(states[-1])]), states[:-1].flatten(0, 1)
        times = self.grid.tensor(path.device, at_least_float32(path).dtype).flip(0).repeat_interleave(n)
        every: dict[str, Any] = {k: torch.cat([v] * K) for k, v in self.student_conditions(cond, n).items()}
        return mse(DDIM()(self.student, x_t, times[n:], times[:-n], **every), x_s)

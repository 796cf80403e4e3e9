"""Evaluation of teacher, ODE solvers on the teacher and student on the same noise: samples, metrics and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.denoise import Denoiser
from distill.metrics import table, training_free
from distill.metrics.shares import ALONE, SampleShares
from distill.metrics.suite import Suite
from distill.solvers import DDIM, solve
from distill.times import Grid

Conditions = dict[str, Tensor]
Sampler = Callable[[Tensor, Conditions], Tensor]  # (z, cond) -> x
PLAIN = "ddim/uniform"  # the solver and grid of the teacher's own row
FEW = 16  # the most evaluations at which every ODE solver of distill is tried by default
REPEATS = 3  # of a timing, of which the least counts: other work on a machine only ever adds
WARM = 2  # samples of the first call, which is not timed


class Student(Protocol):
    """Few-step samples: `Method.sample`."""

    def __call__(self, z: Tensor, cond: Conditions, *, generator: torch.Generator, grid: int | Grid) -> Tensor: ...


def draw_samples(sampler: Sampler, z: Tensor, cond: Conditions, model: nn.Module, batch: int = 1000) -> Tensor:
    """Samples x (n, ...) on the CPU of noise z (n, ...), without gradient, `batch` rows per call on the model's device."""
    with torch.no_grad():
        return torch.cat([sampler(*rows).cpu() for rows in _batches(z, cond, model, batch)])


def time_samples(
    sampler: Sampler, z: Tensor, cond: Conditions, model: nn.Module, batch: int = 1000
) -> tuple[Tensor, float]:
    """Samples as by `draw_samples`, and seconds per 1,000 samples: the minimum over three or more whole batches.

    Wall-clock seconds on an accelerator; on a CPU the smaller of wall-clock and processor time, so that other work on
    the machine counts less. A first call with two samples is not timed.
    """
    rows, samples, seconds = list(_batches(z, cond, model, batch)), [], []
    with torch.no_grad():
        sampler(rows[0][0][:WARM], {k: v[:WARM] for k, v in rows[0][1].items()})
        for part in rows:
            x, spent = _timed(sampler, part)
            samples.append(x.cpu())
            if len(x) == len(samples[0]):
                seconds.append(spent)
        while len(seconds) < REPEATS:
            seconds.append(_timed(sampler, rows[0])[1])
    return torch.cat(samples), 1000 * min(seconds) / len(samples[0])


def _batches(z: Tensor, cond: Conditions, model: nn.Module, size: int) -> Iterator[tuple[Tensor, Conditions]]:
    device = next(model.parameters()).device
    for i in range(0, len(z), size):
        yield z[i : i + size].to(device), {k: v[i : i + size].to(device) for k, v in cond.items()}


def _timed(sampler: Sampler, rows: tuple[Tensor, Conditions]) -> tuple[Tensor, float]:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    clock, processor = time.perf_counter(), time.process_time()
    x = sampler(*rows)
    synchronize()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    return x, clock if torch.cuda.is_available() else min(clock, processor)


def ddim_sampler(denoiser: Denoiser, grid: int | Grid) -> Sampler:
    """DDIM from t = 1 to t = 0 over `grid`, or in that many equal steps."""
    times = (Grid.uniform(grid) if isinstance(grid, int) else grid).times
    return lambda z, cond: solve(denoiser, denoiser.schedule.start(z), times, DDIM(), **cond)


def panel_samples(x: Tensor, images: int = 100) -> Tensor:
    """The samples that a picture shows."""
    return x[:images] if x.ndim == 4 else x


class Evaluation:
    """Draws, times and scores models on one set of noises and conditions.

    Args:
        suite: the metrics.
        z, cond: noises (n, ...) and conditions of n rows. With `ranks`, those of all ranks: each takes its share.
        model: module on whose device samples are drawn.
        teacher: denoiser, or None.
        student: `(z, cond, generator=, grid=) -> x`, or None to measure only a teacher.
        grid: the student's grid.
        batch: samples per call.
        seed: of the noise of a stochastic student.
        progress: called with what is about to be measured, many times a run.
    """

    def __init__(
        self,
        suite: Suite,
        z: Tensor,
        cond: Conditions,
        model: nn.Module,
        *,
        teacher: Denoiser | None = None,
        student: Student | None = None,
        grid: Grid,
        batch: int = 1000,
        seed: int = 0,
        ranks: SampleShares = ALONE,
        progress: Callable[[str], None] = lambda text: None,
    ):
        self.progress = progress
        self.suite, self.model, self.teacher, self.student, self.grid = suite, model, teacher, student, grid
        self.batch, self.seed, self.ranks, rows = batch, seed, ranks, ranks.share(len(z))
        self.z, self.cond = z[rows], {k: v[rows] for k, v in cond.items()}

    @cached_property
    def price(self) -> float:
        """Network evaluations of one call of the teacher: 1, or 2 with guidance."""
        return training_free.price(self.teacher, self.z, self.cond)

    def teacher_sampler(self, nfe: int) -> Sampler | None:
        """The teacher by DDIM in equal steps that cost `nfe` evaluations; None where one step costs more."""
        steps = int(nfe // self.price) if self.teacher is not None else 0
        return ddim_sampler(self.teacher, steps) if steps else None

    def student_sampler(self, nfe: int) -> Sampler:
        """The student on its own grid, or on another number of equal steps; every call draws the same noise."""
        device = next(self.model.parameters()).device
        generator = torch.Generator(device).manual_seed(self.seed + 1_000_003 * self.ranks.rank)
        grid = self.grid if nfe == self.grid.steps else nfe
        return lambda z, cond: self.student(z, cond, generator=generator, grid=grid)

    def draw(self, sampler: Sampler) -> Tensor:
        """Samples of all noises."""
        return draw_samples(sampler, self.z, self.cond, self.model, self.batch)

    def time(self, sampler: Sampler) -> tuple[Tensor, float]:
        """Samples of all noises, and seconds a thousand of them."""
        return time_samples(sampler, self.z, self.cond, self.model, self.batch)

    def score(self, x: Tensor, quick: bool = False) -> dict[str, float]:
        """Metric -> value of samples of all noises."""
        return self.suite.score(x, self.cond, quick=quick, ranks=self.ranks)

    def run(
        self, evaluations: Sequence[int], every_solver: Sequence[int] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The nested metrics of `distill.metrics.table`, with `reference_vs_holdout`, and samples by title for a picture.

        Args:
            evaluations: NFEs of teacher and student; the student's own is measured too.
            every_solver: NFEs at which every ODE solver of distill is tried on the teacher; all up to 16 by default.
        """
        nfes = sorted({*evaluations, self.grid.steps})
        tried = [n for n in nfes if n <= FEW] if every_solver is None else every_solver
        teacher, free, student, panels = {}, {}, {}, {}
        for nfe in nfes if self.teacher is not None else ():
            self.progress(f"teacher, {nfe} evaluations")
            samples = self._solver_samples(nfe, nfe in tried)
            if PLAIN not in samples:
                continue  # a guided teacher costs two evaluations
            scores = {}
            for name, x in samples.items():
                self.progress(f"teacher, {nfe} evaluations, {name}")
                scores[name] = self.score(x, quick=name != PLAIN)
            teacher[nfe] = scores[PLAIN]
            if nfe in tried:
                shared = set.intersection(*map(set, scores.values()))  # a best of all solvers needs the scores of all
                free[nfe] = {name: {k: v for k, v in row.items() if k in shared} for name, row in scores.items()}
            if nfe in (self.grid.steps, nfes[-1]):
                panels[f"teacher, {nfe} evaluations"] = panel_samples(samples[PLAIN])
        for nfe in nfes if self.student is not None else ():
            self.progress(f"student, {nfe} evaluations")
            x = self.draw(self.student_sampler(nfe))
            student[nfe] = self.score(x)
            if nfe == self.grid.steps:
                panels[f"student, {nfe} evaluations"] = panel_samples(x)
        distances = self.suite.reference_vs_holdout(self.ranks)
        return table.build(teacher, free, student) | {"reference_vs_holdout": distances}, panels

    def _solver_samples(self, nfe: int, every_solver: bool) -> dict[str, Tensor]:
        """Samples of the teacher by "solver/grid" at `nfe` evaluations, on the CPU."""
        choice = {} if every_solver else {"solvers": ("ddim",), "grids": ("uniform",)}
        samples = training_free.baseline(self.teacher, self.z, self.cond, (nfe,), batch=self.batch, **choice)
        return {name: x.cpu() for name, x in samples[nfe].items()}

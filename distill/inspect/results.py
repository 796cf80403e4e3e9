"""Results of a run: samples, measurements, exports."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import config
from distill.config import DictConfig
from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.files import read_json
from distill.inspect import drawing
from distill.inspect.measure import measure
from distill.metrics import table
from distill.metrics.evaluate import draw_samples
from distill.training import launch, load, loggers, run, run_folder
from distill.training.experiment import Experiment
from distill.training.run_folder import METRICS


class Run:
    """A run folder: its config, its averaged student, and methods to sample, measure and export.

    Args:
        folder: what `distill train` wrote.
        allow: packages besides installed plugins whose objects its config may name.

    Raises:
        BadInput: the folder is not a run.

    Examples:
        >>> import distill
        >>> run = distill.open_run("runs/toy-tdm")
        >>> run.cfg.method.grid, run.step
        (2, 5)
        >>> run.sample(4, seed=1).shape
        torch.Size([4, 2])
        >>> isinstance(run.student, distill.Denoiser)
        True
    """

    def __init__(self, folder: str | Path, allow: tuple[str, ...] = ()):
        self.folder, self.allow = Path(folder), tuple(allow)
        self.cfg: DictConfig = run_folder.read_config(self.folder)
        self._sampling: tuple[tuple[str, str], Experiment] | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @cached_property
    def experiment(self) -> Experiment:
        """The config's objects with the weights of the newest checkpoint, loaded at first use; for reading only."""
        return load.load_experiment(self.folder, self.allow)

    @property
    def student(self) -> Denoiser:
        """The averaged student, which samples and is exported."""
        return self.experiment.method.ema

    @property
    def step(self) -> int:
        """Training steps done."""
        return self.experiment.method.step

    @property
    def metrics(self) -> dict[str, Any] | None:
        """metrics.json as `evaluate` wrote it last; None before that."""
        file = self.folder / METRICS
        if not file.exists():
            return None
        return read_json(file, f"write it again by `distill eval {self.folder}`, or remove it")

    def sample(
        self,
        n: int | None = None,
        seed: int = 0,
        *,
        prompts: Sequence[str] = (),
        labels: Sequence[int] = (),
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | None = None,
    ) -> Tensor:
        """Draw samples (n, ...) on the CPU of the student in its own number of steps, from noise of this seed.

        Args:
            n, seed, prompts, labels, device, dtype, batch_size: as for `distill.sample`.

        Raises:
            BadInput: prompts or labels that the student does not take, or a device that is not there.
        """
        request = drawing.SampleRequest(n, seed, prompts, labels, batch_size)
        experiment, device = self._placed(device, dtype)
        return torch.cat([x.cpu() for x in drawing.draw(experiment, request, device, dtype)])

    def _placed(self, device: str | None, dtype: str) -> tuple[Experiment, str]:
        """The experiment with the student alone on a device in a dtype, kept for the next call; and that device."""
        device = drawing.choose_device(device)
        if (device, dtype) == ("cpu", "float32"):
            return self.experiment, device
        if self._sampling is None or self._sampling[0] != (device, dtype):
            self._sampling = None  # free the memory of the last one first
            experiment = load.load_experiment(self.folder, self.allow, alone=True)
            drawing.move_student(experiment, device, dtype)
            self._sampling = (device, dtype), experiment
        return self._sampling[1], device

    def evaluate(self, samples: int | None = None) -> dict[str, Any]:
        """Measure teacher, ODE solvers on the teacher and student; see `distill.evaluate`."""
        return evaluate(self.folder, samples, self.allow)

    def export(
        self,
        out: str | Path,
        kind: str = "pipeline",
        licence: str | None = None,
        *,
        dtype: str = "float32",
        device: str | None = None,
    ) -> Path:
        """Write the student for others; see `distill.export_run`."""
        return export_run(self.folder, out, self.allow, kind, licence, dtype=dtype, device=device)


def open_run(folder: str | Path, allow: tuple[str, ...] = ()) -> Run:
    """Open a run folder.

    Args:
        folder: what `distill train` wrote.
        allow: packages besides installed plugins whose objects its config may name.

    Raises:
        BadInput: the folder is not a run, or names objects of a package that is not allowed.

    Examples:
        >>> distill.open_run("runs/toy-tdm").sample(8, seed=0).shape
        torch.Size([8, 2])
    """
    return Run(folder, allow)


def train(
    recipe: str | Path,
    *overrides: str,
    runs: str | Path = "runs",
    resume: bool = False,
    allow: tuple[str, ...] = (),
) -> Run:
    """Train a recipe in this process and open its run, as `distill train` does without its checks.

    Args:
        recipe: a YAML file, or the name of a shipped recipe.
        overrides: as on the command line, `"train.steps=400"`.
        runs: parent of the run folder, which has the config's `name`.
        resume: continue the run of that name.
        allow: packages besides installed plugins whose objects the config may name.

    Raises:
        BadInput: a wrong config, or a run of that name where `resume` is not given.

    Examples:
        >>> run = distill.train("toy/teacher", "train.steps=3", "name=short", "log.wandb=disabled")
        runs/short: training for 3 steps.
        validation at step 0: ...
        >>> run.folder.name, run.step
        ('short', 3)
    """
    cfg = config.load([recipe], list(overrides))
    folder = Path(runs) / cfg.name
    run.train(cfg, folder, resume, allow)
    return Run(folder, allow)


def sample(
    folder: str | Path,
    out: str | Path,
    n: int | None = None,
    seed: int = 0,
    allow: tuple[str, ...] = (),
    *,
    prompts: Sequence[str] = (),
    labels: Sequence[int] = (),
    device: str | None = None,
    dtype: str = "float32",
    batch_size: int | None = None,
) -> Path:
    """Write samples of a run's student: single images into a folder, or one picture of all.

    Args:
        folder: a run folder.
        out: a folder to make, or a .png file; it must not exist. The folder's files are named by index, seed and label.
        n: how many; by default one per prompt, or 100.
        seed: of their noise.
        allow: as for `open_run`.
        prompts: of a student conditioned on text, repeated in turn; by default the conditions of the data's first rows.
        labels: of a class-conditional student, repeated in turn; by default all classes in turn.
        device: "cpu", "cuda" or "cuda:1"; by default an accelerator if there is one.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        batch_size: samples of one call; by default `data.batch_size` for text-conditioned students, else 1000.

    Raises:
        BadInput: no run, an `out` that exists or cannot be written, prompts or labels that the student does not take, a
            device that is not there, or a folder for samples that are no images.

    Examples:
        >>> distill.sample("runs/toy-tdm", "points.png", n=50).name
        'points.png'
    """
    out = Path(out)
    request = drawing.SampleRequest(n, seed, prompts, labels, batch_size)
    if out.exists():
        raise BadInput(f"{out} exists; name another so nothing is overwritten.")
    if out.suffix not in ("", ".png"):
        raise BadInput(f"{out} must end in .png (one picture) or have no suffix (a folder).")
    if not out.parent.is_dir():
        raise BadInput(f"{out.parent} is not a folder; make it, or write the samples elsewhere.")
    experiment, device = Run(folder, allow)._placed(device, dtype)
    write = drawing.write_picture if out.suffix else drawing.write_folder
    return write(experiment, request, out, device, dtype)


def evaluate(folder: str | Path, samples: int | None = None, allow: tuple[str, ...] = ()) -> dict[str, Any]:
    """Measure teacher, ODE solvers on the teacher and student at each number of evaluations, from the same noise.

    Writes metrics.json and samples.png into the run folder. Under torchrun or srun the ranks share the samples.

    Args:
        folder: a run folder.
        samples: how many a row; `eval.samples` of the config by default.
        allow: as for `open_run`.

    Returns:
        What metrics.json holds: {"teacher": {"1": {"fd": ...}, ...}, "training_free": ..., "student": ...}.

    Examples:
        >>> list(distill.evaluate("runs/toy-tdm", samples=200)["student"]["2"])[:1]
        ['energy']
    """
    folder = Path(folder)
    if launch.launched_externally():
        launch.join_processes(run_folder.read_config(folder).engine)
    experiment = load.load_experiment(folder, allow)
    experiment.method.to("cuda" if torch.cuda.is_available() else "cpu")
    result, panels = measure(experiment, samples, folder=folder)
    if run_folder.is_rank_zero():
        table.write(result, folder / METRICS)
        experiment.suite(folder).picture(panels, folder / "samples.png")
    return result


def export_run(
    folder: str | Path,
    out: str | Path,
    allow: tuple[str, ...] = (),
    kind: str = "pipeline",
    licence: str | None = None,
    *,
    dtype: str = "float32",
    device: str | None = None,
) -> Path:
    """Write a run's averaged student for others, holding no more than one network in memory.

    With `log.artifacts` the export is uploaded to wandb too.

    Args:
        folder: a run folder.
        out: the folder to make; it must not exist.
        allow: as for `open_run`.
        kind: "pipeline", "lora", "single-file" or "onnx".
        licence: of the weights, as the hub names it; that of the teacher by default.
        dtype: of the weights that are written, "float32", "bfloat16" or "float16".
        device: that draws the reference samples; by default an accelerator if there is one.

    Raises:
        BadInput: `out` exists, or no stock class loads this student in this form.

    Examples:
        >>> out = distill.export_run("runs/toy-tdm", "student", kind="onnx")
        >>> (out / "student.onnx").exists(), (out / "distill.json").exists()
        (True, True)
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise BadInput(f"{out} exists; name another folder so nothing is overwritten.")
    opened = Run(folder, allow)
    device, metrics = drawing.choose_device(device), opened.metrics
    write_export(load.load_experiment(folder, allow, alone=True), out, metrics, kind, licence, dtype, device)
    loggers.log_export(folder, opened.cfg.log, opened.cfg.name, out)
    return out


def write_export(
    experiment: Experiment,
    out: Path,
    metrics: dict[str, Any] | None,
    kind: str = "pipeline",
    licence: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> Path:
    """Write the averaged student of `experiment` to `out`, with samples on its card where they are images."""
    from distill.export import export

    method, x = experiment.method.to(device), None
    if len(method.shape) == 3 and method.shape[0] in drawing.PIXEL_CHANNELS:
        x = draw_samples(method.sample, *experiment.noise(64, experiment.cfg.eval.seed), method.student)
    return export(
        method.ema,
        method.grid,
        method.serving,
        out,
        kind=kind,
        samples=x,
        method=type(method).__name__,
        recipe=config.to_yaml(experiment.cfg),
        metrics=metrics,
        w=method.guidance,
        licence=licence,
        dtype=dtype,
        device=device,
    )

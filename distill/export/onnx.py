r"""One step of the student as an ONNX graph: (x_t, t, s, conditions[, noise]) -> x = E[x | x_t] and x_s.

Time is ours, float in [0, 1]; schedule, prediction, w and t - s are inside, so that a caller loops over the times of
distill.json and knows no convention. The batch may have any size; the latents have the size of training.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.export import folder, text
from distill.export.job import SEED, Job
from distill.solvers import Renoise

FILE, OPSET = "student.onnx", 18


class Step(nn.Module):
    """One step of a student, by names: its inputs in order, tensors out."""

    def __init__(self, student: Denoiser, sampler: str, names: list[str]):
        super().__init__()
        self.student, self.solver, self.names = student, folder.SAMPLERS[sampler], names

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        told = dict(zip(self.names, given))
        x_t, t, s, noise = (told.pop(name, None) for name in ("x_t", "t", "s", "noise"))
        x = self.student(x_t, t, **told)
        if isinstance(self.solver, Renoise):
            return x, self.solver.step(self.student.schedule, x, s, noise)
        return x, self.solver.step(self.student.schedule, x, x_t, t, s)


@torch.no_grad()
def write(job: Job) -> dict:
    """The graph, the noise, conditions and samples of the trainer's own sampler; the record of distill.json.

    Raises:
        BadInput: if onnx is not installed, or the network does something that ONNX has not.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BadInput("ONNX needs packages: pip install 'distill[onnx]'.") from error
    from safetensors.torch import save_file

    net, grid = job.student.net, job.grid
    told = _conditions(job)
    student = told_as(job)
    generator = torch.Generator().manual_seed(SEED)
    rows = len(next(iter(told.values()))) if told else folder.REFERENCES
    draw = lambda: torch.randn(rows, *net.shape, generator=generator)
    noise = draw()
    fresh = [draw() for _ in range(grid.steps)] if job.sampler == "renoise" else []
    step = Step(student, job.sampler, ["x_t", "t", "s", *told, *(["noise"] if fresh else [])]).eval()
    given = [noise, torch.full((rows,), 0.6), torch.full((rows,), 0.3), *told.values(), *([fresh[0]] if fresh else [])]
    _trace(step, given, job.staging / FILE)
    x = noise
    for k, (t, s) in enumerate(zip(grid.times, grid.times[1:])):
        t, s = (torch.full((rows,), time) for time in (t, s))
        x = step(x, t, s, *told.values(), *([fresh[k]] if fresh else []))[1]
    stored = {"noise": noise, "samples": x} | told | ({"fresh": torch.stack(fresh)} if fresh else {})
    save_file({k: v.contiguous() for k, v in stored.items()}, job.staging / "reference.safetensors")
    record = {
        "part": getattr(net, "part", None), "network": type(net).__name__, "file": FILE, "told": list(told),
        "shape": list(net.shape),
        "steps": grid.steps, "times": list(grid.times), "sampler": job.sampler, "prediction": job.student.prediction,
        "guidance": job.w, "classes": getattr(net, "classes", 0), "null_class": getattr(net, "null_class", False),
        "timesteps": [], "reference": {"seed": SEED},
    }
    return record | (text.pictures(text.source(net), x) if text.told(job.student) else {})


def told_as(job: Job) -> Denoiser:
    """The student without inputs w and t - s: of a stock network they are folded in."""
    net, student = job.student.net, job.student
    if getattr(net, "flow_map", False):
        student = folder.FlowMap(student, folder.gap_of(job.grid, job.sampler))
    return _Guided(student, job.w) if getattr(net, "guided", False) else student


class _Guided(Denoiser):
    """A student that is always told the same w."""

    def __init__(self, student: Denoiser, w: float | None):
        super().__init__(None, student.schedule, "x")
        if w is None:
            raise BadInput("The network needs a fixed w: give it to be folded in.")
        self.student, self.w = student, float(w)

    def native(self, x_t: Tensor, t: Tensor, **cond) -> Tensor:
        return self.student(x_t, t, w=torch.full_like(t, self.w), **cond)


def _conditions(job: Job) -> dict[str, Tensor]:
    """Those of the reference samples: prompts by the teacher's own encoders, or labels."""
    net = job.student.net
    if text.told(job.student):
        return text.Prompts(text.source(net))(text.PROMPTS)
    return {"label": torch.arange(folder.REFERENCES) % net.classes} if getattr(net, "classes", 0) else {}


def _trace(step: Step, given: list[Tensor], file: Path) -> None:
    """torch.onnx's exporter, its own chatter kept away."""
    level = logging.getLogger("torch.onnx").level
    try:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        batch = torch.export.Dim("batch", min=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(step, tuple(given), str(file), input_names=step.names, output_names=["x", "x_s"],
                              opset_version=OPSET, dynamo=True, verbose=False,
                              dynamic_shapes=((dict.fromkeys([0], batch),) * len(given),))
    except Exception as error:  # the exporter's, torch.export's and onnxscript's own
        raise BadInput(f"{type(step.student.net).__name__} does not become ONNX: {str(error).strip().splitlines()[0]}") from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)

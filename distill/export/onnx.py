r"""One step of the student as an ONNX graph: (x_t, t, s, conditions[, noise]) -> x = E[x | x_t] and x_s.

Time is a float in [0, 1]; schedule, prediction type, w and t - s are inside the graph, so a caller only loops over the
times of distill.json. The batch may have any size where the network's masks allow it (`batch` in distill.json is null,
else 1); the latents have the size of training.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.denoise import Denoiser, as_network, network_of
from distill.errors import BadInput
from distill.export import folder, text
from distill.export.request import SEED, ExportRequest
from distill.solvers import Renoise

FILE, OPSET = "student.onnx", 18


class Step(nn.Module):
    """One step of a student as a module whose positional inputs have the names `names`."""

    def __init__(self, student: Denoiser, sampler: str, names: list[str]):
        super().__init__()
        self.student, self.solver, self.names = student, folder.SAMPLERS[sampler], names

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        conditions = dict(zip(self.names, given))
        x_t, t, s, noise = (conditions.pop(name, None) for name in ("x_t", "t", "s", "noise"))
        x = self.student(x_t, t, **conditions)
        if isinstance(self.solver, Renoise):
            return x, self.solver.step(self.student.schedule, x, s, noise)
        return x, self.solver.step(self.student.schedule, x, x_t, t, s)


@torch.no_grad()
def write(request: ExportRequest) -> dict:
    """Write the graph and the reference noise, conditions and samples; return the record for distill.json.

    Raises:
        BadInput: onnx is not installed, or the network has an operation that ONNX or onnxruntime lacks.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BadInput("Export as onnx needs further packages: pip install 'distill-diffusion[onnx]'.") from error
    from safetensors.torch import save_file

    net, grid = request.student.net, request.grid
    conditions = _conditions(request)
    generator = torch.Generator().manual_seed(SEED)
    rows = len(next(iter(conditions.values()))) if conditions else folder.REFERENCES
    draw = lambda: torch.randn(rows, *net.shape, generator=generator)
    noise = draw()
    fresh = [draw() for _ in range(grid.steps)] if request.sampler == "renoise" else []
    names = ["x_t", "t", "s", *conditions, *(["noise"] if fresh else [])]
    graph = Step(_student_with(request, _folded(request)), request.sampler, names).eval()
    given = [
        noise,
        torch.full((rows,), 0.6),
        torch.full((rows,), 0.3),
        *conditions.values(),
        *([fresh[0]] if fresh else []),
    ]
    # Sampled before the graph is traced: what a schedule keeps for the next time must not be a tracer's.
    x = folder.reference_samples(request, noise, iter(fresh).__next__, conditions, _student_with(request, net))
    batch = _trace(graph, given, request.staging / FILE)
    try:
        onnxruntime.InferenceSession(request.staging / FILE)
    except Exception as error:  # onnxruntime's own classes
        raise BadInput(f"{net._get_name()} becomes a graph that onnxruntime does not load: {error}") from error
    stored = {"noise": noise, "samples": x} | conditions | ({"fresh": torch.stack(fresh)} if fresh else {})
    save_file({k: v.contiguous() for k, v in stored.items()}, request.staging / "reference.safetensors")
    pictures = text.pictures(text.source(net), x) if text.takes_text(request.student) else {}
    return _record(request, list(conditions), batch) | pictures


def _record(request: ExportRequest, conditions: list[str], batch: int | None) -> dict:
    """The conventions of the graph, for distill.json."""
    net, grid, about = request.student.net, request.grid, network_of(request.student)
    return {
        "part": about.part or None,
        "network": net._get_name(),
        "file": FILE,
        "conditions": conditions,
        "shape": list(net.shape),
        "batch": batch,
        "steps": grid.steps,
        "times": list(grid.times),
        "sampler": request.sampler,
        "prediction": request.student.prediction,
        "guidance": request.w,
        "classes": about.classes,
        "null_class": about.classes > 0 and about.null_class,
        "timesteps": [],
        "reference": {"seed": SEED},
    }


def _folded(request: ExportRequest) -> nn.Module:
    """A stock network with w and t - s folded into its biases: hooks of a single call cannot be traced."""
    from distill.models.diffusers import StockNetwork

    net = request.student.net
    if not isinstance(net, StockNetwork) or not (net.guided or net.flow_map):
        return net
    gap = folder.gap_of(request.grid, request.sampler) if net.flow_map else None
    plain = copy.deepcopy(net)
    setattr(plain, net.part, net.fold(w=request.w if net.guided else None, gap=gap))
    plain.guided = plain.flow_map = False
    plain.guidance = plain.gap = None
    return plain


def _student_with(request: ExportRequest, net: nn.Module) -> Denoiser:
    """The student with this network, and a fixed w and t - s where it has these inputs."""
    student: Denoiser = copy.copy(request.student)
    student._modules = request.student._modules | {"net": net}
    if as_network(net).flow_map:
        student = folder.FixedGap(student, folder.gap_of(request.grid, request.sampler))
    return _Guided(student, request.w) if as_network(net).guided else student


class _Guided(Denoiser):
    """A student evaluated with one fixed w."""

    def __init__(self, student: Denoiser, w: float | None):
        super().__init__(None, student.schedule, "x")
        if w is None:
            raise BadInput("The network takes w as an input: pass the w that the export is to have.")
        self.student, self.w = student, float(w)

    def native(self, x_t: Tensor, t: Tensor, **cond) -> Tensor:
        return self.student(x_t, t, w=torch.full_like(t, self.w), **cond)


def _conditions(request: ExportRequest) -> dict[str, Tensor]:
    """Those of the reference samples: prompts by the teacher's own encoders, or labels."""
    net = request.student.net
    if text.takes_text(request.student):
        return text.Prompts(text.source(net))(text.PROMPTS)
    return {"label": torch.arange(folder.REFERENCES) % net.classes} if network_of(request.student).classes else {}


def _trace(step: Step, given: list[Tensor], file: Path) -> int | None:
    """Run torch.onnx's exporter with its logs off. None for a free batch size, 1 where the network fixes it.

    Raises:
        BadInput: the network does not become ONNX.
    """
    import onnx

    level, auto = logging.getLogger("torch.onnx").level, {0: torch.export.Dim.AUTO}
    logging.getLogger("torch.onnx").setLevel(logging.CRITICAL)
    reason = None
    try:
        for shapes, rows in ((((auto,) * len(given),), len(given[0])), (None, 1)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    torch.onnx.export(
                        step,
                        tuple(v[:rows] for v in given),
                        str(file),
                        input_names=step.names,
                        output_names=["x", "x_s"],
                        opset_version=OPSET,
                        dynamo=True,
                        verbose=False,
                        dynamic_shapes=shapes,
                        optimize=False,
                    )  # else x + 1e-15 becomes x
                except Exception as error:  # the exporter's, torch.export's and onnxscript's own
                    reason = reason or error
                    continue
            if rows == 1:
                return 1
            graph = onnx.load(file, load_external_data=False).graph
            if all(value.type.tensor_type.shape.dim[0].dim_param for value in graph.input):
                return None  # else the tracer took the number of rows for a constant
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    errors = [line for line in str(reason).splitlines() if "Error" in line] or [type(reason).__name__]
    raise BadInput(f"{step.student.net._get_name()} does not become ONNX: {errors[-1]}") from reason

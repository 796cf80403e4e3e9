"""What a page needs beyond metrics.json: stock solvers on the teacher, seconds, the teacher's lines, pictures."""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distill import run
from distill.engine import home
from distill.engine.callbacks import console
from distill.eval import baselines, table
from distill.grid import Grid
from distill.report.gather import MEASURED, json_of
from distill.session import Session
from distill.solvers import DDIM, solve

FEW = 16  # the most evaluations at which stock solvers are tried
ACROSS = 12  # noises of the pictures, where the classes do not give their number
POINTS = 1000  # samples of a scatter plot
FEW_TIMED = 256  # samples of a quick look at the seconds


def measure(folder: Path, session: Session, evaluations: Sequence[int] | None = None, samples: int | None = None,
            stock: bool = True) -> dict[str, Any]:  # fmt: skip
    """Measure what report.json of this checkpoint does not hold yet, and keep it there.

    Args:
        evaluations: of the stock solvers; those of `eval.evaluations` up to 16, and K, by default.
        samples: of each stock solver; `eval.samples` by default. Seconds are those of the validation's samples.
        stock: False measures no stock solver and scores nothing, which is most of the work: pictures and seconds only.

    Returns:
        key: what was asked; points: `[{who, kind, nfe, seconds, scores}]`, seconds a thousand samples; lines: metrics
        of the teacher at K and the most evaluations on the validation's noise; pictures: `[{title, kind, nfe, png}]`.
    """
    cfg, method, tests = session.cfg, session.method, session.suite()
    nfes = sorted({*(evaluations or (n for n in cfg.eval.evaluations if n <= FEW)), method.grid.steps})
    key = home.facts(cfg, session.data, folder)["config"], method.step, samples or cfg.eval.samples, nfes, stock
    if (kept := json_of(folder / MEASURED)).get("key") == list(key):
        return kept
    found = {"key": key, "points": [], "lines": {}, "machine": _machine(session)}
    if session.teacher is not None:
        found["points"] += _teacher(session, tests if stock else None, found["lines"])
    if session.teacher is not method.ema:
        found["points"] += _student(session, nfes, cfg.eval.validation_samples if stock else FEW_TIMED)
    if stock and session.teacher is not None:
        found["points"] += _stock(session, tests, nfes, samples or cfg.eval.samples)
    found["kind"], found["pictures"] = _pictures(session, tests, nfes)
    table.write(found, folder / MEASURED)
    return found


def _machine(session: Session) -> str:
    device = next(session.method.student.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def timed(session: Session, call: Callable, z: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Samples and seconds a thousand of them, after a first call that is not counted.

    By the clock; without an accelerator by the processor where that has fewer, as on a machine that others use too.
    """
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    run.batched(call, z[:2], {k: v[:2] for k, v in cond.items()}, session.method)
    sync()
    clock, processor = time.perf_counter(), time.process_time()
    x = run.batched(call, z, cond, session.method)
    sync()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    spent = clock if torch.cuda.is_available() else min(clock, processor)
    return x, 1000 * spent / len(z)


def _teacher(session: Session, tests: Any, lines: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds of the teacher by DDIM, and its metrics on the validation's noise at K and at the most evaluations."""
    cfg, teacher, steps = session.cfg, session.teacher, session.method.grid.steps
    z, cond = session.noise(cfg.eval.validation_samples if tests else FEW_TIMED, cfg.eval.seed)
    price, out = baselines.price(teacher, z, cond), []
    for nfe in sorted({*cfg.eval.evaluations, steps}):
        if not (calls := int(nfe // price)):
            continue
        walk = lambda z, c, calls=calls: solve(teacher, teacher.schedule.start(z), Grid.uniform(calls), DDIM(), **c)
        x, seconds = timed(session, walk, z, cond)
        out.append({"who": "teacher", "kind": "teacher", "nfe": nfe, "seconds": seconds, "scores": {}})
        if tests and nfe in (steps, max(cfg.eval.evaluations)):
            lines[f"teacher@{nfe}"] = tests.score(x, cond, quick=True)
    return out


def _student(session: Session, nfes: Sequence[int], samples: int) -> list[dict[str, Any]]:
    """Seconds of the student; a number of steps other than its own is walked on an even grid."""
    z, cond = session.noise(samples, session.cfg.eval.seed)
    out = []
    for nfe in nfes:
        _, seconds = timed(session, lambda z, c, nfe=nfe: _walked(session, z, c, nfe), z, cond)
        out.append({"who": "student", "kind": "student", "nfe": nfe, "seconds": seconds, "scores": {}})
    return out


def _walked(session: Session, z: Tensor, cond: dict[str, Tensor], nfe: int) -> Tensor:
    method = session.method
    generator = torch.Generator(z.device).manual_seed(session.cfg.eval.seed)
    return method.sample(z, cond, generator=generator, grid=method.grid if nfe == method.grid.steps else nfe)


def _stock(session: Session, tests: Any, nfes: Sequence[int], samples: int) -> list[dict[str, Any]]:
    """Every stock solver that serves the teacher's schedule, at its own counted cost, from the noise of all others."""
    from distill.nets import diffusers as door

    teacher = session.teacher
    z, cond = session.noise(samples, session.cfg.eval.seed)
    price, out = baselines.price(teacher, z, cond), []
    for name in door.applicable(teacher.schedule):
        costs = {door.cost(name, teacher.schedule, int(nfe // price)) for nfe in nfes if nfe >= price}
        for calls in sorted(costs - {0} if name in ("DDIM", "Flow Euler") else costs - {0, 1}):  # at one all are DDIM
            generator = torch.Generator(next(session.method.student.parameters()).device).manual_seed(0)
            walk = lambda z, c, calls=calls, g=generator, name=name: door.walk(teacher, z, name, calls, g, **c)
            x, seconds = timed(session, walk, z, cond)
            if not torch.isfinite(x).all():
                continue
            scores = tests.score(x, cond, quick=True)
            out.append({"who": name, "kind": "stock", "nfe": round(calls * price), "seconds": seconds, "scores": scores})
        console.print(f"stock {name}: measured", highlight=False)
    return out


# -- pictures ------------------------------------------------------------------------------------------------------


def _pictures(session: Session, tests: Any, nfes: Sequence[int]) -> tuple[str, list[dict[str, Any]]]:
    """("images" | "points" | "none", one picture a row): teacher and student by evaluations, all from the same noises."""
    shape, classes = session.method.shape, session.data.info.classes or 0
    kind = "points" if hasattr(tests, "oracle") else "images" if len(shape) == 3 and shape[0] in (1, 3) else "none"
    if kind == "none" or (kind == "points" and len(shape) != 1):
        return "none", []
    across = classes if 4 <= classes <= ACROSS else ACROSS
    z, cond = session.noise(POINTS if kind == "points" else across, session.cfg.eval.seed)
    rows, teacher = [], session.teacher
    if teacher is not None:
        price = baselines.price(teacher, z, cond)
        for nfe in sorted({*session.cfg.eval.evaluations, session.method.grid.steps}):
            if calls := int(nfe // price):
                walk = lambda z, c, calls=calls: solve(teacher, teacher.schedule.start(z), Grid.uniform(calls), DDIM(), **c)
                rows.append(("teacher", nfe, run.batched(walk, z, cond, session.method)))
    if teacher is not session.method.ema:
        for nfe in nfes:
            rows.append(("student", nfe, run.batched(lambda z, c, n=nfe: _walked(session, z, c, n), z, cond, session.method)))
    return kind, [{"kind": who, "nfe": nfe, "png": _png(tests, kind, x)} for who, nfe, x in rows]


def _png(tests: Any, kind: str, x: Tensor) -> str:
    """A data URI."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.png"
        if kind == "images":
            strip(x).save(path)
        else:
            tests.picture({"": x}, path)
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def strip(x: Tensor, side: int = 96, gap: int = 4) -> Any:
    """Images (B, C, H, W) in [-1, 1] beside each other, about `side` pixels wide each, with clear gaps between them."""
    from PIL import Image

    x = x.float().clamp(-1, 1)
    if x.shape[-1] > side:
        x = interpolate(x, scale_factor=side / x.shape[-1], mode="area")
    scale = max(side // x.shape[-1], 1)
    x = ((x + 1) * 127.5).round().byte().expand(-1, 3, -1, -1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    width, height = x.shape[-1], x.shape[-2]
    sheet = Image.new("RGBA", (len(x) * (width + gap) - gap, height), (0, 0, 0, 0))
    for i, one in enumerate(x.permute(0, 2, 3, 1).contiguous()):
        sheet.paste(Image.fromarray(one.numpy()), (i * (width + gap), 0))
    return sheet

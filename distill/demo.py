"""The whole product in minutes: shipped teacher, four-step student, numbers, pictures, export; no download, no GPU."""

from __future__ import annotations

import time
from pathlib import Path

from distill import config, run
from distill.engine.callbacks import console
from distill.errors import BadInput
from distill.eval import table
from distill.export.verify import verify

ROOT = Path(__file__).parents[1]
TEACHER_AT, STUDENT_AT = 50, 4


def demo(out: Path, steps: int | None = None) -> int:
    """Distil, measure, export into `out`; 0 if the student keeps what the README promises, else 1."""
    recipe = ROOT / "configs" / "digits" / "tdm.yaml"
    if not recipe.exists():
        raise BadInput(f"{recipe} is missing; `distill demo` runs in a clone of the project, where the recipes are.")
    data, started = ROOT / "data" / "digits", time.monotonic()
    if not data.exists():
        from distill.data import write

        write.digits(data)
    overrides = [
        f"data.path={data / 'train'}",
        f"eval.reference.path={data / 'test'}",
        f"roles.teacher.path={ROOT / 'checkpoints' / 'digits-teacher'}",
        *([f"train.steps={steps}"] if steps else []),
    ]
    cfg = config.load([recipe], overrides)
    session = run.train(cfg, out, resume=(out / run.CONFIG).exists())
    console.print(f"trained in {time.monotonic() - started:.0f} s; measuring {cfg.eval.samples} samples a row")
    result, panels = run.measure(session, evaluations=(STUDENT_AT, TEACHER_AT), training_free=(STUDENT_AT,))
    table.write(result, out / run.METRICS)
    session.suite().picture(panels, out / "samples.png")
    student = out / "student"
    if not student.exists():
        run.write_export(session, student, result)
    difference = verify(student)
    table.show(result)
    floor = result["floor"]["fd"]
    console.print(f"for scale, FD of the training split against the held-out one: {floor:.3f}", highlight=False)
    kept = promises(result, difference)
    for text, value, holds in kept:
        console.print(f"{'kept  ' if holds else 'BROKEN'} {text}: {value}", highlight=False)
    page, stock = _page(out, session)
    if stock:
        name, fd = min(stock.items(), key=lambda row: row[1])
        ours = result["student"][str(STUDENT_AT)]["fd"]
        console.print(f"best solver of stock diffusers at {STUDENT_AT}: {name}, FD {fd:.3f}; the student has {ours / fd:.2f} x "
                      "that.", highlight=False)  # fmt: skip
    console.print(f"{time.monotonic() - started:.0f} s in all; open {page}, load {student}")
    return 0 if all(holds for _, _, holds in kept) else 1


def _page(out: Path, session: run.Session) -> tuple[Path, dict[str, float]]:
    """The run's report, and the FD of each solver of stock diffusers on the teacher at the student's evaluations."""
    from distill.report import report
    from distill.report.measure import measure

    points = measure(out, session, (STUDENT_AT,))["points"]
    stock = {p["who"]: p["scores"]["fd"] for p in points if p["kind"] == "stock" and p["nfe"] == STUDENT_AT}
    return report([out], out / "report.html", quick=True), stock


def promises(result: dict, difference: float) -> list[tuple[str, str, bool]]:
    """What the README promises of the demo: text, measured value, whether it holds."""
    student = result["student"][str(STUDENT_AT)]
    many = student["fd"] / result["teacher"][str(TEACHER_AT)]["fd"]
    few = student["fd"] / result["training_free"][str(STUDENT_AT)]["fd"]
    return [
        (f"FD of the student at {STUDENT_AT} <= 0.9 x teacher at {TEACHER_AT}", f"{many:.2f}", many <= 0.9),
        (f"FD of the student <= 0.5 x the best of our ODE solvers on the teacher at {STUDENT_AT}", f"{few:.2f}", few <= 0.5),
        ("accuracy of the student >= 0.97", f"{student['accuracy']:.3f}", student["accuracy"] >= 0.97),
        ("stock diffusers draws the same samples, difference <= 1e-4", f"{difference:.1e}", difference <= 1e-4),
    ]

"""The report page: one HTML file that contains its pictures, charts and the charting library."""

from __future__ import annotations

import json
import pkgutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.errors import BadInput
from distill.files import write_text
from distill.inspect.measure import measure
from distill.inspect.report import charts, tables
from distill.inspect.report.gather import RunSummary, read
from distill.inspect.report.measure import measure_stock, png_uri
from distill.metrics import table
from distill.training import run_folder
from distill.training.callbacks import console
from distill.training.load import load_experiment

MARK = '<meta name="generator" content="distill report">'
PARTS = Path(__file__).parent / "page"


def report(
    folders: Sequence[Path],
    out: Path,
    quick: bool = False,
    evaluations: Sequence[int] | None = None,
    samples: int | None = None,
    allow: tuple[str, ...] = (),
) -> Path:
    """Write the page of one run, or of several with joint charts, to `out`.

    Missing measurements are made first and saved in the run folder: metrics.json as by `distill eval`, the rest as
    report.json. An older report at `out` is replaced; any other file is refused.

    Args:
        quick: measure nothing; show what was measured before.
        evaluations, samples: of the solvers of diffusers; those of the run's own `eval` by default.

    Raises:
        BadInput: no run, a run twice, `out` is no .html, or it is a file of another kind.
    """
    out, folders = Path(out), [Path(f) for f in folders]
    _writable(out)
    if len({f.resolve() for f in folders}) < len(folders):
        raise BadInput("A run is named twice; name each once.")
    for folder in folders:
        run_folder.read_config(folder)
        if not quick:
            _complete(folder, evaluations, samples, allow)
    return write([read(folder) for folder in folders], out)


def _complete(folder: Path, evaluations: Sequence[int] | None, samples: int | None, allow: tuple[str, ...]) -> None:
    experiment, path = load_experiment(folder, allow), folder / run_folder.METRICS
    if (
        not path.exists()
        or table.read(path).get("about", {}).get("step", experiment.method.step) != experiment.method.step
    ):
        console.print(f"{folder}: measuring metrics.json, as distill eval does", highlight=False)
        table.write(measure(experiment)[0], path)
    measure_stock(folder, experiment, evaluations, samples)


def _writable(out: Path) -> None:
    if out.suffix != ".html":
        raise BadInput(f"{out} must end in .html, the kind of page that is written.")
    if not out.parent.is_dir():
        raise BadInput(f"{out.parent} is not a folder; make it, or write the page elsewhere.")
    if out.exists() and (not out.is_file() or MARK not in out.read_text(errors="replace")[:400]):
        raise BadInput(f"{out} exists and is not a report; name another file so nothing is overwritten.")


def write(runs: Sequence[RunSummary], out: Path) -> Path:
    """Write the page, atomically."""
    write_text(out, html(runs))
    return Path(out)


def html(runs: Sequence[RunSummary]) -> str:
    """The page as text."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PARTS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    figures, names = _figures(runs), charts.metrics_of(runs)
    library = pkgutil.get_data("plotly", "package_data/plotly.min.js")
    return env.get_template("page.html").render(
        mark=MARK,
        style=(PARTS / "style.css").read_text(),
        script=(PARTS / "page.js").read_text(),
        library=library.decode("utf-8").replace("</script", "<\\/script"),
        figures=json.dumps(figures, separators=(",", ":")).replace("<", "\\u003c"),
        runs=runs,
        one=len(runs) == 1,
        title=" · ".join(r.name for r in runs),
        date=time.strftime("%-d %B %Y"),
        metrics=[(name, charts.TITLES.get(name, name)) for name in names],
        ids=list(figures),
        tiles=tables.tiles(runs[0]) if len(runs) == 1 else [],
        compared=tables.compared(runs),
        results=[(r, tables.results(r), tables.reference_vs_holdout(r)) for r in runs],
        costs=tables.costs(runs),
        settings=tables.settings(runs),
        environment=tables.environment(runs),
        notes=tables.notes(runs),
        configs=[(r.name, (r.folder / run_folder.CONFIG).read_text()) for r in runs],
        pictures=_pictures(runs),
        stored_pictures=_stored_pictures(runs),
    )


def _figures(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """Figures by the id of their element; those of quality by metric."""
    names = charts.metrics_of(runs)
    figures: dict[str, Any] = {}
    for cost in ("nfe", "seconds"):
        figures_of_cost = {name: charts.quality(runs, name, cost) for name in names}
        if any(figure["data"] for figure in figures_of_cost.values()):
            figures[f"quality-{cost}"] = figures_of_cost
    validated = [
        n.removeprefix("validation/")
        for run in runs
        for row in run.rows
        for n in row
        if n.startswith("validation/") and n.count("/") == 1
    ]
    known = [n for n in dict.fromkeys(validated) if n in charts.TITLES][:4]
    figures |= {f"validation-{n}": {"": charts.validation(runs, n)} for n in known}
    for ending, text in (("loss", "Loss by role"), ("grad_norm", "Gradient norm by role")):
        figure = charts.training(runs, ending, text)
        figures |= {ending.replace("_", "-"): {"": figure}} if figure["data"] else {}
    return figures


def _pictures(runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """Rows of the grid: the first run's teacher and student, then the students of the others."""
    out = []
    for i, one in enumerate(runs):
        for picture in one.measured.get("pictures", []):
            if i == 0 or (picture["kind"] == "student" and picture["nfe"] == one.steps):
                label = "teacher" if picture["kind"] == "teacher" else "student" if len(runs) == 1 else one.name
                trained = picture["kind"] == "student" and picture["nfe"] == one.steps
                out.append(picture | {"label": label, "trained": trained})
    return out


def _stored_pictures(runs: Sequence[RunSummary]) -> list[dict[str, str]]:
    """Pictures in the folders of runs whose report.json has none, as with --quick before any measurement."""
    out = []
    for run in runs:
        for path in run.pictures if not run.measured.get("pictures") else ():
            out.append({"label": run.name, "file": str(path.relative_to(run.folder)), "png": png_uri(path)})
    return out

"""`distill compare`: trains several recipes for equal processor time and measures them in one table.

A row is kept under the recipe, its seed and the digest of the method's code, so that an interrupted table continues, and a
changed recipe or method is measured again.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning

from distill import config
from distill.config import DictConfig
from distill.errors import BadInput
from distill.files import digest, markdown_table, read_json, sample_counts, write_text
from distill.inspect.measure import measure
from distill.metrics import table
from distill.training import run_folder
from distill.training.callbacks import console
from distill.training.experiment import Experiment, build_experiment
from distill.training.run import train
from distill.training.trainer import fit

NFES, MANY = (1, 2, 4), 50
ROWS = "rows"  # folder of one JSON file a recipe and seed
TEACHER = "teacher.json"
FORMALISM = tuple(
    f"distill.{name}"
    for name in "noise times denoise tangent solvers losses methods.base models.heads models.small".split()
)  # the modules whose code belongs to a method


def compare_recipes(
    recipes: Sequence[Path],
    out: Path,
    seconds: float,
    overrides: Sequence[str] = (),
    allow: tuple[str, ...] = (),
    seeds: int = 1,
) -> str:
    """Train every recipe for `seconds` of processor time, measure it, and write `out/table.md` from all rows there.

    The time per step is measured first, as processor time of all threads, which depends less on other load than
    wall-clock time; it determines the number of steps, so that learning-rate schedules are complete. Recipes with a row
    in `out` are not run again unless the recipe or the method's code has changed; several processes may share `out` with
    different recipes.

    Args:
        recipes: config files.
        out: folder of runs, rows and table.
        seconds: processor seconds of training.
        overrides: `key=value` for all recipes.
        allow: packages that recipes may name.
        seeds: how many seeds, from the recipe's own upwards, for recipes that state what they reach (`expect`); the
            others are trained with one.

    Returns:
        the table in markdown.

    Raises:
        BadInput: no recipe, two with the same name, or an existing row with another budget.
        KeyboardInterrupt: training was interrupted; the same command continues it.
    """
    out, cfgs = Path(out), {}
    for path in recipes:
        cfg = config.load([path], ["log.wandb=disabled", "train.validate_every=0", "train.save_every=0", *overrides])
        if not cfg.method or str(cfg.method.get(config.TARGET)).endswith(".Diffusion"):
            console.print(f"{path}: trains no student, left out", highlight=False)
            continue
        if cfg.name in cfgs:
            raise BadInput(f"Two recipes are named {cfg.name}; give one of them another name.")
        cfgs[cfg.name] = cfg
    if not cfgs:
        raise BadInput("No recipe to compare; name some, for example configs/digits/*.yaml.")
    (out / ROWS).mkdir(parents=True, exist_ok=True)
    for name, cfg in cfgs.items():
        for seed in range(cfg.seed, cfg.seed + (seeds if cfg.expect else 1)):
            measure_recipe(config.merge(cfg, {"seed": seed}), out, seconds, allow)
            console.print(f"{name}, seed {seed}: done", highlight=False)
    text = comparison_table(out)
    write_text(out / "table.md", text)
    return text


def measure_recipe(cfg: DictConfig, out: Path, seconds: float, allow: tuple[str, ...]) -> dict[str, Any]:
    """Train and measure one recipe with its seed, or read what was measured."""
    name = f"{cfg.name}.seed-{cfg.seed}"
    file = out / ROWS / f"{name}.json"
    settings = {k: v for k, v in cfg.items_ex(resolve=False) if k != "expect"}  # what it should reach changes no row
    key = {"recipe": config.fingerprint(settings), "code": method_digest(cfg.method)}
    if file.exists():
        row = read_json(file, "remove it, and the recipe is measured again")
        if row["seconds"] != seconds:
            raise BadInput(f"{file} was made with {row['seconds']:g} seconds; compare in another folder, or remove it.")
        if all(row.get(k) == v for k, v in key.items()):
            return row
        console.print(f"{name}: the recipe or the method's code has changed, measured again", highlight=False)
    folder = out / f"{name}.{digest([*key.values(), str(seconds)], 8)}"
    if resume := (folder / run_folder.CONFIG).exists():  # interrupted: it continues with the steps that were chosen
        cfg = config.merge(cfg, {"train": {"steps": run_folder.read_config(folder).train.steps}})
    else:
        cost = seconds_a_step(build_experiment(cfg, allow), cfg)
        cfg = config.merge(cfg, {"train": {"steps": max(int(seconds / cost), 1)}})
    began = time.process_time()
    experiment = train(cfg, folder, resume=resume, allow=allow)
    spent = time.process_time() - began
    if experiment.method.step < cfg.train.steps and not experiment.stopped:
        raise KeyboardInterrupt
    if not (out / TEACHER).exists() and experiment.teacher is not None:
        teacher, _ = measure(experiment, evaluations=(*NFES, MANY), every_solver=NFES)
        table.write(teacher, out / TEACHER)
    experiment.method.eval()
    result, panels = measure(experiment, evaluations=NFES, every_solver=())
    table.write(result, folder / run_folder.METRICS)
    experiment.suite().picture(panels, folder / "samples.png")
    row = {
        "name": cfg.name,
        "seed": cfg.seed,
        "method": type(experiment.method).__name__,
        **key,
        "seconds": seconds,
        "spent": spent,
        "steps": cfg.train.steps,
        "seconds_a_step": seconds / cfg.train.steps,
        "trained_for": experiment.method.grid.steps,
        "student": result["student"],
        "about": result["about"],
    }
    table.write(row, file)
    return row


def method_digest(method: Any) -> str:
    """Digest of a method's code, `method_sources` of the `method` section of a config."""
    sources = method_sources(method)
    return digest([f"{module}\n{sources[module]}\n" for module in sorted(sources)])


def method_sources(method: Any) -> dict[str, str]:
    """The code of a method by module: its own module and what that imports of FORMALISM, without comments and docstrings.

    Methods named inside of the section count too.
    """
    todo, sources = list(_modules_named(config.plain(method))), {}
    while todo:
        module = todo.pop()
        spec = importlib.util.find_spec(module) if module not in sources else None
        if spec is not None and spec.origin:
            tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
            todo += [name for name in _imported(tree) if name.startswith(FORMALISM)]
            sources[module] = ast.dump(_without_docstrings(tree))
    return sources


def _modules_named(node: Any) -> Iterator[str]:
    """The modules of the classes that a section of a config names."""
    if isinstance(node, dict):
        target = str(node.get(config.TARGET, ""))
        if "." in target:
            module, _, name = target.rpartition(".")
            found = getattr(sys.modules.get(module) or importlib.import_module(module), name, None)
            yield getattr(found, "__module__", module)
        node = list(node.values())
    for value in node if isinstance(node, list) else ():
        yield from _modules_named(value)


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                del node.body[0]
    return tree


def seconds_a_step(experiment: Experiment, cfg: DictConfig, warm: int = 4, steps: int = 12) -> float:
    """Processor seconds per training step: the mean over `steps` steps after `warm` ones."""
    clock = _Clock()
    fit(experiment.method, experiment.data, warm + steps, [clock], engine=cfg.engine)
    return (clock.ticks[-1] - clock.ticks[warm - 1]) / steps


class _Clock(lightning.Callback):
    def __init__(self):
        self.ticks: list[float] = []

    def on_train_batch_end(self, *args) -> None:
        self.ticks.append(time.process_time())


def comparison_table(out: Path) -> str:
    """The table of all rows in `out`: a line for each recipe, best at the most evaluations first.

    With several seeds a cell has their mean, and the column "seeds" their number.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((out / ROWS).glob("*.json")):
        row = read_json(file)
        by_name.setdefault(row["name"], []).append(row)
    rows = {name: rows[0] | {"seeds": len(rows), "student": _mean(rows)} for name, rows in by_name.items()}
    last = str(NFES[-1])
    metrics = list(dict.fromkeys(m for row in rows.values() for m in row["student"][last]))
    ranked = sorted(rows.items(), key=lambda item: item[1]["student"][last][metrics[0]] or float("inf"))
    head = ["recipe", "method", "trained for", "s / step", "steps", "seeds"]
    rows_of_table = []
    for name, row in ranked:
        facts = [f"`{row['method']}`", row["trained_for"], f"{row['seconds_a_step']:.3f}", row["steps"], row["seeds"]]
        rows_of_table.append([name, *facts, *_cells(row["student"], metrics)])
    if (out / TEACHER).exists():
        teacher = read_json(out / TEACHER)
        many = teacher["teacher"][str(MANY)]
        for name, cells in (
            ("teacher, DDIM", _cells(teacher["teacher"], metrics)),
            ("best distill solver", _cells(teacher["training_free"], metrics)),
            (f"teacher at {MANY}", [_number(many.get(m)) for m in metrics]),
        ):
            rows_of_table.append([name, "", "", "", "", "", *cells])
    text = markdown_table([*head, *(f"{m} at {' / '.join(map(str, NFES))}" for m in metrics)], rows_of_table)
    counts = sorted({sample_counts(row.get("about", {})) for row in rows.values()} - {""})
    return text + (f"\n{' '.join(counts)}\n" if counts else "")


def _mean(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The mean of each metric over the seeds; None where a seed has no number."""
    students = [row["student"] for row in rows]
    mean: dict[str, dict[str, float | None]] = {}
    for evaluations, scores in students[0].items():
        mean[evaluations] = {}
        for metric in scores:
            values = [student.get(evaluations, {}).get(metric) for student in students]
            mean[evaluations][metric] = None if None in values else statistics.fmean(values)
    return mean


def _cells(scores: dict[str, dict[str, float]], metrics: list[str]) -> list[str]:
    return [" / ".join(_number(scores[str(n)].get(m)) for n in NFES) for m in metrics]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"

"""`distill compare`: trains several recipes for equal processor time and measures them in one table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from omegaconf import DictConfig, OmegaConf

from distill import config
from distill.errors import BadInput
from distill.files import markdown_table, read_json, sample_counts, write_text
from distill.inspect.measure import measure
from distill.metrics import table
from distill.training import run_folder
from distill.training.callbacks import console
from distill.training.experiment import Experiment, build_experiment
from distill.training.run import train
from distill.training.trainer import fit

NFES, MANY = (1, 2, 4), 50
ROWS = "rows"  # folder of one JSON file a recipe
TEACHER = "teacher.json"


def compare(
    recipes: Sequence[Path], out: Path, seconds: float, overrides: Sequence[str] = (), allow: tuple[str, ...] = ()
) -> str:
    """Train every recipe for `seconds` of processor time, measure it, and write `out/table.md` from all rows there.

    The time per step is measured first, as processor time of all threads, which depends less on other load than
    wall-clock time; it determines the number of steps, so that learning-rate schedules are complete. Recipes with a row
    in `out` are not run again; several processes may share `out` with different recipes.

    Returns:
        the table in markdown.

    Raises:
        BadInput: no recipe, two with the same name, or an existing row with another budget or recipe.
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
        measure_recipe(cfg, out, seconds, allow)
        console.print(f"{name}: done", highlight=False)
    text = markdown(out)
    write_text(out / "table.md", text)
    return text


def measure_recipe(cfg: DictConfig, out: Path, seconds: float, allow: tuple[str, ...]) -> dict[str, Any]:
    """The row of one recipe: trained and measured, or read from its file."""
    file, recipe = out / ROWS / f"{cfg.name}.json", config.fingerprint(cfg)
    if file.exists():
        row = read_json(file, "remove it, and the recipe is measured again")
        if (row["seconds"], row["recipe"]) != (seconds, recipe):
            raise BadInput(f"{file} was made with another budget or recipe; remove it, or compare in another folder.")
        return row
    cost = seconds_a_step(build_experiment(cfg, allow), cfg)
    cfg = OmegaConf.merge(cfg, {"train": {"steps": max(int(seconds / cost), 1)}})
    folder, began = out / cfg.name, time.process_time()
    experiment = train(cfg, folder, resume=(folder / run_folder.CONFIG).exists(), allow=allow)
    spent = time.process_time() - began
    if not (out / TEACHER).exists() and experiment.teacher is not None:
        teacher, _ = measure(experiment, evaluations=(*NFES, MANY), every_solver=NFES)
        table.write(teacher, out / TEACHER)
    experiment.method.eval()
    result, panels = measure(experiment, evaluations=NFES, every_solver=())
    table.write(result, folder / run_folder.METRICS)
    experiment.suite().picture(panels, folder / "samples.png")
    row = {
        "method": type(experiment.method).__name__,
        "recipe": recipe,
        "seconds": seconds,
        "spent": spent,
        "steps": experiment.method.step,
        "seconds_a_step": cost,
        "trained_for": experiment.method.grid.steps,
        "student": result["student"],
        "about": result["about"],
    }
    table.write(row, file)
    return row


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


def markdown(out: Path) -> str:
    """The table of all rows in `out`, one per recipe, sorted by the first metric at the most evaluations."""
    rows = {file.stem: read_json(file) for file in sorted((out / ROWS).glob("*.json"))}
    last = str(NFES[-1])
    metrics = list(dict.fromkeys(m for row in rows.values() for m in row["student"][last]))
    ranked = sorted(rows.items(), key=lambda item: item[1]["student"][last][metrics[0]] or float("inf"))
    head = ["recipe", "method", "trained for", "s / step", "steps"]
    rows_of_table = []
    for name, row in ranked:
        facts = [f"`{row['method']}`", row["trained_for"], f"{row['seconds_a_step']:.3f}", row["steps"]]
        rows_of_table.append([name, *facts, *_cells(row["student"], metrics)])
    if (out / TEACHER).exists():
        teacher = read_json(out / TEACHER)
        many = teacher["teacher"][str(MANY)]
        for name, cells in (
            ("teacher, DDIM", _cells(teacher["teacher"], metrics)),
            ("best training-free solver", _cells(teacher["training_free"], metrics)),
            (f"teacher at {MANY}", [_number(many.get(m)) for m in metrics]),
        ):
            rows_of_table.append([name, "", "", "", "", *cells])
    text = markdown_table([*head, *(f"{m} at {' / '.join(map(str, NFES))}" for m in metrics)], rows_of_table)
    counts = sorted({sample_counts(row.get("about", {})) for row in rows.values()} - {""})
    return text + (f"\n{' '.join(counts)}\n" if counts else "")


def _cells(scores: dict[str, dict[str, float]], metrics: list[str]) -> list[str]:
    return [" / ".join(_number(scores[str(n)].get(m)) for n in NFES) for m in metrics]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"

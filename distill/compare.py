"""Many recipes, one budget, one table: each method gets the same processor seconds, seeds and measurements."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from omegaconf import DictConfig, OmegaConf

from distill import config, run
from distill.engine import home
from distill.engine.callbacks import console
from distill.engine.trainer import fit
from distill.errors import BadInput
from distill.eval import table

NFES, MANY = (1, 2, 4), 50
ROWS = "rows"  # folder of one JSON file a recipe
TEACHER = "teacher.json"


def compare(recipes: Sequence[Path], out: Path, seconds: float, overrides: Sequence[str] = (),
            allow: tuple[str, ...] = ()) -> str:
    """Train every recipe for `seconds` of processor time, measure it, and write `out/table.md` from all rows there.

    The time of a step is measured first (processor time of all threads, which a busy machine does not stretch as it
    stretches the clock), then the number of steps is chosen, so that learning rates decay as they would by hand. A
    recipe whose row is there is not run again; several processes may share `out`, each with recipes of its own.

    Returns:
        the table in markdown.

    Raises:
        BadInput: no recipe, two of one name, or a row there that was made with another budget or recipe.
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
        row(cfg, out, seconds, allow)
        console.print(f"{name}: done", highlight=False)
    text = markdown(out)
    (out / "table.md").write_text(text)
    return text


def row(cfg: DictConfig, out: Path, seconds: float, allow: tuple[str, ...]) -> dict[str, Any]:
    """Train and measure one recipe, or read what was measured."""
    file, recipe = out / ROWS / f"{cfg.name}.json", config.fingerprint(cfg)
    if file.exists():
        found = json.loads(file.read_text())
        if (found["seconds"], found["recipe"]) != (seconds, recipe):
            raise BadInput(f"{file} was made with another budget or recipe; remove it, or compare in another folder.")
        return found
    cost = seconds_a_step(run.assemble(cfg, allow), cfg)
    cfg = OmegaConf.merge(cfg, {"train": {"steps": max(int(seconds / cost), 1)}})
    folder, began = out / cfg.name, time.process_time()
    session = run.train(cfg, folder, resume=(folder / home.CONFIG).exists(), allow=allow)
    spent = time.process_time() - began
    if not (out / TEACHER).exists() and session.teacher is not None:
        teacher, _ = run.measure(session, evaluations=(*NFES, MANY), training_free=NFES)
        table.write(teacher, out / TEACHER)
    session.method.eval()
    result, panels = run.measure(session, evaluations=NFES, training_free=())
    table.write(result, folder / home.METRICS)
    session.suite().picture(panels, folder / "samples.png")
    found = {
        "method": type(session.method).__name__, "recipe": recipe, "seconds": seconds, "spent": spent,
        "steps": session.method.step, "seconds_a_step": cost, "trained_for": session.method.grid.steps,
        "student": result["student"],
    }
    table.write(found, file)
    return found


def seconds_a_step(session: run.Session, cfg: DictConfig, warm: int = 4, steps: int = 12) -> float:
    """Processor seconds of a training step: the mean of `steps` after `warm` ones."""
    clock = _Clock()
    fit(session.method, session.data, warm + steps, [clock], engine=cfg.engine)
    return (clock.ticks[-1] - clock.ticks[warm - 1]) / steps


class _Clock(lightning.Callback):
    def __init__(self):
        self.ticks: list[float] = []

    def on_train_batch_end(self, *args) -> None:
        self.ticks.append(time.process_time())


def markdown(out: Path) -> str:
    """The table of all rows in `out`: a line for each recipe, best at the most evaluations first."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted((out / ROWS).glob("*.json"))}
    last = str(NFES[-1])
    metrics = list(dict.fromkeys(m for facts in found.values() for m in facts["student"][last]))
    ranked = sorted(found.items(), key=lambda item: item[1]["student"][last][metrics[0]] or float("inf"))
    heads = [f"{m} at {' / '.join(map(str, NFES))}" for m in metrics]
    lines = [["recipe", "method", "trained for", "s / step", "steps", *heads], ["---"] * (5 + len(heads))]
    for name, facts in ranked:
        lines.append([name, f"`{facts['method']}`", str(facts["trained_for"]), f"{facts['seconds_a_step']:.3f}",
                      str(facts["steps"]), *_cells(facts["student"], metrics)])
    if (out / TEACHER).exists():
        teacher = json.loads((out / TEACHER).read_text())
        lines.append(["teacher, DDIM", "", "", "", "", *_cells(teacher["teacher"], metrics)])
        lines.append(["best training-free solver", "", "", "", "", *_cells(teacher["training_free"], metrics)])
        many = teacher["teacher"][str(MANY)]
        lines.append([f"teacher at {MANY}", "", "", "", "", *(_number(many.get(m)) for m in metrics)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(scores: dict[str, dict[str, float]], metrics: list[str]) -> list[str]:
    return [" / ".join(_number(scores[str(n)].get(m)) for n in NFES) for m in metrics]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"

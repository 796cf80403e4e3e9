"""How often a toy recipe keeps its promise when its learning rates and seed change; prints a markdown table.

    python tests/robustness.py tdm dmd2 --factors 0.333 1 3 --seeds 0 1 2 --out robustness.json

Each run is the recipe with every role's learning rate times the factor. Runs that are in the file already are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from distill import config
from distill.errors import BadInput
from distill.inspect.measure import toy_scores
from distill.training.run import train

TOYS = Path(__file__).parents[1] / "configs" / "toy"


def reaches(name: str, factor: float, seed: int) -> dict:
    """The scores that the recipe promises, and whether all are within their bounds; a run that stops reaches none."""
    base = config.load([TOYS / f"{name}.yaml"])
    rates = [f"optim.{role}.lr={settings.lr * factor:.3e}" for role, settings in base.optim.items()]
    quiet = ["log.wandb=disabled", "train.threads=1", "train.validate_every=0"]
    cfg = config.load([TOYS / f"{name}.yaml"], [*quiet, f"seed={seed}", *rates])
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = toy_scores(train(cfg, Path(folder) / "run"))
        except BadInput as error:
            return {"reached": False, "stopped": str(error)}
    scores = {key: found[key] for key in cfg.expect}
    return {"reached": all(scores[key] <= bound for key, bound in cfg.expect.items()), "scores": scores}


def table(found: dict[str, dict], factors: list[float]) -> str:
    """A line for each recipe: at each factor, how many seeds reached the bound, of how many."""
    lines = [["recipe", *(f"lr x {factor:.2g}" for factor in factors), "all"], ["---"] * (len(factors) + 2)]
    for name in sorted({key.split()[0] for key in found}):
        of = lambda factor, name=name: [v["reached"] for k, v in found.items() if k.startswith(f"{name} {factor:g} ")]
        cells = [of(factor) for factor in factors]
        every = sum(cells, [])
        lines.append([name, *(f"{sum(c)}/{len(c)}" for c in cells), f"{sum(every)}/{len(every)}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--factors", nargs="+", type=float, default=[1 / 3, 1.0, 3.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("robustness.json"))
    given = parser.parse_args()
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name in given.recipes:
        for factor in given.factors:
            for seed in given.seeds:
                key = f"{name} {factor:g} {seed}"
                if key not in found:
                    found[key] = reaches(name, factor, seed)
                    given.out.write_text(json.dumps(found, indent=1))
    print(table(found, given.factors))


if __name__ == "__main__":
    main()

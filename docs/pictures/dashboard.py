"""The layout of docs/dashboard.md from a run's metrics.csv: python docs/pictures/dashboard.py RUN OUT.png"""

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from distill.training.records import read_metrics

QUALITY = ("fd", "accuracy", "energy", "diversity", "coverage", "beyond", "contrast", "high_frequency")
TEACHER = {"color": "0.45", "lw": 1}


def columns(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_metrics(run):
        for name, value in row.items():
            if name != "step":
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return found


def quality(axis, data, name):
    axis.plot(*data[f"validation/{name}"], color="tab:blue", marker=".", label="student")
    styles = iter(("--", ":"))
    for key in data:
        if found := re.fullmatch(rf"validation/(teacher@\d+|data)/{name}", key):
            axis.plot(*data[key], ls=next(styles), label=found[1], **TEACHER)
    axis.set_title(f"validation/{name}")


def roles(axis, data, what):
    for key in data:
        if key.endswith(f"/{what}") and not key.startswith("validation/"):
            axis.plot(*data[key], lw=1, label=key.split("/")[0])
    axis.set_yscale("log")
    axis.set_title(f"ROLE/{what}")


def main(run: Path, out: Path) -> None:
    data = columns(run)
    charts = [(quality, name) for name in QUALITY if f"validation/{name}" in data]
    charts += [(quality, n) for n in ("critic_lag", "head_accuracy") if f"validation/{n}" in data]
    charts += [(roles, what) for what in ("loss", "grad_norm", "update")]
    shots = sorted((run / "samples").glob("step-*.png"))
    shots = [shots[i] for i in sorted({0, len(shots) // 4, len(shots) - 1})]
    rows = -(-len(charts) // 4)
    figure = plt.figure(figsize=(15, 2.9 * rows + 3.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[2.9 * rows, 3.6])
    for axis, chart in zip(upper.subplots(rows, 4).flat, [*charts, *[None] * (4 * rows - len(charts))]):
        if chart is None:
            axis.axis("off")
            continue
        chart[0](axis, data, chart[1])
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7)
    for axis, shot in zip(lower.subplots(1, len(shots)), shots):
        axis.imshow(plt.imread(shot))
        axis.axis("off")
    lower.suptitle("samples: one picture a step")
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

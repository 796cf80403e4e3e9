"""Verbs that take configs: train, check, plan, bench, compare, demo."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from distill.cli.group import allowed, main
from distill.errors import BadInput


def _split(arguments: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Config files, those of patterns too, and `key=value` overrides."""
    from distill.config import recipes
    from distill.config.schema import RunConfig

    sections = {field.name for field in dataclasses.fields(RunConfig)}
    for key, value in zip(arguments, (*arguments[1:], "VALUE")):
        if (
            "=" not in key
            and not key.endswith(".yaml")
            and key.partition(".")[0] in sections
            and not Path(key).exists()
        ):
            raise BadInput(f"'{key}' is a key, not a config: write {key}={'VALUE' if '=' in value else value}.")
    return recipes.expand([a for a in arguments if "=" not in a]), [a for a in arguments if "=" in a]


def _load(arguments: tuple[str, ...], *overrides: str) -> Any:
    """The config of a command line's CONFIG and KEY=VALUE arguments."""
    from distill import config

    files, given = _split(arguments)
    return config.load(files, [*given, *overrides])


@main.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Parent folder.")
@click.option("--resume", is_flag=True, help="Resume the run of this name from its newest checkpoint.")
@click.option("--resume-if-exists", is_flag=True, help="Resume the run of this name if there is one, else start it.")
@click.option("--no-check", is_flag=True, help="Skip the checks of `distill check`.")
def train(configs: tuple[str, ...], runs: Path, resume: bool, resume_if_exists: bool, no_check: bool) -> None:
    """Train the run that CONFIGs describe.

    Later files and KEY=VALUE override earlier ones. A new run is checked first, as by `distill check`, and not started
    if a check fails.

    \b
    Example:
      distill train toy/tdm
      distill train digits/tdm name=fast optim.student.lr=1e-4 train.steps=300

    Exit codes: 0 all steps done, or stopped by train.patience; 2 bad input; 130 Ctrl-C; 85 SIGTERM or SIGUSR1: repeat
    the command with --resume.
    """
    from distill.training import launch

    launch.leave_if_ended()
    cfg = _load(configs)
    if launch.needs_spawn(cfg.engine):
        sys.exit(launch.spawn_processes(cfg.engine.devices))
    from distill.training.run import train
    from distill.training.run_folder import is_rank_zero
    from distill.training.signals import REQUEUE

    resume = resume or resume_if_exists and (runs / cfg.name / "config.yaml").exists()
    gate = None
    if not no_check:
        from distill.inspect.check import gate as make

        gate = make()
    experiment = train(cfg, runs / cfg.name, resume, allowed(), check=gate)
    done = experiment.method.step
    unfinished = done < cfg.train.steps and not experiment.stopped
    if is_rank_zero():
        click.echo(f"{runs / cfg.name}: {done} of {cfg.train.steps} steps done.")
    if is_rank_zero() and unfinished:
        click.echo("Repeat the command with --resume to continue.")
    if unfinished:
        launch.leave(REQUEUE if experiment.preempted else 130)


@main.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Parent folder.")
def check(configs: tuple[str, ...], runs: Path) -> None:
    """Check the run that CONFIGs describe before it is trained.

    Conventions, data, signs of gradients, learning rates, disk space. Nothing is written. Prints one line per finding:
    ok, skipped, WARN (suspicious) or FAIL (certainly wrong, with the remedy).

    \b
    Example:
      distill check digits/tdm
      distill check digits/tdm method.guidance=2 train.steps=100

    Exit codes: 0 no FAIL, 2 a FAIL or bad input.
    """
    from distill.inspect import check as module

    cfg = _load(configs)
    findings = module.check(cfg, runs / cfg.name, allowed(), cfg.engine.devices)
    for finding in findings:
        click.echo(str(finding))
    module.refuse(findings)


@main.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="Number of GPUs, one process each.")
@click.option("--gpu", metavar="NAME", help="h100, h200, a100, 4090 ...: sets --memory and --flops.  [default: h100]")
@click.option("--memory", type=click.FloatRange(0, min_open=True), help="GB of each.")
@click.option("--flops", type=click.FloatRange(0, min_open=True), help="Peak operations per second, such as 989e12.")
@click.option(
    "--utilisation",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="Share of --flops that is reached.",
)
@click.option("--batch", is_flag=True, help="Also find the largest data.batch_size that fits.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the numbers to this file.")
def plan(
    configs: tuple[str, ...],
    gpus: int,
    gpu: str | None,
    memory: float | None,
    flops: float | None,
    utilisation: float,
    batch: bool,
    out: Path | None,
) -> None:
    """Estimate memory, hours and disk of the run that CONFIGs describe.

    Memory is per rank, for each strategy and layout. No GPU is needed and no weights are allocated: networks are traced
    on the meta device.

    \b
    Example:
      distill plan bench/dit-12b --gpus 8 --memory 80
      distill plan digits/tdm --gpu 4090 --batch
    """
    from distill.inspect import plan as module
    from distill.inspect.plan.show import show, write

    if out and out.exists():
        raise BadInput(f"{out} exists; name another file so nothing is overwritten.")
    cfg = _load(configs)
    machine = module.machine_of(cfg.engine.precision, gpus, gpu, memory, flops, utilisation)
    estimate = module.plan(cfg, machine, allowed(), batch)
    if out:
        write(estimate, out)
    show(estimate)


@main.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]")
@click.option("--steps", type=click.IntRange(1), default=30, show_default=True, help="Steps measured of each kind.")
@click.option(
    "--layout", type=click.Choice(["full", "shared_base"]), help="One network for each role, or adapters on one base."
)
@click.option(
    "--peak", type=click.FloatRange(0, min_open=True), help="Peak TFLOP per second of the device, for the utilisation."
)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers to this JSON file.")
def bench(configs: tuple[str, ...], steps: int, layout: str | None, peak: float | None, out: Path | None) -> None:
    """Time a training step by role and phase.

    The forward and backward passes of the same networks alone are timed beside it. Nothing is saved. The recipes
    bench/* have real sizes with random weights: unet-2b (SDXL's), dit-2b, dit-12b.

    \b
    Example:
      distill bench digits/tdm
      distill bench bench/dit-2b --layout shared_base --steps 10
      distill bench bench/dit-12b engine.strategy=fsdp engine.devices=8
    """
    from distill.metrics import table
    from distill.training import launch

    if out and out.exists():
        raise BadInput(f"{out} exists; name another file so nothing is overwritten.")
    cfg = _load(configs, *([f"roles.layout={layout}"] if layout else []))
    if launch.needs_spawn(cfg.engine):
        sys.exit(launch.spawn_processes(cfg.engine.devices))
    from distill.inspect import bench as module
    from distill.training.run_folder import is_rank_zero

    timings = module.bench(cfg, steps, allow=allowed(), peak=peak)
    if not is_rank_zero():
        return
    if out:
        table.write(timings, out)
    click.echo(module.bench_tables(cfg.name, timings))


@main.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/compare"),
    show_default=True,
    help="Folder of the runs, rows and table.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1),
    default=360,
    show_default=True,
    help="Processor seconds of training for each CONFIG: 360 are three minutes on two cores.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Seeds for each CONFIG that states what it reaches (`expect`); others get one.",
)
@click.option(
    "--record",
    is_flag=True,
    help="Record the reference curves of RECIPE from three RUNs or more, each with its own seed.",
)
def compare(configs: tuple[str, ...], out: Path, seconds: float, seeds: int, record: bool) -> None:
    """Train every CONFIG for the same time and print one table.

    Rows already in OUT are kept. If it is interrupted, repeat the command. A changed recipe or method is measured
    again.

    With RUN RECIPE: list where the run is outside the recipe's reference curves and metrics; exit code 1 if there is
    any.

    \b
    Example:
      distill compare digits/tdm digits/pcm --seconds 360
      distill compare digits/tdm digits/pcm --seeds 3 --out runs/two
      distill compare runs/toy-tdm toy/tdm
      distill compare --record runs/seed-1 runs/seed-2 runs/seed-3 toy/tdm
    """
    if record or Path(configs[0]).is_dir():
        sys.exit(_compare_with_recipe([Path(c) for c in configs], record))
    from distill.inspect.compare import compare_recipes

    files, overrides = _split(configs)
    click.echo(compare_recipes([Path(file) for file in files], out, seconds, overrides, allowed(), seeds))


def _compare_with_recipe(paths: list[Path], record: bool) -> int:
    """Record the reference curves of a recipe, or compare one run with them; the exit code."""
    from distill.config import recipes
    from distill.inspect import curves

    *runs, recipe = paths
    if not runs or recipe.is_dir() or not (record or len(runs) == 1):
        raise BadInput(
            "Usage: `distill compare RUN RECIPE`, or `distill compare --record RUN RUN RUN RECIPE` (run folders first)."
        )
    recipe = recipes.find(recipe)
    if record:
        click.echo(f"{curves.record_curves(runs, recipe, allowed())}: written.")
        return 0
    departures, notes = curves.compare_run(runs[0], recipe, allowed())
    for note in notes:
        click.echo(f"note   {note}")
    for departure in departures:
        click.echo(f"OUTSIDE {departure}")
    click.echo(f"{runs[0]}: {'outside' if departures else 'within'} the reference curves of {recipes.shown(recipe)}.")
    return 1 if departures else 0


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--steps", type=click.IntRange(1), default=None, help="Training steps, to override the recipe's.")
def demo(out: Path, steps: int | None) -> None:
    """Distil, measure and export a four-step student of digits.

    The teacher comes with the package; the whole takes minutes on two CPU cores. Writes OUT/run (a run folder),
    OUT/student (a diffusers folder), OUT/report.html and OUT/data.

    \b
    Example:
      distill demo
    """
    from distill.cli.demo import demo as run_demo

    sys.exit(run_demo(out, steps))

"""Verbs that take configs: train, check, plan, bench, compare."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from distill.cli.group import allowed, main
from distill.errors import BadInput


@main.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Parent folder.")
@click.option("--resume", is_flag=True, help="Go on with the run of this name from its newest checkpoint.")
@click.option("--resume-if-exists", is_flag=True, help="Go on with the run of this name if there is one, else start it.")
@click.option("--no-check", is_flag=True, help="Start without the checks of `distill check`.")
def train(configs: tuple[str, ...], runs: Path, resume: bool, resume_if_exists: bool, no_check: bool) -> None:
    """Train the run that CONFIGs describe; later files and KEY=VALUE override earlier ones.

    A new run is first looked at as `distill check` does, and not started with a certain fault.

    \b
    Example:
      distill train configs/toy/tdm.yaml
      distill train configs/digits/tdm.yaml name=fast optim.student.lr=1e-4 train.steps=300

    \b
    Exit codes: 0 all steps done, or a plateau by train.patience; 2 bad input, 130 Ctrl-C, 85 SIGTERM or SIGUSR1: start it
    again with --resume.
    """
    from distill import config
    from distill.engine import launch

    files = [c for c in configs if "=" not in c]
    cfg = config.load(files, [c for c in configs if "=" in c])
    if launch.wanted(cfg.engine):
        sys.exit(launch.spawn(cfg.engine.devices))
    from distill import run
    from distill.engine.home import leads
    from distill.engine.preempt import REQUEUE

    resume = resume or resume_if_exists and (runs / cfg.name / "config.yaml").exists()
    gate = None
    if not no_check:
        from distill.check import gate as make

        gate = make()
    session = run.train(cfg, runs / cfg.name, resume, allowed(), look=gate)
    done = session.method.step
    click.echo(f"{runs / cfg.name}: {done} of {cfg.train.steps} steps done.") if leads() else None
    if done < cfg.train.steps and not session.stopped:
        click.echo("Go on with the same command and --resume.") if leads() else None
        sys.exit(REQUEUE if session.preempted else 130)


@main.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Parent folder.")
def check(configs: tuple[str, ...], runs: Path) -> None:
    """Look at the run that CONFIGs describe before it costs anything: conventions, data, signs, rates, disk.

    Nothing is written. One line a finding: ok, skipped, WARN (suspicious) or FAIL (certainly wrong, with the mend).

    \b
    Example:
      distill check configs/digits/tdm.yaml
      distill check configs/digits/tdm.yaml method.guidance=2 train.steps=100

    \b
    Exit codes: 0 no FAIL, 2 a FAIL or bad input.
    """
    from distill import check as module
    from distill import config

    cfg = config.load([c for c in configs if "=" not in c], [c for c in configs if "=" in c])
    found = module.check(cfg, runs / cfg.name, allowed(), cfg.engine.devices)
    for finding in found:
        click.echo(str(finding))
    module.refuse(found)


@main.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="How many, one process each.")
@click.option("--gpu", metavar="NAME", help="h100, h200, a100, 4090 ...: sets --memory and --flops.  [default: h100]")
@click.option("--memory", type=click.FloatRange(0, min_open=True), help="GB of each.")
@click.option("--flops", type=click.FloatRange(0, min_open=True), help="Operations a second at most, such as 989e12.")
@click.option("--utilisation", type=click.FloatRange(0, 1, min_open=True), default=0.4, show_default=True,
              help="Share of --flops that is reached.")
@click.option("--batch", is_flag=True, help="Find the largest data.batch_size that fits, too.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the numbers to this file too.")
def plan(configs: tuple[str, ...], gpus: int, gpu: str | None, memory: float | None, flops: float | None,
         utilisation: float, batch: bool, out: Path | None) -> None:  # fmt: skip
    """Bytes a rank for each strategy and layout, hours and disk of the run that CONFIGs describe, before it costs anything.

    No GPU is needed, no weight is built: networks are traced as shapes.

    \b
    Example:
      distill plan configs/bench/dit-12b.yaml --gpus 8 --memory 80
      distill plan configs/digits/tdm.yaml --gpu 4090 --batch
    """
    from distill import config
    from distill import plan as module
    from distill.plan.show import show, write

    if out and out.exists():
        raise BadInput(f"{out} exists; name another file so nothing is overwritten.")
    cfg = config.load([c for c in configs if "=" not in c], [c for c in configs if "=" in c])
    machine = module.machine_of(cfg.engine.precision, gpus, gpu, memory, flops, utilisation)
    found = module.plan(cfg, machine, allowed(), batch)
    if out:
        write(found, out)
    show(found)


@main.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]")
@click.option("--steps", type=click.IntRange(1), default=30, show_default=True, help="Measured steps of each kind.")
@click.option("--layout", type=click.Choice(["full", "shared_base"]), help="Each role its own network, or adapters on one.")
@click.option("--peak", type=click.FloatRange(0, min_open=True), help="TFLOP a second of the device, to give a share of.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the numbers to this JSON file too.")
def bench(configs: tuple[str, ...], steps: int, layout: str | None, peak: float | None, out: Path | None) -> None:
    """Milliseconds a training step by role and phase, beside the same networks' bare work. Nothing is kept of the run.

    configs/bench holds real sizes with random weights: unet-2b (SDXL's), dit-2b, dit-12b.

    \b
    Example:
      distill bench configs/digits/tdm.yaml
      distill bench configs/bench/dit-2b.yaml --layout shared_base --steps 10
      distill bench configs/bench/dit-12b.yaml engine.strategy=fsdp engine.devices=8 --steps 10
    """
    from distill import config
    from distill.engine import launch
    from distill.eval import table

    if out and out.exists():
        raise BadInput(f"{out} exists; name another file so nothing is overwritten.")
    layouts = [f"roles.layout={layout}"] if layout else []
    cfg = config.load([c for c in configs if "=" not in c], [c for c in configs if "=" in c] + layouts)
    if launch.wanted(cfg.engine):
        sys.exit(launch.spawn(cfg.engine.devices))
    from distill import bench as module
    from distill.engine.home import leads

    found = module.bench(cfg, steps, allow=allowed(), peak=peak)
    if out and leads():
        table.write(found, out)
    click.echo(module.markdown(cfg.name, found)) if leads() else None


@main.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/compare"), show_default=True,
              help="Folder of the runs, rows and table.")
@click.option("--seconds", type=click.FloatRange(1), default=360, show_default=True,
              help="Processor seconds of training for each: 360 are three minutes on two cores.")
@click.option("--record", is_flag=True, help="Write the band of a recipe: RUN... RECIPE, three seeds or more.")
def compare(configs: tuple[str, ...], out: Path, seconds: float, record: bool) -> None:
    """Train every CONFIG for the same time and print one table; rows already in OUT are kept.

    With RUN RECIPE: say where the run leaves the band of the recipe's curves and metrics (exit code 1 if it does).

    \b
    Example:
      distill compare configs/digits/tdm.yaml configs/digits/pcm.yaml --seconds 360
      distill compare configs/digits/m*.yaml train.threads=1 --out runs/compare
      distill compare runs/toy-tdm configs/toy/tdm.yaml
      distill compare --record runs/seed-1 runs/seed-2 runs/seed-3 configs/toy/tdm.yaml
    """
    if record or Path(configs[0]).is_dir():
        sys.exit(_bands([Path(c) for c in configs], record))
    from distill.compare import compare as run_all

    files = [Path(c) for c in configs if "=" not in c]
    click.echo(run_all(files, out, seconds, [c for c in configs if "=" in c], allowed()))


def _bands(paths: list[Path], record: bool) -> int:
    """Record a band from runs, or compare one run with it; the exit code."""
    from distill import bands

    *runs, recipe = paths
    if not runs or recipe.is_dir() or not (record or len(runs) == 1):
        raise BadInput("Give RUN RECIPE, or --record RUN RUN RUN RECIPE: run folders first, then one recipe.")
    if record:
        click.echo(f"{bands.record(runs, recipe, allowed())}: written.")
        return 0
    left, notes = bands.compare(runs[0], recipe, allowed())
    for note in notes:
        click.echo(f"note   {note}")
    for departure in left:
        click.echo(f"LEAVES {departure}")
    click.echo(f"{runs[0]}: {'leaves' if left else 'within'} the band of {recipe}.")
    return 1 if left else 0


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--steps", type=click.IntRange(1), default=None, help="Training steps, to override the recipe's.")
def demo(out: Path, steps: int | None) -> None:
    """Distil the shipped digits teacher into a four-step student, measure it, export it; minutes on two CPU cores.

    \b
    Example:
      distill demo
    """
    from distill.demo import demo as go

    sys.exit(go(out, steps))

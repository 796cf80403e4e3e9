"""`distill VERB`: the command line. Heavy imports wait until a verb runs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from distill import __version__
from distill.errors import BadInput


class Verbs(click.Group):
    """A group that shows bad input as one sentence (exit code 2) unless --debug is given."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (BadInput, OSError) as error:
            if ctx.params.get("debug"):
                raise
            where = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
            text = str(error) if isinstance(error, BadInput) else f"{where}; look at its rights and free space."
            click.echo(f"distill: {' '.join(text.split())}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("distill: interrupted.", err=True)
            sys.exit(130)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distill")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--allow", multiple=True, metavar="PACKAGE", help="Let configs name objects of this package too.")
def main(debug: bool, allow: tuple[str, ...]) -> None:
    """Few-step students from diffusion and flow teachers.

    \b
    Example:
      distill data digits data/digits
      distill train configs/digits/tdm.yaml train.steps=400
      distill eval runs/digits-tdm
      distill export runs/digits-tdm student
    """


def _allow() -> tuple[str, ...]:
    return click.get_current_context().find_root().params["allow"]


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
    Exit codes: 0 all steps done, 2 bad input, 130 Ctrl-C, 85 SIGTERM or SIGUSR1: start it again with --resume.
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
    session = run.train(cfg, runs / cfg.name, resume, _allow(), look=gate)
    done = session.method.step
    click.echo(f"{runs / cfg.name}: {done} of {cfg.train.steps} steps done.") if leads() else None
    if done < cfg.train.steps:
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
    found = module.check(cfg, runs / cfg.name, _allow(), cfg.engine.devices)
    for finding in found:
        click.echo(str(finding))
    module.refuse(found)


@main.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("-n", "count", type=click.IntRange(1), default=100, show_default=True, help="Number of samples.")
@click.option("--seed", default=0, show_default=True)
def sample(run_folder: Path, out: Path, count: int, seed: int) -> None:
    """Draw samples of RUN's student into the picture OUT.

    \b
    Example:
      distill sample runs/digits-tdm digits.png -n 50
    """
    from distill import run

    click.echo(f"{run.sample(run_folder, out, count, seed, _allow())}: {count} samples.")


@main.command("eval")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("-n", "samples", type=click.IntRange(2), default=None, help="Samples a row; by default eval.samples.")
def evaluate(run_folder: Path, samples: int | None) -> None:
    """Measure RUN: teacher, training-free solvers and student at each number of evaluations, from the same noise.

    Writes metrics.json and samples.png into RUN.

    \b
    Example:
      distill eval runs/digits-tdm
    """
    from distill import run
    from distill.eval import table

    table.show(run.evaluate(run_folder, samples, _allow()))


@main.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def export(run_folder: Path, out: Path) -> None:
    """Write RUN's student to OUT as a folder that stock diffusers loads, and verify it there.

    \b
    Example:
      distill export runs/digits-tdm student
    """
    from distill import run
    from distill.export.verify import verify

    run.export(run_folder, out, _allow())
    click.echo(f"{out}: loads in stock diffusers, largest difference to our samples {verify(out):.1e}.")


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


@main.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/compare"), show_default=True,
              help="Folder of the runs, rows and table.")
@click.option("--seconds", type=click.FloatRange(1), default=360, show_default=True,
              help="Processor seconds of training for each: 360 are three minutes on two cores.")
def compare(configs: tuple[str, ...], out: Path, seconds: float) -> None:
    """Train every CONFIG for the same time and print one table; rows already in OUT are kept.

    \b
    Example:
      distill compare configs/digits/tdm.yaml configs/digits/pcm.yaml --seconds 360
      distill compare configs/digits/m*.yaml train.threads=1 --out runs/compare
    """
    from distill.compare import compare as run_all

    files = [Path(c) for c in configs if "=" not in c]
    click.echo(run_all(files, out, seconds, [c for c in configs if "=" in c], _allow()))


@main.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE...]")
@click.option("--steps", type=click.IntRange(1), default=30, show_default=True, help="Measured steps of each kind.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the numbers to this JSON file too.")
def bench(configs: tuple[str, ...], steps: int, out: Path | None) -> None:
    """Milliseconds a training step by role and phase, beside the same networks' bare work. Nothing is kept of the run.

    \b
    Example:
      distill bench configs/digits/tdm.yaml
      distill bench configs/bench/fashion.yaml train.threads=2 --steps 50
    """
    from distill import bench as module
    from distill import config
    from distill.eval import table

    if out and out.exists():
        raise BadInput(f"{out} exists; name another file so nothing is overwritten.")
    cfg = config.load([c for c in configs if "=" not in c], [c for c in configs if "=" in c])
    found = module.bench(cfg, steps, allow=_allow())
    if out:
        table.write(found, out)
    click.echo(module.markdown(cfg.name, found))


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--share", "shares", type=click.FloatRange(0, 1), multiple=True,
              help="Of B's weights; several times for a front.  [default: 0, 1/4, 1/2, 3/4, 1]")
@click.option("--samples", type=click.IntRange(2), help="How many; the run's own number by default.")
def merge(a: Path, b: Path, out: Path, shares: tuple[float, ...], samples: int | None) -> None:
    """Mix the weights of two runs' students and measure each mixture; one --share alone is exported too.

    \b
    Example:
      distill merge runs/quality runs/diverse runs/front
      distill merge runs/quality runs/diverse runs/half --share 0.5
    """
    from distill.merge import markdown
    from distill.merge import merge as mix

    click.echo(markdown(mix(a, b, out, shares or (0.0, 0.25, 0.5, 0.75, 1.0), samples, _allow())))


@main.group()
def data() -> None:
    """Write webdataset shards.

    \b
    Example:
      distill data digits data/digits
      distill data images photos/ data/photos --size 64
    """


@data.command("digits")
@click.argument("out", type=click.Path(path_type=Path))
def data_digits(out: Path) -> None:
    """scikit-learn's 1,797 handwritten digits (8x8, ten classes), train and held-out split, to OUT.

    \b
    Example:
      distill data digits data/digits
    """
    from distill.data import write

    write.digits(out)
    click.echo(f"{out}: written.")


@data.command("images")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--size", type=int, default=None, help="Resize the short side and crop to SIZE x SIZE.")
def data_images(src: Path, out: Path, size: int | None) -> None:
    """A folder of images (class from the sub-folder, caption from a .txt beside) to shards in OUT.

    \b
    Example:
      distill data images photos/ data/photos --size 64
    """
    from distill.data import write

    write.images(src, out, size=size)
    click.echo(f"{out}: written.")


@data.command("npz")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--channels", type=click.Choice(["first", "last", "none"]), help="Where they stand, if x does not tell.")
@click.option(
    "--range", "low_high", type=float, nargs=2, default=None, help="LOW HIGH: values that stand for -1 and 1."
)
def data_npz(src: Path, out: Path, channels: str | None, low_high: tuple[float, float] | None) -> None:
    """Arrays `x` and `y` of an .npz file to shards in OUT.

    \b
    Example:
      distill data npz arrays.npz data/arrays
      distill data npz latents.npz data/latents --channels first --range -1 1
    """
    from distill.data import write

    write.npz(src, out, channels=channels, range=low_high)
    click.echo(f"{out}: written.")


@data.command("idx")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def data_idx(src: Path, out: Path) -> None:
    """A folder of MNIST-format idx files (.gz too) to shards in OUT.

    \b
    Example:
      distill data idx fashion_mnist/ data/fashion
    """
    from distill.data import write

    write.idx(src, out)
    click.echo(f"{out}: written.")


@data.command("pairs")
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("-n", "count", type=click.IntRange(1), default=10_000, show_default=True, help="Number of pairs.")
@click.option("--seed", default=0, show_default=True)
def data_pairs(config_file: Path, out: Path, count: int, seed: int) -> None:
    """Noise, and where the teacher's ODE takes it, by the solver and guidance of CONFIG's Reflow, to shards in OUT.

    \b
    Example:
      distill data pairs configs/toy/reflow.yaml data/pairs -n 20000
    """
    from distill import config, run

    run.pairs(config.load([config_file]), out, count, seed, _allow())
    click.echo(f"{out}: {count} pairs.")


if __name__ == "__main__":
    main()

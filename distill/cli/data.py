"""`distill data KIND`: shards out."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from distill.cli.group import allowed, main


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
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="That share the solving.")
def data_pairs(config_file: Path, out: Path, count: int, seed: int, processes: int) -> None:
    """Noise, and where the teacher's ODE takes it, to shards in OUT, by the solver and guidance of CONFIG's method.

    Of a Reflow the two ends are stored, of a Knowledge the path at its grid's times. torchrun and srun share the work too.

    \b
    Example:
      distill data pairs configs/toy/reflow.yaml data/pairs -n 20000
      distill data pairs configs/digits/knowledge.yaml data/paths -n 20000 --processes 2
    """
    from distill import config
    from distill.engine import launch

    cfg = config.load([config_file], [f"engine.devices={processes}"])
    if launch.wanted(cfg.engine):
        sys.exit(launch.spawn(processes))
    from distill import run
    from distill.engine.home import leads

    run.pairs(cfg, out, count, seed, allowed())
    if leads():
        click.echo(f"{out}: {count} pairs.")

"""`distill data`: writes and audits shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from distill.cli.group import allowed, main
from distill.errors import BadInput


@main.group()
def data() -> None:
    """Write webdataset shards.

    \b
    Example:
      distill data digits data/digits
      distill data images photos/ data/photos --size 64
    """


def _print_splits(out: Path, written: dict[str, Any]) -> None:
    """Print the number of samples of each split."""
    click.echo(f"{out}: {', '.join(f'{split} {info.count:,}' for split, info in written.items())} samples.")


@data.command("digits")
@click.argument("out", type=click.Path(path_type=Path))
def data_digits(out: Path) -> None:
    """Write the 8x8 digits of scikit-learn to shards in OUT.

    1,797 handwritten digits of ten classes, as train and test split.

    \b
    Example:
      distill data digits data/digits
    """
    from distill.data import prepare

    _print_splits(out, prepare.digits(out))


@data.command("emoji")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--font", required=True, type=click.Path(path_type=Path), help="NotoColorEmoji.ttf, with colour bitmaps.")
@click.option("--size", type=click.IntRange(1), default=64, show_default=True, help="Height and width in pixels.")
def data_emoji(out: Path, font: Path, size: int) -> None:
    """Draw the emoji of a font with their names as captions.

    OUT gets three sets: OUT/test-combinations holds new combinations of known words, OUT/test-bases emoji of which no variant is
    in OUT/train. The pictures stand under the licence of the font; Noto Color Emoji has the SIL Open Font License 1.1.

    \b
    Example:
      distill data emoji data/emoji --font NotoColorEmoji.ttf
    """
    from distill.data import prepare

    counts = prepare.emoji(out, font, size)
    click.echo(f"{out}: {', '.join(f'{name} {count:,}' for name, count in counts.items())} pictures.")


@data.command("images")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--size", type=int, help="Resize the short side and crop to SIZE x SIZE.")
def data_images(src: Path, out: Path, size: int | None) -> None:
    """Write a folder of images to shards in OUT.

    Classes are sub-folders, captions .txt files beside the images.

    \b
    Example:
      distill data images photos/ data/photos --size 64
    """
    from distill.data import prepare

    _print_splits(out, prepare.images(src, out, size=size))


@data.command("npz")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--channels", type=click.Choice(["first", "last", "none"]), help="Axis of the channels in x; inferred by default."
)
@click.option("--range", "low_high", type=float, nargs=2, default=None, help="LOW HIGH: values that map to -1 and 1.")
def data_npz(src: Path, out: Path, channels: str | None, low_high: tuple[float, float] | None) -> None:
    """Write the arrays `x` and `y` of an .npz file to shards in OUT.

    \b
    Example:
      distill data npz arrays.npz data/arrays
      distill data npz latents.npz data/latents --channels first --range -1 1
    """
    from distill.data import prepare

    _print_splits(out, prepare.npz(src, out, channels=channels, range=low_high))


@data.command("idx")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def data_idx(src: Path, out: Path) -> None:
    """Write a folder of MNIST-format idx files to shards in OUT.

    Compressed files (.gz) are read too.

    \b
    Example:
      distill data idx fashion_mnist/ data/fashion
    """
    from distill.data import prepare

    _print_splits(out, prepare.idx(src, out))


@data.command("pairs")
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("-n", "count", type=click.IntRange(1), default=10_000, show_default=True, help="Number of pairs.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--processes", type=click.IntRange(1), default=1, show_default=True, help="Processes that share the work."
)
def data_pairs(config_file: Path, out: Path, count: int, seed: int, processes: int) -> None:
    """Write pairs of noise and the teacher's ODE solution to OUT.

    Solver and guidance are those of CONFIG's method. Reflow stores the ends of each path, Knowledge the path at the
    times of its grid. Under torchrun or srun the ranks share the work.

    \b
    Example:
      distill data pairs toy/reflow data/pairs -n 20000
      distill data pairs digits/knowledge data/paths -n 20000 --processes 2
    """
    from distill import config
    from distill.training import launch

    cfg = config.load([config_file], [f"engine.devices={processes}"])
    if launch.needs_spawn(cfg.engine):
        sys.exit(launch.spawn_processes(processes))
    from distill.training.run_folder import is_rank_zero

    solve_pairs(cfg, out, count, seed, allowed())
    if is_rank_zero():
        click.echo(f"{out}: {count} pairs.")


def solve_pairs(cfg: Any, out: Path, count: int, seed: int = 0, allow: tuple[str, ...] = ()) -> None:
    """Write `count` pairs to OUT, solved as by the config's method during training; ranks share the work."""
    import torch

    from distill.data import pairs
    from distill.training import launch
    from distill.training.experiment import build_experiment

    world = launch.join_processes(cfg.engine)
    experiment = build_experiment(cfg, allow)
    method = experiment.method
    if not hasattr(method, "path"):
        raise BadInput(
            f"{type(method).__name__} does not train on pairs: give a recipe of distill.methods.Reflow "
            "or distill.methods.Knowledge."
        )
    method.to("cuda" if torch.cuda.is_available() else "cpu")
    ranks = {}
    if world > 1:
        ranks = {"rank": torch.distributed.get_rank(), "world": world, "barrier": torch.distributed.barrier}
    pairs.write(
        out,
        method.path,
        method.teacher,
        count,
        method.shape,
        times=method.path_times,
        classes=experiment.data.info.classes,
        about=f"{type(method.solver).__name__} in {len(method.times) - 1} steps, w = {method.guidance:g}",
        seed=seed,
        **ranks,
    )


def _parse_size(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """SIZE or HxW."""
    if value is None:
        return None
    sides = value.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise BadInput(f"--size {value}: give one number, such as 512, or height x width, such as 480x832.")
    return int(sides[0]), int(sides[-1])


_ENCODE_OPTIONS = (
    click.option("--pipeline", required=True, help="The teacher's diffusers folder, or its id on the hub."),
    click.option("--size", callback=_parse_size, help="Pixels: SIZE or HxW; the pipeline's own by default."),
    click.option("--frames", type=click.IntRange(1), help="Number of frames of each video, from its beginning."),
    click.option(
        "--dtype",
        type=click.Choice(["float16", "float32"]),
        default="float16",
        show_default=True,
        help="Of the stored latents and embeddings.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        show_default=True,
        help="Of the encoders' weights during encoding.",
    ),
    click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Samples encoded at once."),
    click.option("--length", type=click.IntRange(1), help="Tokens of a prompt; the pipeline's own by default."),
    click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes."),
    click.option("--per-shard", type=click.IntRange(1), default=1000, show_default=True, help="Samples in a shard."),
    click.option(
        "--test",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.0,
        show_default=True,
        help="Share held out as OUT/test.",
    ),
    click.option("--seed", default=0, show_default=True, help="Of the stored order."),
)


def _encode_options(command):
    """The options common to `encode` and `prompts`."""
    for option in reversed(_ENCODE_OPTIONS):
        command = option(command)
    return command


def _encode(src, out, pipeline, workers, size, frames, per_shard, test, seed, buckets=False, caption=None, **options):
    from distill.data.encode import EncodeConfig, encode
    from distill.data.sources.plan import SourceSettings

    source = SourceSettings(size, 1, frames, buckets, caption, per_shard, test, seed)
    written = encode(EncodeConfig(src, out, pipeline, source, **options), workers, click.echo)
    for folder, info in (written or {}).items():
        moments = f", mean {info.mean:.3f}, standard deviation {info.std:.3f}" if info.samples else ""
        conditions = ", ".join(f"{name} {member.shape}" for name, member in info.members.items())
        conditions = f"; {conditions}" if conditions else ""
        click.echo(f"{out / folder}: {info.count} samples of {info.shape}{moments}{conditions}.")


@data.command("encode")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@_encode_options
@click.option("--buckets", is_flag=True, help="Sort images into a few heights and widths of the area of --size.")
@click.option("--caption", help="For samples without a .txt; {class} is the name of their folder, '' the empty prompt.")
@click.option("--skip-bad", is_flag=True, help="Leave out what cannot be read, and list it in OUT/skipped.txt.")
def data_encode(src: Path, out: Path, **options) -> None:
    """Encode images, video or sound to shards of latents in OUT.

    Captions become text embeddings. SRC is a folder of images, of .npy arrays (video uint8 (F, H, W, 3), sound float
    (C, L)), or of image shards. A caption is the .txt of the same name beside a file. If the command is interrupted,
    repeat it to continue. Under torchrun or srun each process does its share.

    \b
    Example:
      distill data encode photos/ data/sd15 --pipeline sd15/ --workers 4
      distill data encode photos/ data/sdxl --pipeline sdxl/ --buckets
    """
    if src.is_file():
        raise BadInput(f"{src} is a file: give a folder, or encode a list of prompts by `distill data prompts`.")
    _encode(src, out, **options)


@data.command("prompts")
@click.argument("src", metavar="FILE", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@_encode_options
def data_prompts(src: Path, out: Path, **options) -> None:
    """Encode prompts to shards of text embeddings in OUT.

    FILE is .txt (one prompt per line) or .tsv, .csv (column Prompt). For methods that need no images. --size is that of
    the samples that the method will generate.

    \b
    Example:
      distill data prompts prompts.txt data/prompts --pipeline checkpoints/sd15
    """
    if src.is_dir():
        raise BadInput(f"{src} is a folder: give a file of prompts, or encode the folder by `distill data encode`.")
    _encode(src, out, **options)


@data.command("audit")
@click.argument("src", metavar="SHARDS", type=click.Path(path_type=Path))
@click.option("--pipeline", help="The teacher's folder: compare fingerprints, sizes and scale of the latents.")
def data_audit(src: Path, pipeline: str | None) -> None:
    """Read every sample of SHARDS and report statistics and errors.

    SHARDS is a split or a folder of splits.

    \b
    Example:
      distill data audit data/sd15 --pipeline checkpoints/sd15

    Exit codes: 0 no errors, 2 errors.
    """
    from distill.data.audit import audit, render

    reports = audit(src, pipeline)
    click.echo(render(reports))
    sys.exit(2 if any(report.errors for report in reports) else 0)

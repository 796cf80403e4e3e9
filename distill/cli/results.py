"""Verbs that take a run or its results: sample, eval, score, report, export, verify, push, merge."""

from __future__ import annotations

from pathlib import Path

import click

from distill.cli.group import allowed, main
from distill.errors import BadInput

DTYPES = ("float32", "bfloat16", "float16")


@main.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("-n", "count", type=click.IntRange(1), help="Number of samples.  [default: one per prompt, or 100]")
@click.option("--seed", default=0, show_default=True)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Prompt; give it several times for several.")
@click.option(
    "--prompts", "file", type=click.Path(path_type=Path), help="File of prompts: .txt (one per line), .tsv, .csv."
)
@click.option("--label", "labels", type=int, multiple=True, help="Class label; give it several times for several.")
@click.option("--device", help="As cpu, cuda or cuda:1.  [default: an accelerator if there is one]")
@click.option("--dtype", type=click.Choice(DTYPES), default=DTYPES[0], show_default=True, help="Of the weights.")
@click.option("--batch-size", type=click.IntRange(1), help="Samples of one call.")
def sample(
    run_folder: Path,
    out: Path,
    count: int | None,
    seed: int,
    prompts: tuple[str, ...],
    file: Path | None,
    labels: tuple[int, ...],
    device: str | None,
    dtype: str,
    batch_size: int | None,
) -> None:
    """Draw samples of RUN's student into a folder or one picture.

    OUT is a folder, or with the ending .png one picture of all samples. The images of a folder are named by index, seed
    and label, and have their prompt beside them as .txt.

    \b
    Example:
      distill sample runs/digits-tdm digits.png -n 50
      distill sample runs/digits-tdm sevens -n 1000 --label 7 --batch-size 250
      distill sample runs/sdxl-lcm cats --prompt "a cat" -n 8 --dtype bfloat16
    """
    from distill.data.sources import text
    from distill.inspect import results

    texts = [*prompts, *(text.prompts(file) if file else [])]
    how = {"prompts": texts, "labels": labels, "device": device, "dtype": dtype, "batch_size": batch_size}
    written = results.sample(run_folder, out, count, seed, allowed(), **how)
    click.echo(f"{written}: {count or len(texts) or 100} samples.")


@main.command("eval")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("-n", "samples", type=click.IntRange(2), default=None, help="Samples per row; by default eval.samples.")
def evaluate(run_folder: Path, samples: int | None) -> None:
    """Measure the student of RUN beside its teacher.

    Teacher, the ODE solvers of distill on the teacher, and student start from the same noise, at each number of network
    evaluations. Writes metrics.json and samples.png into RUN.

    \b
    Example:
      distill eval runs/digits-tdm
    """
    from distill.inspect import results
    from distill.metrics import table

    table.show(results.evaluate(run_folder, samples, allowed()))


@main.command("score")
@click.argument("given", nargs=-1, required=True, metavar="SAMPLES [REFERENCE] [NAME.KEY=VALUE...]")
@click.option("--metrics", "names", help="Names with commas: fid, kid, fd_dinov2, kd_dinov2, clip_score, fd, ...")
def score_images(given: tuple[str, ...], names: str | None) -> None:
    """Measure images against reference images.

    SAMPLES and REFERENCE are folders of images or shards; REFERENCE may be a file of statistics too.

    \b
    Example:
      distill score out/ photos/ --metrics fid,kid fid.weights=inception.pth
      torchrun --nproc-per-node 8 -m distill.cli score out/ photos/ --metrics fid
    """
    from distill.config.schema import Engine
    from distill.metrics.folders import metric_settings, score
    from distill.training import launch
    from distill.training.run_folder import is_rank_zero

    paths = [Path(g) for g in given if "=" not in g]
    if not 1 <= len(paths) <= 2:
        raise BadInput(f"Give one or two paths, of samples and of what they are measured against, not {len(paths)}.")
    if launch.launched_externally():
        launch.join_processes(Engine())
    found = score(*paths, *[None] * (2 - len(paths)), metric_settings(names, [g for g in given if "=" in g]), allowed())
    if is_rank_zero():
        for name, value in found.items():
            click.echo(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")


@main.command()
@click.argument("run_folders", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True)
@click.option("--quick", is_flag=True, help="Measure nothing: show what was measured before.")
@click.option(
    "--evaluations", help="Numbers of evaluations of the solvers of diffusers, as 2,4,8; by default eval.evaluations."
)
@click.option(
    "-n", "samples", type=click.IntRange(2), help="Samples of each solver of diffusers; by default eval.samples."
)
def report(run_folders: tuple[Path, ...], out: Path, quick: bool, evaluations: str | None, samples: int | None) -> None:
    """Write one self-contained HTML page on one or several runs.

    It has samples, quality against cost, training curves, cost and settings. Missing measurements are made first and
    saved in RUN, as metrics.json and report.json.

    \b
    Example:
      distill report runs/digits-tdm -o report.html
      distill report runs/digits-tdm runs/digits-dmd2 -o both.html --quick
    """
    from distill.inspect.report import report as write

    try:
        nfes = [int(n) for n in evaluations.split(",")] if evaluations else None
    except ValueError:
        raise BadInput(f"--evaluations '{evaluations}' is not a list of numbers; write it as 2,4,8.") from None
    click.echo(f"{write(run_folders, out, quick, nfes, samples, allowed())}: written.")


@main.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--as",
    "kind",
    type=click.Choice(["pipeline", "lora", "single-file", "onnx"]),
    default="pipeline",
    show_default=True,
    help="A diffusers folder, a LoRA, the network as one file, or ONNX.",
)
@click.option("--licence", "--license", help="Of the weights, as the hub names it; that of the teacher by default.")
@click.option("--dtype", type=click.Choice(DTYPES), default=DTYPES[0], show_default=True, help="Of the weights.")
@click.option("--device", help="That draws and verifies, as cpu or cuda.  [default: an accelerator if there is one]")
def export(run_folder: Path, out: Path, kind: str, licence: str | None, dtype: str, device: str | None) -> None:
    """Export the student of RUN to OUT and verify the export.

    For stock diffusers, ComfyUI or onnxruntime, by --as.

    \b
    Example:
      distill export runs/digits-tdm student
      distill export runs/sdxl-lcm lcm-lora --as lora
      distill export runs/flux-tdm student --dtype bfloat16
    """
    from distill.export.verify import verify
    from distill.inspect import drawing, results

    device = drawing.choose_device(device)
    results.export_run(run_folder, out, allowed(), kind, licence, dtype=dtype, device=device)
    verify(out, device=device)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=None,
    help="Another number of steps than that of training: the difference is printed, not judged.",
)
@click.option("--base", default="", help="Path of the base of a LoRA or a single file, if it was moved.")
@click.option("--device", default="cpu", show_default=True, help="Device that samples, as cpu or cuda.")
def verify(out: Path, steps: int | None, base: str, device: str) -> None:
    """Sample from the export OUT in a process without distill.

    The samples are compared with the trainer's own. Exit code 0 if they agree to 1e-4 (weights in float16: 1e-2, in
    bfloat16: 5e-2), else 2.

    \b
    Example:
      distill verify student
    """
    from distill.export.verify import verify as prove

    prove(out, steps, base, device)


@main.command()
@click.argument("out", metavar="EXPORT", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Create a private repository.")
@click.option("--revision", metavar="BRANCH", help="Upload to this branch instead of main.")
def push(out: Path, repo: str, private: bool, revision: str | None) -> None:
    """Upload EXPORT to the Hugging Face hub, as the model OWNER/NAME.

    \b
    Example:
      distill push student me/digits-4-steps --private
    """
    from distill.export.push import push as upload

    click.echo(f"{out}: uploaded to {upload(out, repo, private, revision)}.")


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--share",
    "shares",
    type=click.FloatRange(0, 1),
    multiple=True,
    help="Share of B's weights; give it several times for runs.  [default: 0, 1/4, 1/2, 3/4, 1]",
)
@click.option("--weight", hidden=True, multiple=True)
@click.option("--samples", type=click.IntRange(2), help="How many; the run's own number by default.")
def merge(a: Path, b: Path, out: Path, shares: tuple[float, ...], weight: tuple[str, ...], samples: int | None) -> None:
    """Interpolate the weights of two students A and B.

    Both are runs, exports or LoRA files. Runs: every --share is measured for the quality-diversity trade-off, and a
    single one is exported too.

    \b
    Example:
      distill merge runs/quality runs/diverse runs/tradeoff
      distill merge runs/quality runs/diverse runs/half --share 0.5
      distill merge quality-lora diverse-lora half-lora --share 0.5
      distill merge fast.safetensors style.safetensors both.safetensors
    """
    from distill.inspect.frontier import interpolate_exports, interpolate_runs, tradeoff_table

    if weight:
        raise BadInput(f"--weight is --share now: give --share {weight[0]}.")
    if interpolate_exports(a, b, out, shares):
        click.echo(f"{out}: {1 - shares[0]:g} x {a.name} + {shares[0]:g} x {b.name}.")
        return
    click.echo(tradeoff_table(interpolate_runs(a, b, out, shares or (0.0, 0.25, 0.5, 0.75, 1.0), samples, allowed())))

"""Interpolate two students of one teacher, measure the quality-diversity trade-off, and export a point of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.files import markdown_table, write_json, write_text
from distill.inspect.measure import evaluation_of
from distill.inspect.results import write_export
from distill.losses.diversity import interpolate
from distill.models.lora import LoRAAdapter
from distill.training.load import load_experiment


def interpolate_runs(
    a: Path, b: Path, out: Path, shares: Sequence[float], samples: int | None = None, allow: tuple[str, ...] = ()
) -> list[dict[str, float]]:
    """Measure the interpolated students W = (1 - share) W_a + share W_b of two runs; write `out/tradeoff.json` and `.md`.

    https://arxiv.org/abs/2410.06084. All points have the same noise and labels, at the number of steps of run a. With
    one share alone, the student is exported to `out/student` too, if its network has a stock class.

    Adapters of one base are interpolated by their products B A, not by their factors (`export.blend`).

    Returns:
        for each share its metrics.

    Raises:
        BadInput: `out` exists, the runs differ in their networks or steps, or a share leaves [0, 1].
    """
    a, b, out = Path(a), Path(b), Path(out)
    if out.exists():
        raise BadInput(f"{out} exists; name another folder so nothing is overwritten.")
    experiment, second = load_experiment(a, allow), load_experiment(b, allow)
    method = experiment.method
    if method.grid != second.method.grid or method.serving != second.method.serving:
        raise BadInput(f"{a} and {b} have different grids or samplers; interpolate two students of one recipe.")
    set_share = _interpolation(method.ema, second.method.ema)
    evaluation, rows = evaluation_of(experiment, experiment.suite(), samples), []
    for share in shares:
        set_share(share)
        x = evaluation.draw(evaluation.student_sampler(method.grid.steps))
        rows.append({"share": share} | evaluation.score(x))
    out.mkdir(parents=True)
    write_json(out / "tradeoff.json", rows)
    write_text(out / "tradeoff.md", tradeoff_table(rows))
    if len(shares) == 1:
        write_export(experiment, out / "student", None)
    return rows


def interpolate_exports(a: Path, b: Path, out: Path, shares: Sequence[float]) -> bool:
    """Interpolate two exported folders, or two LoRA files, into `out`; exports are verified. False for two runs.

    Raises:
        BadInput: `out` exists, not one share is given, or the two do not fit each other.
    """
    kinds = [("file" if p.is_file() else "export" if (p / "distill.json").is_file() else "run") for p in (a, b)]
    if kinds == ["run", "run"]:
        return False
    if kinds[0] != kinds[1]:
        article = {"file": "a file", "export": "an export", "run": "a run"}
        raise BadInput(f"{a} is {article[kinds[0]]} and {b} {article[kinds[1]]}: give two of a kind.")
    if out.exists():
        raise BadInput(f"{out} exists; name another so nothing is overwritten.")
    if len(shares) != 1:
        raise BadInput("Exports have no data to be measured on: give one --share, that of the second.")
    from distill.export import blend
    from distill.export.verify import verify

    if kinds[0] == "file":
        blend.merge_files(a, b, out, shares[0])
    else:
        verify(blend.merge_folders(a, b, out, shares[0]))
    return True


def _interpolation(first: Denoiser, second: Denoiser) -> Callable[[float], None]:
    """A function that sets `first` to (1 - share) first + share second; for adapters the products B A are interpolated."""
    if isinstance(first.net, LoRAAdapter):
        from distill.export import blend

        if not isinstance(second.net, LoRAAdapter):
            raise BadInput("One run trains an adapter and the other a whole network: merge their exported pipelines.")
        start, end = copy.deepcopy(first.net), second.net

        def join(share: float) -> None:
            first.net = copy.deepcopy(start)
            blend.merge_adapters(first.net, end, share)

        return join
    ends = tuple({k: v.clone() for k, v in network.state_dict().items()} for network in (first, second))
    return lambda share: first.load_state_dict(interpolate(*ends, share))


def tradeoff_table(points: list[dict[str, float]]) -> str:
    """A table with one row per share."""
    return markdown_table(list(points[0]), [[f"{value:.3g}" for value in point.values()] for point in points])

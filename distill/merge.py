"""Two students of one teacher, mixed: the front between quality and diversity, measured, and a point of it exported."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from distill import run
from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.losses.diversity import interpolate
from distill.nets.lora import Adapter


def merge(a: Path, b: Path, out: Path, shares: Sequence[float], samples: int | None = None,
          allow: tuple[str, ...] = ()) -> list[dict[str, float]]:
    """Measure the averaged students (1 - share) a + share b of two runs; write `out/front.json` and `out/front.md`.

    https://arxiv.org/abs/2410.06084. All points see the same noise and labels, at the number of steps of run a. With
    one share alone, the student is exported to `out/student` too, if its network has a stock class.

    Adapters of one base are mixed by their products B A, not by their factors (`export.blend`).

    Returns:
        for each share its metrics.

    Raises:
        BadInput: `out` exists, the runs differ in their networks or steps, or a share leaves [0, 1].
    """
    a, b, out = Path(a), Path(b), Path(out)
    if out.exists():
        raise BadInput(f"{out} exists; name another folder so nothing is overwritten.")
    session, other = run.open_run(a, allow), run.open_run(b, allow)
    method = session.method
    if method.grid != other.method.grid or method.serving != other.method.serving:
        raise BadInput(f"{a} and {b} walk other grids or in other ways; merge two students of one recipe.")
    mix, tests, front = _mixing(method.ema, other.method.ema), session.suite(), []
    z, cond = session.noise(samples or session.cfg.eval.samples, session.cfg.eval.seed)
    for share in shares:
        mix(share)
        seeded = torch.Generator().manual_seed(session.cfg.eval.seed)
        x = run.batched(lambda z, c: method.sample(z, c, generator=seeded), z, cond, method)  # noqa: B023
        front.append({"share": share} | tests.score(x, cond))
    out.mkdir(parents=True)
    (out / "front.json").write_text(json.dumps(front, indent=2) + "\n")
    (out / "front.md").write_text(markdown(front))
    if len(shares) == 1:
        run.write_export(session, out / "student", None)
    return front


def exported(a: Path, b: Path, out: Path, shares: Sequence[float]) -> bool:
    """Mix two exported folders, or two LoRA files, into `out`, and verify it where that can be; False for runs.

    Raises:
        BadInput: `out` exists, not one share is given, or the two do not fit each other.
    """
    kinds = [("file" if p.is_file() else "export" if (p / "distill.json").is_file() else "run") for p in (a, b)]
    if kinds == ["run", "run"]:
        return False
    if kinds[0] != kinds[1]:
        raise BadInput(f"{a} is a{'n' * (kinds[0] == 'export')} {kinds[0]} and {b} a{'n' * (kinds[1] == 'export')} "
                       f"{kinds[1]}: merge two of a kind.")
    if out.exists():
        raise BadInput(f"{out} exists; name another so nothing is overwritten.")
    if len(shares) != 1:
        raise BadInput("Exports have no data to be measured on: give one --weight, the share of the second.")
    from distill.export import blend
    from distill.export.verify import verify

    if kinds[0] == "file":
        blend.files(a, b, out, shares[0])
    else:
        verify(blend.folders(a, b, out, shares[0]))
    return True


def _mixing(ours: Denoiser, theirs: Denoiser) -> Callable[[float], None]:
    """A function that makes `ours` (1 - share) ours + share theirs, of adapters by the change of weights that they make."""
    if isinstance(ours.net, Adapter):
        from distill.export import blend

        if not isinstance(theirs.net, Adapter):
            raise BadInput("One run trains an adapter and the other a whole network: merge their exported pipelines.")
        start, other = copy.deepcopy(ours.net), theirs.net

        def join(share: float) -> None:
            ours.net = copy.deepcopy(start)
            blend.join(ours.net, other, share)

        return join
    ends = tuple({k: v.clone() for k, v in end.state_dict().items()} for end in (ours, theirs))
    return lambda share: ours.load_state_dict(interpolate(*ends, share))


def markdown(front: list[dict[str, float]]) -> str:
    """A line for each share."""
    names = list(front[0])
    lines = [names, ["---"] * len(names), *([f"{point[name]:.3g}" for name in names] for point in front)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

"""Two students of one teacher, mixed: the front between quality and diversity, measured, and a point of it exported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from distill import run
from distill.errors import BadInput
from distill.losses.diversity import interpolate


def merge(a: Path, b: Path, out: Path, shares: Sequence[float], samples: int | None = None,
          allow: tuple[str, ...] = ()) -> list[dict[str, float]]:
    """Measure the averaged students (1 - share) a + share b of two runs; write `out/front.json` and `out/front.md`.

    https://arxiv.org/abs/2410.06084. All points see the same noise and labels, at the number of steps of run a. With
    one share alone, the student is exported to `out/student` too, if its network has a stock class.

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
    ends, tests, front = (method.ema.state_dict(), other.method.ema.state_dict()), session.suite(), []
    ends = tuple({k: v.clone() for k, v in end.items()} for end in ends)
    z, cond = session.noise(samples or session.cfg.eval.samples, session.cfg.eval.seed)
    for share in shares:
        method.ema.load_state_dict(interpolate(*ends, share))
        seeded = torch.Generator().manual_seed(session.cfg.eval.seed)
        x = run.batched(lambda z, c: method.sample(z, c, generator=seeded), z, cond, method)  # noqa: B023
        front.append({"share": share} | tests.score(x, cond))
    out.mkdir(parents=True)
    (out / "front.json").write_text(json.dumps(front, indent=2) + "\n")
    (out / "front.md").write_text(markdown(front))
    if len(shares) == 1:
        run.write_export(session, out / "student", None)
    return front


def markdown(front: list[dict[str, float]]) -> str:
    """A line for each share."""
    names = list(front[0])
    lines = [names, ["---"] * len(names), *([f"{point[name]:.3g}" for name in names] for point in front)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

"""Whether networks compute finite numbers at every noise level, in the precision of the run."""

from __future__ import annotations

import torch

from distill.denoise import has_network, network_of
from distill.inspect.check.base import CheckContext, Finding, Findings, autocast

TIMES = (0.02, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)
GRID = 8  # times of the student's grid, which are tried besides


@torch.no_grad()
def finite(context: CheckContext) -> Findings:
    """Outputs of every network from data to noise, and at the student's own times."""
    method, precision, wrong = context.method, str(context.cfg.engine.precision), False
    method.eval()
    x, cond = context.samples(2)
    grid = [t for t in method.grid.times if t > 0]
    times = sorted({*TIMES, *grid[:: max(1, len(grid) // GRID)]})
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x)
    names = [role for role in (*method.frozen, *method.trainable) if has_network(getattr(method, role))]
    if not names or not bool(torch.isfinite(x).all()):
        yield Finding.skipped("it needs a network and samples that are finite.")
        return
    for role in names:
        denoiser, bad = getattr(method, role), []
        net = network_of(denoiser)
        for time in times:
            t = torch.full((len(x),), time, device=x.device)
            inputs = ({"w": torch.full_like(t, float(method.guidance))} if net.guided else {}) | (
                {"s": 0.5 * t} if net.flow_map else {}
            )
            with autocast(context):
                out = denoiser.native(denoiser.schedule.add_noise(x, t, z), t, **cond, **inputs)
            if not bool(torch.isfinite(out).all()):
                bad.append(time)
        if bad:
            wrong = True
            where = "at every t" if len(bad) == len(times) else f"at t = {bad[0]:.2g} to {bad[-1]:.2g}"
            mend = {
                "16": "numbers above 65504 overflow in float16; set engine.precision to bf16 or 32",
                "bf16": "set engine.precision to 32, and look at its weights if that does not help",
            }.get(precision, "look at its weights and inputs")
            yield Finding.fail(f"roles.{role} returns infinity or NaN {where} (engine.precision: {precision}); {mend}.")
    if not wrong:
        yield Finding.ok(f"{', '.join(names)} are finite from t = {times[0]:g} to {times[-1]:g}.")

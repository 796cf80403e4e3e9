"""Tiny methods, and the two processes that train them under every strategy: `python places.py FOLDER STRATEGY...`."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from distill import methods
from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.models.small import MLP, Transformer
from distill.noise import RectifiedFlow
from distill.training.placement.choose import build_placement

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
WORLD, STEPS, HALF, BATCH = 2, 20, 10, 6


def mlp(**extra):
    return Denoiser(MLP(dim=2, width=10, depth=1, **extra), RectifiedFlow(), "flow")


def vit():
    net = Transformer(size=4, channels=1, patch=2, width=16, depth=1, heads=2)
    torch.nn.init.normal_(net.leave.weight, std=0.1)
    for block in net.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.1)
    return Denoiser(net, RectifiedFlow(), "flow")


class Score:
    """A smooth metric."""

    def __call__(self, x, data=None, **cond):
        return -(x - 1).square().flatten(1).sum(1)


def consistency(optim):
    return methods.Consistency(
        {"teacher": vit(), "student": vit()}, grid=2, intervals=8, optim=optim("student"), ema=0.9
    )


def tdm(optim):
    net = mlp()
    roles = {"teacher": mlp(), "student": net, "critic": copy.deepcopy(net)}
    return methods.TDM(roles, grid=2, guidance=1.5, student_every=2, optim=optim("student", "critic"), ema=0.9)


def dmd2(optim):
    roles = {"teacher": mlp(), "student": mlp(), "critic": mlp()}
    return methods.DMD2(
        roles,
        grid=2,
        student_every=2,
        adversarial=0.1,
        layers="blocks.0.second",
        ema=0.9,
        optim=optim("student", "critic", "head"),
    )


def dpo(optim):
    roles = {"teacher": mlp(), "student": mlp()}
    return methods.DistillationDPO(
        roles,
        metric=Score(),
        grid=2,
        student_every=2,
        prefer=0.3,
        ema=0.9,
        optim=optim("student", "critic", "winner"),
    )


def scm(optim):
    net = mlp()
    return methods.SCM(
        {"teacher": net, "student": copy.deepcopy(net)}, warm_up=10, ema=0.9, optim=optim("student", "balance")
    )


METHODS = {"consistency": consistency, "tdm": tdm, "dmd2": dmd2, "dpo": dpo}
OTHERS = {"scm": scm}


def build(name: str):
    """The same weights in every process; moments with an eps that does not magnify rounding."""
    torch.manual_seed(7)
    method = (METHODS | OTHERS)[name](lambda *roles: {r: {"lr": 1e-2, "clip": 0.5, "eps": 1e-4} for r in roles})
    method.shared.manual_seed(3)
    method.total_steps = STEPS
    return method.train()


def batch(method, step: int, rank: int, part: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * part + rank)
    return {"x": torch.randn(BATCH, *method.shape, generator=generator)}


def engine(strategy: str, **keywords):
    fields = {
        "accumulate": 1,
        "precision": "32",
        "deepspeed": None,
        "offload_optimizer": False,
        "offload_parameters": False,
    }
    return SimpleNamespace(strategy=strategy, **fields | keywords)


def placed(name: str, strategy: str, rank: int, **keywords):
    method = build(name)
    method.placement = build_placement(engine(strategy, **keywords), WORLD)
    method.configure_optimizers()
    torch.manual_seed(100 + rank)
    return method


def advance(method, rank: int, until: int) -> None:
    while method.step < until:
        parts = [batch(method, method.step, rank, part) for part in range(method.placement.accumulate)]
        method.training_step({"x": torch.cat([p["x"] for p in parts])})


def networks(method) -> dict[str, dict[str, torch.Tensor]]:
    names = (*method.trainable, *method.frozen, *method._averages)
    return copy.deepcopy({n: method.placement.weights(n) for n in names})


def train(name: str, strategy: str, rank: int, **keywords) -> dict:
    """Twenty steps; ten more from the state at ten; what a stranger to ranks sees of it."""
    method = placed(name, strategy, rank, **keywords)
    advance(method, rank, HALF)
    state = copy.deepcopy(method.snapshot())
    advance(method, rank, STEPS)
    out = {"networks": networks(method), "state": state, "logs": {k: float(v) for k, v in method.logs.items()}}
    z = torch.randn(5, *method.shape, generator=torch.Generator().manual_seed(0))
    out["sample"] = method.eval().sample(z, {}, generator=torch.Generator().manual_seed(0))
    torch.save(state, f"state-{rank}.pt") if rank == 0 else None
    torch.distributed.barrier()
    again = placed(name, strategy, rank, **keywords)
    again.restore(torch.load("state-0.pt", weights_only=True))  # as a run does: from what rank 0 wrote
    advance(again, rank, STEPS)
    return out | {"resumed": networks(again)}


def disagree(strategy: str, rank: int) -> str:
    method = placed("tdm", strategy, rank)
    advance(method, rank, 2)
    method.shared.manual_seed(rank)
    try:
        advance(method, rank, 4)
    except BadInput as error:
        return str(error)
    return ""


def main(folder: Path, strategies: list[str]) -> None:
    import os

    os.chdir(folder)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for strategy in strategies:
        began, found = time.monotonic(), {}
        for name in os.environ.get("ONLY", " ".join(METHODS)).split():
            found[name] = train(name, strategy, rank)
            print(strategy, name, f"{time.monotonic() - began:.1f} s", flush=True)
        found["accumulated"] = train("dpo", strategy, rank, accumulate=2)
        if strategy == "ddp":
            found["scm"] = train("scm", strategy, rank, accumulate=2)
        found["disagreement"] = disagree(strategy, rank)
        found["seconds"] = time.monotonic() - began
        torch.save(found, folder / f"{strategy}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])

"""What `engine` offers besides a strategy, tried on two processes: `python features.py FOLDER FEATURE...`."""

from __future__ import annotations

import copy
import functools
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import places
import torch
from torch import nn

from distill import methods
from distill.config.schema import Engine
from distill.denoise import Denoiser
from distill.methods.base import Method
from distill.models.copies import share_weights
from distill.models.lora import apply_layout
from distill.noise import RectifiedFlow, Table
from distill.training.trainer import equip

STEPS, HALF = 4, 2
DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}
ADAM = {"lr": 1e-2, "clip": 0.5, "eps": 1e-4}


def tdm(optim: dict[str, dict[str, Any]], layout: str = "full") -> Method:
    """Two trained transformers; the student takes every second turn."""
    roles = {"teacher": places.vit()}
    apply_layout(roles, layout, {"rank": 2} if layout != "full" else None)
    method = methods.TDM(roles, grid=2, guidance=1.5, student_every=2, optim=optim, ema=0.9)
    for role in method.trainable if layout != "full" else ():  # adapters that do something from the first step on
        for up in getattr(method, role).net.up:
            nn.init.normal_(up, std=0.1)
    method.ema.load_state_dict(method.student.state_dict())
    return method


def small() -> Method:
    return methods.Consistency(
        {"teacher": places.mlp(), "student": places.mlp()}, grid=2, intervals=8, optim={"student": ADAM}, ema=0.9
    )


def stock() -> Method:
    """diffusers' DiT, whose last layer calls the embedding of its first block."""
    from distill.models.diffusers import DiT

    net = DiT(size=4, channels=1, patch=2, width=16, depth=2, heads=2, classes=2)
    roles = {"teacher": Denoiser(net, Table.of(RectifiedFlow()), "v")}
    return methods.TDM(roles, grid=2, student_every=2, optim=BOTH, ema=0.9)


def scm(jvp: str) -> Method:
    """Its loss differentiates the student along a direction."""
    return methods.SCM(
        {"teacher": places.mlp(), "student": places.mlp()},
        warm_up=2,
        ema=0.9,
        jvp=jvp,
        optim={"student": ADAM, "balance": ADAM},
    )


BOTH = {"student": ADAM, "critic": ADAM}
METHODS = {
    "plain": functools.partial(tdm, BOTH),
    # SGD's step is as long as its gradient, so it shows how that was clipped
    "clip": functools.partial(
        tdm, {"student": {"name": "SGD", "lr": 0.1, "clip": 0.02}, "critic": {"name": "SGD", "lr": 0.01, "clip": 0.0}}
    ),
    "lora": functools.partial(tdm, BOTH, "shared_base"),
    "small": small,
    "stock": stock,
    "scm": functools.partial(scm, "forward"),
    "scm, difference": functools.partial(scm, "difference"),
}
REFERENCES = {  # what one process trains: method, micro-batches, precision
    "plain": ("plain", 1, "32"),
    "clip": ("clip", 1, "32"),
    "lora": ("lora", 1, "32"),
    "two": ("plain", 2, "32"),
    "bf16": ("plain", 1, "bf16"),
    "16": ("plain", 1, "16"),
    "small": ("small", 1, "32"),
    "stock": ("stock", 1, "32"),
    "scm": ("scm", 1, "32"),
    "scm, difference": ("scm, difference", 1, "32"),
}
EVERY = ("ddp", "fsdp", "zero1", "zero2", "zero3")
CASES = {  # feature: strategies, settings of the engine, method, reference
    "clip": (("ddp", "fsdp", "zero2"), {}, "clip", "clip"),
    "lora": (EVERY, {}, "lora", "lora"),
    "lora, recompute": (EVERY, {"checkpoint_activations": True}, "lora", "lora"),
    "recompute, accumulate": (EVERY[:-1], {"checkpoint_activations": True, "accumulate": 2}, "plain", "two"),
    "bf16": (EVERY, {"precision": "bf16"}, "plain", "bf16"),
    "16": (("ddp", "fsdp"), {"precision": "16"}, "plain", "16"),
    "stock network": (("fsdp",), {}, "stock", "stock"),
    "forward mode": (("ddp", "fsdp", "zero2"), {}, "scm", "scm"),
    "difference": (("zero3",), {}, "scm, difference", "scm, difference"),
    "offload optimizer": (("zero1", "zero2"), {"offload_optimizer": True}, "plain", "plain"),
    "offload parameters": (("fsdp",), {"offload_parameters": True}, "plain", "plain"),
    "all but precision": (
        ("zero3",),
        {"checkpoint_activations": True, "accumulate": 2, "offload_parameters": True, "offload_optimizer": True},
        "plain",
        "two",
    ),
    "compile": (EVERY, {"compile": ["student"]}, "small", "small"),
}


RESUMED = ("lora", "16", "offload optimizer", "offload parameters", "all but precision")  # what adds to the state


def build(name: str) -> Method:
    torch.manual_seed(7)
    method = METHODS[name]()
    method.shared.manual_seed(3)
    method.total_steps = STEPS
    return method.train()


def autocast(precision: str) -> Any:
    """As lightning's precision plugin has it."""
    return torch.autocast("cpu", DTYPES[precision], cache_enabled=False) if precision in DTYPES else nullcontext()


def placed(name: str, rank: int, engine: Engine) -> Method:
    with share_weights() if engine.strategy in ("fsdp", "zero3") else nullcontext():  # as `distill bench` has it
        method = build(name)
    equip(method, engine)
    method.configure_optimizers()
    torch.manual_seed(100 + rank)
    return method


def advance(method: Method, rank: int, until: int, precision: str) -> None:
    with autocast(precision):
        places.advance(method, rank, until)


def case(feature: str, strategy: str, rank: int) -> dict[str, Any]:
    _, settings, name, _ = CASES[feature]
    engine = Engine(strategy=strategy, accelerator="cpu", **settings)
    method = placed(name, rank, engine)
    advance(method, rank, HALF, engine.precision)
    state = copy.deepcopy(method.snapshot())
    advance(method, rank, STEPS, engine.precision)
    out = {"networks": places.networks(method), "state": state, "logs": {k: float(v) for k, v in method.logs.items()}}
    if feature not in RESUMED:
        return out
    state = [state if rank == 0 else None]
    torch.distributed.broadcast_object_list(state)  # as a run does: from what rank 0 wrote
    again = placed(name, rank, engine)
    again.restore(state[0])
    advance(again, rank, STEPS, engine.precision)
    return out | {"resumed": places.networks(again)}


def main(folder: Path, names: list[str]) -> None:
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="eager")  # traces, but needs no compiler
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for strategy in EVERY:  # zero3 last: deepspeed then takes torch's linear layers over for good
        for name in (n for n in names if strategy in CASES[n][0]):
            began = time.monotonic()
            torch.save(case(name, strategy, rank), folder / f"{name}-{strategy}-{rank}.pt")
            print(name, strategy, f"{time.monotonic() - began:.1f} s", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])

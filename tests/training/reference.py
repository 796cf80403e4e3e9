"""What two ranks must equal: replicas of a method in one process that knows nothing of strategies; and how to start two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import places
import torch

from distill.config.schema import Optim
from distill.methods.base import Method


def launch(folder: Path, arguments: list[str], seconds: int = 900, **environment: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = (
        os.environ
        | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[i]) for i in (2, 1)),
        }
        | environment
    )
    logs = [open(folder / f"log-{rank}.txt", "w") for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=logs[r],
            stderr=subprocess.STDOUT,
        )
        for r in range(2)
    ]
    try:
        codes = [rank.wait(seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join((folder / f"log-{r}.txt").read_text()[-2000:] for r in range(2))


def distance(a: dict, b: dict) -> float:
    """Largest difference of two networks' weights over the largest weight."""
    assert a.keys() == b.keys() and a
    scale = max(float(v.abs().max()) for v in b.values())
    return max(float((a[k] - b[k]).abs().max()) for k in b) / scale


def optimizer(net: torch.nn.Module, s: Optim) -> torch.optim.Optimizer:
    if s.name == "SGD":
        return torch.optim.SGD(net.parameters(), lr=s.lr)
    return torch.optim.AdamW(net.parameters(), lr=s.lr, betas=tuple(s.betas), eps=s.eps, weight_decay=0.0)


class Reference:
    """Replicas of one method, one a rank and micro-batch, each in its rank's random stream; their gradients are averaged.

    `within`: a context for what networks compute, such as autocast. `scale`: of the losses at the start, halved and the
    turn left out where a gradient overflows.
    """

    def __init__(self, build: Callable[[], Method], parts: int = 1, within: Callable[[], Any] = nullcontext, scale=1.0):
        self.parts, self.within, self.replicas = parts, within, [build() for _ in range(places.WORLD * parts)]
        self.streams = []
        for rank in range(places.WORLD):
            torch.manual_seed(100 + rank)
            self.streams.append(torch.get_rng_state())
        self.scale = {role: scale for role in self.replicas[0].trainable}
        self.optimizers = [{r: optimizer(getattr(m, r), s) for r, s in m.optim.items()} for m in self.replicas]

    def on(self, i: int, call):
        """`call(replica)` in the random stream of its rank."""
        rank = i // self.parts
        torch.set_rng_state(self.streams[rank])
        with self.within():
            out = call(self.replicas[i])
        self.streams[rank] = torch.get_rng_state()
        return out

    def step(self) -> None:
        methods, n = self.replicas, self.replicas[0].step
        turns = [list(m.turns(n)) for m in methods]
        shared = []
        for i, m in enumerate(methods):
            if i:  # all micro-batches of all ranks: the same shared draws, one after another within a rank
                m.shared.set_state(start if i % self.parts == 0 else methods[i - 1].shared.get_state())  # noqa: F821
            else:
                start = m.shared.get_state()  # noqa: F841
            batch = places.batch(m, n, i // self.parts, i % self.parts)
            shared.append(self.on(i, lambda m: m.draw(batch["x"], torch.randn_like(batch["x"]), {})))  # noqa: B023
        for m in methods:
            m.shared.set_state(methods[-1].shared.get_state())
        for turn in range(len(turns[0])):
            self.turn(turns[0][turn][0], [t[turn][1] for t in turns], shared)
        for m in methods:
            m.step += 1

    def turn(self, role, losses, shared) -> None:
        for i, m in enumerate(self.replicas):
            for other in m.trainable:
                getattr(m, other).requires_grad_(other == role).zero_grad()
            self.on(i, lambda m: (self.scale[role] * losses[i](*shared[i])).backward())  # noqa: B023
        networks = [getattr(m, role) for m in self.replicas]
        with torch.no_grad():
            for same in zip(*(net.parameters() for net in networks)):
                mean = sum(p.grad for p in same) / len(same) / self.scale[role]
                for p in same:
                    p.grad.copy_(mean)
        if not all(p.grad.isfinite().all() for p in networks[0].parameters()):
            self.scale[role] /= 2
            return
        for m, net, optimizers in zip(self.replicas, networks, self.optimizers):
            torch.nn.utils.clip_grad_norm_(net.parameters(), m.optim[role].clip or float("inf"))
            optimizers[role].step()
            for name, (source, decay) in m._averages.items():
                if source == role:
                    keep = min(decay, (1 + m.step) / (10 + m.step))
                    for a, b in zip(getattr(m, name).parameters(), net.parameters()):
                        a.data.mul_(keep).add_(b.data, alpha=1 - keep)

    def networks(self, steps: int) -> dict[str, dict[str, torch.Tensor]]:
        """All networks' weights after so many steps."""
        while self.replicas[0].step < steps:
            self.step()
        m = self.replicas[0]
        names = (*m.trainable, *m.frozen, *m._averages)
        return {n: {k: v.clone() for k, v in getattr(m, n).state_dict().items()} for n in names}

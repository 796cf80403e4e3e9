r"""Bytes per rank by strategy: stored tensors of each network, and the peak within a step.

The stored tensors were read from running processes (`tests/inspect/test_storage.py`):

    single, ddp   weights, gradients from a role's turn to its next, moments
    zero1, zero2  the same weights; moments, a master copy and the reduced gradients in n parts; no gradients of others
    zero3         weights, gradients, moments and masters in n parts, each tensor padded; all gradients at all times
    fsdp          weights, gradients, moments in n parts along the first dimension, of which a rank holds the largest
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distill.inspect.plan.trace import Trace, Where
from distill.methods.optim import optimizer_of
from distill.methods.placement import BUCKET

STRATEGIES = ("single", "ddp", "zero1", "zero2", "fsdp", "zero3", "zero3+offload")  # least communication first
SPREAD = ("fsdp", "zero3", "zero3+offload")  # those that shard weights
PRIMES = (7, 5, 3, 11, 13, 17)


@dataclass
class NetworkMemory:
    """Sizes of one of the method's networks.

    `shapes` and `sizes` are of its parameters, `moments` the numbers that its optimizer keeps for each.
    """

    name: str
    kind: str  # trainable, frozen, average
    shapes: list[tuple[int, ...]]
    sizes: list[int]
    buffers: int
    moments: list[int] = field(default_factory=list)

    @property
    def weights(self) -> int:
        return sum(self.sizes)

    @property
    def numbers(self) -> int:
        return sum(math.prod(s) for s in self.shapes)

    def part(self, strategy: str, n: int) -> int:
        """Bytes of weights on the rank with the largest share."""
        if strategy == "fsdp":
            rows = (-(-s[0] // n) / s[0] if s else 1.0 for s in self.shapes)
            return round(sum(size * share for size, share in zip(self.sizes, rows)))
        if strategy.startswith("zero3"):
            return sum(
                -(-math.prod(s) // n) * (size // math.prod(s)) for s, size in zip(self.shapes, self.sizes) if size
            )
        return self.weights


def networks_of(method: Any) -> list[NetworkMemory]:
    """Every network of the method, each weight once: shared weights belong to the first role."""
    found, seen = [], set()
    for name in (*method.trainable, *method.frozen, *method._averages):
        module = getattr(method, name)
        own = [p for p in module.parameters() if id(p) not in seen and not seen.add(id(p))]
        kind = "trainable" if name in method.trainable else "frozen" if name in method.frozen else "average"
        network = NetworkMemory(
            name, kind, [tuple(p.shape) for p in own], [p.nbytes for p in own], sum(b.nbytes for b in module.buffers())
        )
        if kind == "trainable":
            network.moments = [numbers_kept(method.optim[name], s, name) for s in network.shapes]
        found.append(network)
    rest = [p for p in method.parameters() if id(p) not in seen]
    if rest:
        found.append(NetworkMemory("others", "frozen", [tuple(p.shape) for p in rest], [p.nbytes for p in rest], 0))
    return found


def numbers_kept(settings: Any, shape: tuple[int, ...], role: str, _known: dict = {}) -> int:  # noqa: B006
    """Numbers that the role's optimizer keeps for a parameter of `shape`, measured in one step on a small one."""
    key = (settings.name, str(settings.options), len(shape))
    if key not in _known:
        small = PRIMES[: len(shape)]
        weight = nn.Parameter(torch.ones(small))
        weight.grad = torch.ones(small)
        optimizer = optimizer_of(settings, [weight], role)
        optimizer.step()
        kept = [v.shape for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor)]
        _known[key] = [[small.index(d) for d in s if d in small] for s in kept]
    return sum(math.prod(shape[i] for i in dims) for dims in _known[key])


@dataclass
class StrategySettings:
    """The settings of a DeepSpeed config that determine memory, with their defaults; numbers of elements."""

    reduce_bucket: int = int(5e8)
    prefetch: int = int(5e7)
    live: int = int(1e9)
    overlap: bool | None = None

    @classmethod
    def of(cls, config: dict[str, Any]) -> StrategySettings:
        zero, out = config.get("zero_optimization", {}), cls()
        out.reduce_bucket = int(zero.get("reduce_bucket_size", out.reduce_bucket))
        out.prefetch = int(zero.get("stage3_prefetch_bucket_size", out.prefetch))
        out.live = int(zero.get("stage3_max_live_parameters", out.live))
        out.overlap = zero.get("overlap_comm")
        return out


@dataclass
class Load:
    """Bytes on a rank at the peak of a step, by kind; `host` is the host memory for this rank."""

    weights: int = 0  # of trainable roles
    frozen: int = 0
    averages: int = 0
    moments: int = 0
    masters: int = 0
    gradients: int = 0
    activations: int = 0  # and other intermediate tensors
    temporary: int = 0  # gathered weights, buckets, flat copies
    host: int = 0
    moment: str = ""  # where the peak is

    @property
    def total(self) -> int:
        return sum(vars(self)[k] for k in KINDS)


KINDS = ("weights", "frozen", "averages", "moments", "masters", "gradients", "activations", "temporary")


def load(
    networks: list[NetworkMemory], seen: Trace, strategy: str, n: int, settings: StrategySettings | None = None
) -> Load:
    """Bytes per rank of `n` under `strategy`, with the activations of `seen`."""
    n, settings = 1 if strategy == "single" else n, settings or StrategySettings()
    trained = {x.name: x for x in networks if x.kind == "trainable"}
    kept = Load()
    for x in networks:
        key = {"trainable": "weights", "frozen": "frozen", "average": "averages"}[x.kind]
        setattr(kept, key, getattr(kept, key) + x.part(strategy, n) + x.buffers)
    shares = {r: parts(x, strategy, n) for r, x in trained.items()}
    kept.moments, kept.masters = (sum(p[k] for p in shares.values()) for k in ("moments", "masters"))
    always = len(trained) * 4 * settings.reduce_bucket if strategy.startswith("zero3") else 0  # one an engine
    moments = [*_turns(trained, shares, seen, strategy, n, settings), *_steps(trained, shares, strategy, n, settings)]
    best = max(moments, key=lambda m: m[1] + m[2] + m[3])
    kept.moment, kept.gradients, kept.activations, kept.temporary = best
    kept.temporary += always
    if strategy == "zero3+offload":
        kept.host = kept.weights + kept.frozen + kept.averages + kept.moments + kept.masters + kept.gradients
        kept.weights = kept.frozen = kept.averages = kept.moments = kept.masters = kept.gradients = 0
    return kept


def parts(x: NetworkMemory, strategy: str, n: int) -> dict[str, int]:
    """Bytes of moments, masters and reduced gradients of a trainable network."""
    numbers = sum(x.moments)
    if strategy in ("zero1", "zero2"):
        flat = -(-x.numbers // n) * 4
        return {"moments": round(4 * numbers / n), "masters": flat, "gradients": flat}
    share = x.part(strategy, n)
    moments = round(4 * numbers * share / max(x.weights, 1))
    return {"moments": moments, "masters": share if strategy.startswith("zero3") else 0, "gradients": share}


Moment = tuple[str, int, int, int]  # what, gradients, activations, temporary


def _turns(trained, shares, seen: Trace, strategy: str, n: int, settings: StrategySettings) -> list[Moment]:
    """The peaks of forward and backward passes."""
    found: list[Moment] = []
    bucket = 4 * settings.reduce_bucket * (2 if settings.overlap else 1) if strategy in ("zero1", "zero2") else 0
    for role, places in seen.peaks.items():
        others = sum(p["gradients"] for r, p in shares.items() if r != role)
        others = 0 if strategy in ("zero1", "zero2") else others
        for where, (without, own) in places.items():
            gathered = _gathered(where, trained, seen, strategy, settings)
            name = f"{role or 'roll-out'}, {where.network} {'backward' if where.backward else 'forward'}".strip()
            if not role:
                found.append((name, others, without, gathered))
            elif strategy in ("single", "ddp", "zero1"):
                found.append((name, others + own - without, without, bucket if own > without else 0))
            else:
                share = shares[role]["gradients"]
                found.append((name, others + share, without, gathered + (bucket if where.backward else 0)))
    return found


def _steps(trained, shares, strategy: str, n: int, settings: StrategySettings) -> list[Moment]:
    """The peaks of gradient reduction and weight update, without activations."""
    found: list[Moment] = []
    for role, x in trained.items():
        own, others = shares[role]["gradients"], sum(p["gradients"] for r, p in shares.items() if r != role)
        if strategy == "ddp":
            found.append((f"{role}, reduction", x.weights + others, 0, x.weights + min(BUCKET, x.weights)))
        elif strategy == "zero1":
            found.append((f"{role}, reduction", x.weights, 0, 4 * settings.reduce_bucket + own))
        elif strategy == "zero2":
            found.append((f"{role}, step", own, 0, own))
        elif strategy.startswith("zero3"):
            found.append((f"{role}, step", own + others, 0, min(own, 4 * 10**9)))
        else:
            found.append((f"{role}, step", own + others, 0, 0))
    return found


def _gathered(where: Where, trained, seen: Trace, strategy: str, settings: StrategySettings) -> int:
    """Bytes of gathered weights, and of gradients before their reduction, while a unit of the network computes."""
    if strategy not in SPREAD or not where.network:
        return 0
    units = seen.units[where.network]
    rest, unit_size = units[-1], units.get(where.unit, 0) if where.unit >= 0 else 0
    if strategy == "fsdp":  # the unit, the next one, what is outside of units; backward its gradient, and that flat
        near = max((units.get(where.unit + d, 0) for d in (-1, 1)), default=0) if where.unit >= 0 else 0
        return rest + unit_size + near + (2 * (unit_size or rest) if where.backward else 0)
    whole = sum(units.values())
    if where.network in trained:  # weights wait to be used again, as far as the limit allows
        return min(whole, 4 * settings.live) + (unit_size if where.backward else 0)
    return min(whole, 4 * settings.prefetch + max(unit_size, rest))

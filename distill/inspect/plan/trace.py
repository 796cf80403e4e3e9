"""Traces training steps of a method with networks on the meta device and everything else computed.

The inputs of a network are moved to the meta device, and its output is replaced by random numbers of the right shape, so
that rollouts, draws and alternation of turns are those of a real run, but nothing large is computed or stored.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from distill.denoise import as_network
from distill.errors import BadInput
from distill.inspect.plan.meter import Accelerator, Meter
from distill.methods.placement import Placement, batch_size
from distill.training.placement.blocks import blocks, root

SECONDS = 4.0  # limit of the time for averaging random numbers of calls


@dataclass
class Trace:
    """The traced cost of steps at one batch size.

    `peaks[role][where] = (bytes without the role's gradients, bytes with them)` beyond weights and gradients of others;
    role is "" for the part shared by all turns, `where` a network, the number of its unit, and the direction.
    """

    batch: int
    flops: float = 0.0  # per step, averaged over the pattern of turns
    warm_flops: float = 0.0  # a step of the warm start
    warm_steps: int = 0
    peaks: dict[str, dict[Any, tuple[int, int]]] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)  # bytes alive when a role's backward pass begins
    units: dict[str, dict[int, int]] = field(default_factory=dict)  # bytes of a network's units, -1: of the rest
    steps: int = 0  # traced


@dataclass(frozen=True)
class Where:
    """A unit of a network, as FSDP2 shards it, and the direction; unit -1 is the rest of the network."""

    network: str = ""
    unit: int = -1
    backward: bool = False


class TracePlacement(Placement):
    """Placement that computes gradients without updating weights; gradients are freed as in `Placement`."""

    def __init__(self, meter: Meter, accumulate: int, kept: dict[str, int]):
        super().__init__(accumulate)
        self.meter, self.kept = meter, kept

    def turn(self, role: str) -> None:
        self.meter.role, self.meter.placement = role, Where()

    def agree(self, step, roles, shared):
        self.turn("")

    def zero_grad(self, role):
        self.turn(role)
        for p in self.parameters(role):
            p.grad = None

    def backward(self, role, loss, last=True):
        self.kept[role] = max(self.kept.get(role, 0), self.meter.live)
        torch.autograd.backward(loss / self.accumulate)  # `Tensor.backward` would leave `Accelerator` behind
        self.meter.placement = Where()

    def step(self, role, lr, finite):
        return torch.zeros(()), torch.tensor(True)

    def average(self, name, source, weight, stepped):
        """No update."""

    copy = reset_optimizer = lambda self, *names: None


def trace(
    experiment: Any, batch: int | None = None, dtype: torch.dtype | None = None, cache: bool = True, brief: bool = False
) -> Trace:
    """Run steps of the experiment's method until every kind of turn was traced; `batch` samples per micro-batch.

    The experiment's networks are on the meta device (`distill.inspect.plan.skeleton`), or real, for networks that need values.

    Args:
        dtype: of autocast.
        cache: see `Accelerator`.
        brief: run each kind of step once, for memory only.

    Raises:
        BadInput: a network cannot run on shapes alone.
    """
    method, accumulate = experiment.method, experiment.cfg.engine.accumulate
    torch.manual_seed(experiment.cfg.seed)
    method.total_steps, method.shared = experiment.cfg.train.steps, torch.Generator().manual_seed(experiment.cfg.seed)
    one = next(experiment.data.loader(0, 1, 0))
    found = Trace(batch or batch_size(one), units={name: units_of(m) for name, m in networks(method).items()})
    parts = enlarged(one, found.batch * accumulate)
    meter = Meter()
    placement, before = TracePlacement(meter, accumulate, found.kept), method.placement
    method.placement, placement.method = placement, method
    undo = _install_hooks(method, meter)
    meter.ignore([*tree_leaves([*_tensors(method)]), *[v for v in parts.values() if isinstance(v, Tensor)]])
    fixed = sum(v.nbytes for v in parts.values() if isinstance(v, Tensor))
    try:
        pattern, warm = _pattern(method), method.warm_start
        found.warm_steps = min(warm, method.total_steps)
        if warm:
            found.warm_flops = _step(method, meter, parts, 0, dtype, cache, found, fixed)
        run = lambda i: _step(method, meter, parts, warm + i, dtype, cache, found, fixed)
        found.flops = _average(pattern, run, 1 if brief else 4 * method.grid.steps)
    except (NotImplementedError, RuntimeError) as error:
        raise BadInput(f"the networks cannot run on the meta device: {' '.join(str(error).split())[:300]}") from error
    finally:
        for call in undo:
            call()
        method.placement = before
        method.step = 0
        for p in method.parameters():
            p.grad = None
    return found


def _step(method, meter, parts, step, dtype, cache, found, fixed) -> float:
    method.train()
    method.step, meter.peaks, flops = step, defaultdict(lambda: [0, 0]), meter.flops
    with Accelerator(dtype, cache), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None), meter:
        method.training_step(parts)
    method.logs = {}
    for (role, where), (without, own) in meter.peaks.items():
        old = found.peaks.setdefault(role, {}).get(where, (0, 0))
        found.peaks[role][where] = max(old[0], without + fixed), max(old[1], own + fixed)
    found.steps += 1
    return float(meter.flops - flops)


def _pattern(method: Any) -> list[tuple[str, ...]]:
    """The roles with a turn, by step, over one period (at most 64 steps)."""
    before = dict(vars(method))
    seen = [tuple(role for role, _ in method.turns(step)) for step in range(64)]
    vars(method).update(before)
    period = next(n for n in range(1, 65) if all(seen[i] == seen[i % n] for i in range(64)))
    return seen[:period]


def _average(pattern: list[tuple[str, ...]], run: Any, most: int) -> float:
    """Mean operations per step: every kind of step is repeated until its mean is known to 1 %, or the time limit."""
    began, costs, first = time.process_time(), defaultdict(list), {}
    for i, roles in enumerate(pattern):
        first.setdefault(roles, i)
    for again in range(most):
        for roles, i in first.items():
            if not again or not _settled(costs[roles]) and time.process_time() - began < SECONDS:
                costs[roles].append(run(i))
    return sum(sum(costs[roles]) / len(costs[roles]) for roles in pattern) / len(pattern)


def _settled(costs: list[float]) -> bool:
    return len(costs) > 2 and statistics.stdev(costs) / len(costs) ** 0.5 <= 0.01 * statistics.mean(costs)


def enlarged(batch: dict[str, Any], n: int) -> dict[str, Any]:
    """`batch` repeated to n rows."""
    rows = torch.arange(n) % batch_size(batch)
    return {k: v[rows] if isinstance(v, Tensor) else [v[i] for i in rows.tolist()] for k, v in batch.items()}


# -- networks ----------------------------------------------------------------------------------------------------


def networks(method: Any) -> dict[str, nn.Module]:
    """The called module of each role with weights; one that several roles share is listed once."""
    found, seen = {}, set()
    for name in (*method.trainable, *method.frozen, *method._averages):
        module = root(getattr(method, name))
        if id(module) not in seen and any(True for _ in module.parameters()):
            seen.add(id(module))
            found[name] = module
    return found


def units_of(network: nn.Module) -> dict[int, int]:
    """Bytes of the parts that FSDP2 gathers, by the number in `Where`."""
    found = {i: sum(p.nbytes for p in part.parameters()) for i, part in enumerate(blocks(network))}
    return found | {-1: sum(p.nbytes for p in network.parameters()) - sum(found.values())}


def _tensors(method: Any) -> list[Tensor]:
    modules = {id(m): m for m in networks(method).values()} | {0: method}
    return [t for m in modules.values() for t in (*m.parameters(), *m.buffers())]


def _install_hooks(method: Any, meter: Meter) -> list[Any]:
    """Replace the networks' forward functions and add hooks to their units; returns the functions that undo it."""
    undo, known = [], {}
    for name, module in networks(method).items():
        for i, unit in enumerate([module, *blocks(module)]):
            handle = (
                unit.register_forward_pre_hook(partial(_enter, meter, name, i - 1)),
                unit.register_forward_hook(partial(_leave, meter, name, i - 1)),
            )
            undo += [h.remove for h in handle]
        if next(module.parameters()).is_meta:
            undo.append(_stand_in(module, meter, known))
    for role in method.trainable:
        for p in getattr(method, role).parameters():
            hook = p.requires_grad_(True).register_post_accumulate_grad_hook(
                lambda p, role=role: meter.gradient(p.grad, role)
            )
            undo.append(hook.remove)
    return undo


def _backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _enter(meter: Meter, name: str, unit: int, module: nn.Module, args: tuple) -> None:
    meter.placement = Where(name, unit, _backward())


def _leave(meter: Meter, name: str, unit: int, module: nn.Module, args: tuple, out: Any) -> None:
    if _backward():
        return  # recomputation within the unit's own backward pass
    meter.placement = Where(name) if unit >= 0 else Where()
    for value in tree_leaves(out):
        if isinstance(value, Tensor) and value.requires_grad and not _inside_transform(value):
            value.register_hook(partial(_enter_backward, weakref.ref(meter), name, unit))


def _enter_backward(meter: Any, name: str, unit: int, gradient: Tensor) -> None:
    if meter() is not None:
        meter().placement = Where(name, unit, True)


def _inside_transform(value: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


def _stand_in(module: nn.Module, meter: Meter, known: dict) -> Any:
    """Adapts real tensors to a network on the meta device and back; repeated calls without gradients are counted only."""
    inner, own = module.forward, module.__dict__.get("forward")
    body = as_network(module).base
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in body.modules())
    usual, name = hooks(), id(module)

    def forward(*args, **kwargs):
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        if torch.is_grad_enabled() or hooks() != usual or any(map(_inside_transform, tensors)):
            return _called(inner, meter, args, kwargs)
        key = (name, tuple((v.shape, v.dtype) for v in tensors), tuple(kwargs))
        if key not in known:
            with meter.span() as (peaks, flops):
                out = _called(inner, meter, args, kwargs)
            known[key] = peaks, flops[0], tree_map_only(Tensor, lambda v: (v.shape, v.dtype), out)
            return out
        peaks, flops, out = known[key]
        meter.again(peaks, flops)
        return (
            _random(*out)
            if isinstance(out, tuple) and isinstance(out[0], torch.Size)
            else _called(inner, meter, args, kwargs)
        )

    module.forward = forward
    return lambda: setattr(module, "forward", own) if own else module.__dict__.pop("forward", None)


def _called(inner: Any, meter: Meter, args: tuple, kwargs: dict) -> Any:
    def enter(value: Tensor) -> Tensor:
        if value.is_meta:
            return value
        out = ToShape.apply(value) if value.is_floating_point() else value.to("meta")
        if not _inside_transform(out):
            meter.ignore([out])
        return out

    args, kwargs = tree_map_only(Tensor, enter, args), tree_map_only(Tensor, enter, kwargs)
    leave = lambda v: FromShape.apply(v) if v.is_meta else v
    return tree_map_only(Tensor, leave, inner(*args, **kwargs))


def _random(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


class ToShape(torch.autograd.Function):
    """A tensor's shape, on the meta device."""

    @staticmethod
    def forward(x):
        return torch.empty_like(x, device="meta")

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Saves nothing."""

    @staticmethod
    def backward(ctx, gradient):
        return FromShape.apply(gradient)

    @staticmethod
    def jvp(ctx, tangent):
        return torch.empty_like(tangent, device="meta")


class FromShape(torch.autograd.Function):
    """Random numbers of a shape."""

    @staticmethod
    def forward(x):
        return torch.randn(x.shape).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Saves nothing."""

    @staticmethod
    def backward(ctx, gradient):
        return ToShape.apply(gradient)

    @staticmethod
    def jvp(ctx, tangent):
        return torch.randn(tangent.shape).to(tangent.dtype)

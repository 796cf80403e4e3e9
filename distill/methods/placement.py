"""Placement of networks on devices and steps of their optimizers: interface, single process, and data parallel.

`distill.training.placement` adds shards (FSDP2) and engines (DeepSpeed). Method files use none of them directly.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.errors import BadInput
from distill.methods.optim import apply_settings, optimizer_of, settings_in

BUCKET = 25 * 2**20  # bytes of gradient a collective


class Placement:
    """Every role whole in one process; the interface of all placements.

    Args:
        accumulate: micro-batches a step; a turn's gradient is the mean of theirs.
        scale: scale losses and gradients, as float16 needs.
    """

    rank, world = 0, 1
    sharded = False  # True: no rank holds a whole role, so all ranks take part in every call
    forward_mode = True  # False: networks do not support forward-mode derivatives (jvp)
    fresh = False  # True: `weights` and `moments` return copies

    def __init__(self, accumulate: int = 1, scale: bool = False):
        self.accumulate, self.scale = accumulate, scale
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def prepare(self, method: Any) -> None:
        """Move the roles to their devices and build one optimizer per trainable role."""
        self.method = method
        self.optimizers = {r: optimizer_of(o, self.parameters(r), r) for r, o in method.optim.items()}
        self._settings = {r: settings_in(self.optimizers[r], o) for r, o in method.optim.items()}
        self.scalers = {r: torch.amp.GradScaler(method.device.type, enabled=self.scale) for r in method.optim}

    def module(self, name: str) -> nn.Module:
        return getattr(self.method, name)

    def parameters(self, role: str) -> list[nn.Parameter]:
        return list(self.module(role).parameters())

    # -- a turn --------------------------------------------------------------------------------------------------

    def zero_grad(self, role: str) -> None:
        self.optimizers[role].zero_grad()

    def backward(self, role: str, loss: Tensor, last: bool = True) -> None:
        """Add a micro-batch's gradient; `last`: of this turn."""
        self.scalers[role].scale(loss / self.accumulate).backward()

    def step(self, role: str, lr: float, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Clip by the role's global norm and step if `finite` (the loss is, on all ranks) and the norm is finite too.

        Returns the norm before, and whether it stepped, a bool () on the device.
        """
        optimizer, scaler = self.optimizers[role], self.scalers[role]
        self.reduce(role)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(role), self.method.optim[role].clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        for group in optimizer.param_groups:
            group["lr"] = lr
        finite = finite & torch.isfinite(norm)
        self._apply(role, finite)
        return norm, finite

    def _apply(self, role: str, finite: Tensor) -> None:
        optimizer, scaler = self.optimizers[role], self.scalers[role]
        if self.waits(role):
            if finite:
                scaler.step(optimizer)
            scaler.update()
            return
        fused: Any = optimizer
        fused.found_inf = (~finite).float()  # a fused optimizer decides on the device, so the host runs ahead
        optimizer.step()
        del fused.found_inf

    def waits(self, role: str) -> bool:
        """Whether the host reads each turn's finiteness, which synchronises with an accelerator."""
        fused = role in self.optimizers and self.optimizers[role].defaults.get("fused")
        return self.method.device.type == "cpu" or self.scale or self.sharded or not fused

    def reduce(self, role: str) -> None:
        """Average the role's gradients over the ranks."""

    def mean(self, value: Tensor) -> Tensor:
        """A scalar's mean over the ranks."""
        return value.detach()

    @torch.no_grad()
    def average(self, name: str, source: str, weight: float, stepped: Tensor) -> None:
        """name <- name + weight (source - name) if `stepped`, buffers of whole numbers copied."""
        waits = self.waits(source)
        if waits and not stepped:
            return
        for average, value in zip(tensors(self.module(name)), tensors(self.module(source))):
            value = value if waits else torch.where(stepped, value, average)
            average.lerp_(value, weight) if average.is_floating_point() else average.copy_(value)

    @torch.no_grad()
    def copy(self, name: str, source: str) -> None:
        """name <- source, for networks of one shape."""
        for new, value in zip(tensors(self.module(name)), tensors(self.module(source))):
            new.copy_(value)

    def reset_optimizer(self, role: str) -> None:
        """Drop the moments of a role's optimizer."""
        self.optimizers[role].state.clear()

    def resident(self, name: str) -> tuple[int, int]:
        """Bytes on this rank of a network's weights and of its optimizer's state."""
        local: Callable[[Any], Any] = lambda v: getattr(v, "_local_tensor", v)  # of FSDP2
        state = [local(v) for values in self._state(name).values() for v in values.values() if isinstance(v, Tensor)]
        return sum(t.nbytes for t in tensors(self.module(name))), sum(t.nbytes for t in state)

    def _state(self, name: str) -> dict[Any, dict[str, Any]]:
        return self.optimizers[name].state if name in self.optimizers else {}

    def bare_step(self, role: str) -> None:
        """The optimizer's step alone, whatever the gradient."""
        self.optimizers[role].step()

    # -- ranks ---------------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """A small object of every rank, in order of rank, on all of them."""
        return [value]

    def agree(self, step: int, roles: Iterable[str], shared: torch.Generator) -> None:
        """Raise on all ranks if they are about to take different turns or draw different shared numbers.

        Called before a step's first collective, where ranks that disagree would wait for each other.

        Raises:
            BadInput: they disagree; names the ranks.
        """
        if self.world == 1:
            return
        key = zlib.crc32(f"{step} {' '.join(roles)}".encode()), zlib.crc32(shared.get_state().numpy().tobytes())
        found = self.gather_key(key[0] << 32 | key[1])
        if len(set(found)) > 1:
            odd = [rank for rank, other in enumerate(found) if other != found[0]]
            what = "turns" if len({k >> 32 for k in found}) > 1 else "shared draws"
            raise BadInput(
                f"Step {step}: rank {', '.join(map(str, odd))} and rank 0 differ in their {what}; draw what steers "
                "control flow from `self.shared` only, and let no turn depend on a rank's own batch."
            )

    def gather_key(self, key: int) -> list[int]:
        return [key]

    # -- state, the same for every strategy: whole tensors on the CPU of rank 0 ------------------------------------

    def weights(self, name: str) -> dict[str, Tensor]:
        """A network's state; on other ranks than 0 perhaps empty. All ranks call it."""
        return self.module(name).state_dict()

    def load_weights(self, name: str, weights: dict[str, Tensor]) -> None:
        self.module(name).load_state_dict(weights)

    def moments(self, role: str) -> dict[str, Any]:
        """The optimizer's state as `torch.optim` writes it, with that of the loss scale. All ranks call it."""
        return self.optimizers[role].state_dict() | self._scale_state(role)

    def load_moments(self, role: str, state: dict[str, Any]) -> None:
        self.optimizers[role].load_state_dict({k: v for k, v in state.items() if k != "scale"})
        self.apply_settings()
        if self.scale and state.get("scale"):
            self.scalers[role].load_state_dict(state["scale"])

    def apply_settings(self) -> None:
        """Put the run's optimizer settings in place of those that came with a loaded state."""
        for role, optimizer in self.optimizers.items():
            apply_settings(optimizer, self._settings[role])

    def _scale_state(self, role: str) -> dict[str, Any]:
        return {"scale": self.scalers[role].state_dict()} if self.scale else {}


def tensors(module: nn.Module) -> list[Tensor]:
    """A network's parameters and buffers as this rank holds them: its own part of those that are spread over ranks."""
    local: Callable[[Any], Any] = lambda v: getattr(v, "ds_tensor", getattr(v, "_local_tensor", v))  # DeepSpeed, FSDP2
    return [local(v).detach() for v in module.state_dict(keep_vars=True).values()]


class Replicas(Placement):
    """Data parallel: every rank holds every role whole, and gradients are averaged over the ranks."""

    device = torch.device("cpu")

    def prepare(self, method: Any) -> None:
        self.rank, self.world, self.method = dist.get_rank(), dist.get_world_size(), method
        method.to(self.device)
        self.start_alike()
        super().prepare(method)
        self.draw_apart()

    @property
    def names(self) -> list[str]:
        """Every network of the method."""
        method = self.method
        return [*method.trainable, *method.frozen, *method._averages]

    def start_alike(self) -> None:
        for name in self.names:
            for some in _buckets(tensors(self.module(name))):
                flat = torch.cat([t.flatten() for t in some])
                dist.broadcast(flat, 0)
                _spread(flat, some)

    def draw_apart(self) -> None:
        """Each rank's own stream of noise; what all share is drawn from `Method.shared`."""
        if self.rank:
            torch.manual_seed((torch.initial_seed() + self.rank) % 2**63)

    @torch.no_grad()
    def reduce(self, role: str) -> None:
        parameters = self.parameters(role)
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        gradients = []
        for p, anywhere in zip(parameters, used.tolist()):
            if anywhere:  # a rank whose batch did not touch it has none
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                gradients.append(p.grad)
        waiting = [(some, *_sum(some)) for some in _buckets(gradients)]
        for some, flat, work in waiting:
            work.wait()
            _spread(flat / self.world, some)

    def mean(self, value: Tensor) -> Tensor:
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.world

    def gather(self, value: Any) -> list[Any]:
        found = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def gather_key(self, key: int) -> list[int]:
        found = torch.zeros(self.world, dtype=torch.int64)
        found[self.rank] = key - 2**63
        dist.all_reduce(found)  # of CPU tensors: no accelerator is waited for
        return [int(k) + 2**63 for k in found]


def _spread(flat: Tensor, some: list[Tensor]) -> None:
    for tensor, part in zip(some, flat.split([t.numel() for t in some])):
        tensor.copy_(part.view_as(tensor))


def _buckets(some: list[Tensor]) -> list[list[Tensor]]:
    found: list[list[Tensor]] = []
    size = math.inf
    for g in some:
        if size + g.nbytes > BUCKET or g.dtype != found[-1][0].dtype:
            found.append([])
            size = 0
        found[-1].append(g)
        size += g.nbytes
    return found


def _sum(some: list[Tensor]) -> tuple[Tensor, Any]:
    flat = torch.cat([g.flatten() for g in some])
    return flat, dist.all_reduce(flat, async_op=True)


def micro_batches(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """`batch` cut into `parts` of equal size, in order."""
    if parts == 1:
        return [batch]
    n = batch_size(batch) // parts
    cut = lambda v: [v[i * n : (i + 1) * n] for i in range(parts)]
    columns = {k: cut(v) for k, v in batch.items()}
    return [{k: v[i] for k, v in columns.items()} for i in range(parts)]


def batch_size(batch: dict[str, Any]) -> int:
    """Samples in a batch: the length of its first tensor."""
    return next(len(v) for v in batch.values() if isinstance(v, Tensor))

"""Where a method's roles live and how they step: the interface of every strategy, and the plain case of one process.

`distill.engine.strategy` has the others: replicas, shards of FSDP2, engines of DeepSpeed. A method file knows none of it.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoise import network_of
from distill.errors import BadInput, suggest
from distill.schema import Optim


class Place:
    """One process that holds every role whole.

    Args:
        accumulate: micro-batches a step; a turn's gradient is the mean of theirs.
        scale: scale losses and gradients, as float16 needs.
    """

    rank, world = 0, 1
    sharded = False  # True: no rank holds a whole role, so all ranks call it together
    forward_mode = True  # False: networks have hooks without forward-mode derivative
    fresh = False  # True: `weights` and `moments` are copies that nothing else writes to

    def __init__(self, accumulate: int = 1, scale: bool = False):
        self.accumulate, self.scale = accumulate, scale
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def prepare(self, method: Any) -> None:
        """Put the roles in their places and build an optimiser for each trainable one."""
        self.method = method
        self.optimizers = {r: optimizer_of(o, self.parameters(r), r) for r, o in method.optim.items()}
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
        optimizer.found_inf = (~finite).float()  # a fused optimiser decides on the device, so the host runs ahead
        optimizer.step()
        del optimizer.found_inf

    def waits(self, role: str) -> bool:
        """Whether the host looks at each turn's finiteness; free on a CPU, a synchronisation elsewhere."""
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

    def forget(self, role: str) -> None:
        """Drop the moments of a role's optimiser."""
        self.optimizers[role].state.clear()

    def resident(self, name: str) -> tuple[int, int]:
        """Bytes that this rank keeps of a network: its weights, and its optimiser's state."""
        own = lambda v: getattr(v, "_local_tensor", v)  # of FSDP2
        state = [own(v) for values in self._state(name).values() for v in values.values() if isinstance(v, Tensor)]
        return sum(t.nbytes for t in tensors(self.module(name))), sum(t.nbytes for t in state)

    def _state(self, name: str) -> dict[Any, dict[str, Any]]:
        return self.optimizers[name].state if name in self.optimizers else {}

    def bare_step(self, role: str) -> None:
        """The optimiser's step alone, whatever the gradient."""
        self.optimizers[role].step()

    # -- ranks ---------------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """A small object of every rank, in order of rank, on all of them."""
        return [value]

    def agree(self, step: int, roles: Iterable[str], shared: torch.Generator) -> None:
        """Raise on all ranks if they are about to take different turns or draw different shared numbers.

        Called before a step's first collective: a rank that went elsewhere would leave the others waiting for ever.

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
        """The optimiser's state as `torch.optim` writes it, with that of the loss scale. All ranks call it."""
        return self.optimizers[role].state_dict() | self._scale_state(role)

    def load_moments(self, role: str, state: dict[str, Any]) -> None:
        self.optimizers[role].load_state_dict({k: v for k, v in state.items() if k != "scale"})
        if self.scale and state.get("scale"):
            self.scalers[role].load_state_dict(state["scale"])

    def _scale_state(self, role: str) -> dict[str, Any]:
        return {"scale": self.scalers[role].state_dict()} if self.scale else {}


def tensors(module: nn.Module) -> list[Tensor]:
    """A network's parameters and buffers as this rank holds them: its own part of those that are spread over ranks."""
    own = lambda v: getattr(v, "ds_tensor", getattr(v, "_local_tensor", v)).detach()  # of deepspeed, of FSDP2
    return [own(v) for v in module.state_dict(keep_vars=True).values()]


_sharing: ContextVar[bool] = ContextVar("sharing", default=False)


@contextmanager
def shared_copies() -> Iterator[None]:
    """Within, copies of networks share the memory of their weights: for those who only read, or cut them to shards at once."""
    token = _sharing.set(True)
    try:
        yield
    finally:
        _sharing.reset(token)


def copy_of(network: nn.Module) -> nn.Module:
    """A network of the same structure and weights; what is done to one does not show in the other."""
    shared = network.parameters() if _sharing.get() else ()
    return copy.deepcopy(network, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in shared})


def let_go(module: nn.Module, kept: nn.Module) -> None:
    """Free the parameters of `module` but those of a network in it, and of the base that this one is an adapter on."""
    mine = {id(p) for m in (kept, network_of(kept).base) for p in m.parameters()}
    for p in module.parameters():
        if id(p) not in mine:
            p.data = p.data.new_empty(0)


def optimizer_of(settings: Optim, parameters: list[nn.Parameter], role: str) -> torch.optim.Optimizer:
    """The `torch.optim` class that `settings.name` names."""
    kind = getattr(torch.optim, settings.name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        near = suggest(settings.name, dir(torch.optim))
        raise BadInput(f"optim.{role}.name: torch.optim has no '{settings.name}'.{near}")
    keywords = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.name != "SGD":
        keywords |= {"betas": tuple(float(b) for b in settings.betas), "eps": settings.eps}
    if settings.name in ("Adam", "AdamW"):
        keywords["fused"] = not parameters[0].is_meta
    return kind(parameters, **keywords)


def learning_rate(settings: Optim, step: int, total: int) -> float:
    """Factor on the learning rate: linear warm-up, then constant or a half cosine to zero at `total` steps."""
    factor = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.decay == "cosine" and total:
        factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    return factor


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

r"""One frozen base, and roles that are low-rank adapters on it: LoRA (Hu et al. 2021), https://arxiv.org/abs/2106.09685.

    y = W x + b + (alpha / rank) B A x,     A (rank, in) random, B (out, rank) zero at the start

A role that is copied from the shared base becomes a new adapter, a copy of an adapter an adapter of the same base, so
student, critic and averages hold rank (in + out) numbers a layer instead of in x out. The base itself is never changed:
an adapter adds its part by hooks that live for one call.
"""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.denoise import Delegate, Denoiser, Network, as_network
from distill.errors import BadInput, suggest


def lay_out(roles: dict[str, Any], layout: str, adapter: dict[str, Any] | None = None) -> None:
    """`full` leaves each role its own weights; `shared_base` makes the teacher's network the base of its copies.

    Raises:
        BadInput: another layout, settings that `Shared` does not take, or no teacher with a network.
    """
    if layout not in ("full", "shared_base"):
        raise BadInput(f"roles.layout: '{layout}' must be full or shared_base.{suggest(str(layout), ['shared_base'])}")
    if layout == "full":
        if adapter:
            raise BadInput("roles.adapter is for roles.layout=shared_base alone; set the layout, or remove the adapter.")
        return
    teacher, known = roles.get("teacher"), ("rank", "alpha", "targets")
    net = teacher.net if isinstance(teacher, Denoiser) else None
    if net is None:
        raise BadInput("roles.layout: shared_base needs a teacher with a network, whose copies the other roles are.")
    for key in adapter or {}:
        if key not in known:
            raise BadInput(f"roles.adapter.{key} is unknown.{suggest(key, known)} It has {', '.join(known)}.")
    roles["teacher"].net = Shared(net, **adapter or {})


class Shared(Delegate):
    """A network whose copies are adapters.

    Args:
        net: the base; it stays as it is.
        rank, alpha: of every adapter; alpha none is the rank, so that the factor is 1.
        targets: patterns (`*`) of the names of linear layers, as in `named_modules()`.

    Raises:
        BadInput: a pattern that no linear layer's name matches.
    """

    def __init__(self, net: nn.Module, rank: int = 8, alpha: float | None = None, targets: list[str] | str = "*"):
        super().__init__()
        self.net, self.rank, self.scale = net, rank, (rank if alpha is None else alpha) / rank
        patterns = [targets] if isinstance(targets, str) else list(targets)
        linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
        self.targets = [name for name in linear if any(fnmatch(name, pattern) for pattern in patterns)]
        for pattern in patterns or [""]:
            if not any(fnmatch(name, pattern) for name in linear):
                raise BadInput(f"roles.adapter.targets: no linear layer of {type(net).__name__} matches '{pattern}'."
                               f"{suggest(pattern, _endings(linear))}")

    @property
    def wrapped(self) -> Network:
        return as_network(self.net)

    def forward(self, *args, **kwargs) -> Any:
        return self.net(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Adapter:
        return Adapter(self)


def _endings(names: list[str]) -> list[str]:
    """Patterns that match something: the names, and `*` before their last one to three parts."""
    parts = [name.split(".") for name in names]
    return names + sorted({"*." + ".".join(p[-n:]) for p in parts for n in (1, 2, 3) if len(p) > n})


class Adapter(Delegate):
    """The base with low-rank changes of its own; only those are its parameters, its state and its gradient."""

    def __init__(self, shared: Shared):
        super().__init__()
        self._shared = (shared,)  # in a tuple: the base is no part of this module
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name in shared.targets:
            weight = shared.net.get_submodule(name).weight
            down = torch.empty(shared.rank, weight.shape[1], device=weight.device, dtype=weight.dtype)
            self.down.append(nn.Parameter(nn.init.kaiming_uniform_(down, a=math.sqrt(5))))
            self.up.append(nn.Parameter(down.new_zeros(weight.shape[0], shared.rank)))

    @property
    def shared(self) -> Shared:
        """What it is an adapter on."""
        return self._shared[0]

    @property
    def wrapped(self) -> Network:
        return self._shared[0].wrapped

    def forward(self, *args, **kwargs) -> Any:
        shared = self._shared[0]
        with ExitStack() as hooks:
            for name, down, up in zip(shared.targets, self.down, self.up):
                hook = self._adding(down, up, shared.scale)
                hooks.callback(shared.net.get_submodule(name).register_forward_hook(hook).remove)
            return shared(*args, **kwargs)  # by the front door, where the base may have to be gathered from other ranks

    @staticmethod
    def _adding(down: Tensor, up: Tensor, scale: float) -> Any:
        return lambda module, args, out: out + scale * F.linear(F.linear(args[0], down), up)

    def __deepcopy__(self, memo: dict) -> Adapter:
        other = Adapter(self._shared[0])
        other.load_state_dict(self.state_dict())
        for mine, theirs in zip(self.parameters(), other.parameters()):
            theirs.requires_grad_(mine.requires_grad)
        return other.to(next(self.parameters()).device).train(self.training)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A copy of the base with W + (alpha / rank) B A as its weights: a network like any other."""
        shared = self._shared[0]
        net = copy.deepcopy(shared.net)
        for name, down, up in zip(shared.targets, self.down, self.up):
            weight = net.get_submodule(name).weight
            weight += shared.scale * (up @ down).to(weight)
        return net

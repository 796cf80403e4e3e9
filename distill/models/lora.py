r"""LoRA roles on one shared, frozen base network (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = W x + b + (alpha / rank) B A x,     A (rank, in) random, B (out, rank) zero at initialisation

Copying the shared base creates an adapter; copying an adapter creates another adapter of the same base. Student, critic
and EMA then hold rank (in + out) numbers per layer instead of in x out. The weights of the base are not modified:
an adapter adds its term by forward hooks, which are registered for one call.
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


def apply_layout(roles: dict[str, Any], layout: str, adapter: dict[str, Any] | None = None) -> None:
    """Applies `roles.layout`: `full` gives each role its own weights, `shared_base` wraps the teacher in `SharedBase`.

    Args:
        roles: networks by role; changed in place.
        layout: "full" or "shared_base".
        adapter: `rank`, `alpha` and `targets` of `SharedBase`.

    Raises:
        BadInput: for another layout, unknown adapter settings, or a teacher without network.
    """
    if layout not in ("full", "shared_base"):
        raise BadInput(f"roles.layout: '{layout}' must be full or shared_base.{suggest(str(layout), ['shared_base'])}")
    if layout == "full":
        if adapter:
            raise BadInput("roles.adapter needs roles.layout=shared_base: set the layout, or remove the adapter.")
        return
    teacher, known = roles.get("teacher"), ("rank", "alpha", "targets")
    net = teacher.net if isinstance(teacher, Denoiser) else None
    if net is None:
        raise BadInput("roles.layout: shared_base needs a teacher with a network, which the other roles share.")
    for key in adapter or {}:
        if key not in known:
            raise BadInput(f"roles.adapter.{key} is unknown.{suggest(key, known)} Its keys are {', '.join(known)}.")
    roles["teacher"].net = SharedBase(net, **adapter or {})


class SharedBase(Delegate):
    """A network whose copies (`copy.deepcopy`) are LoRA adapters.

    Args:
        net: the base network; not modified.
        rank, alpha: of every adapter; without `alpha` the factor alpha / rank is 1.
        targets: patterns with `*` for the names of linear layers, as in `named_modules()`.

    Raises:
        BadInput: if no linear layer matches a pattern.
    """

    def __init__(self, net: nn.Module, rank: int = 8, alpha: float | None = None, targets: list[str] | str = "*"):
        super().__init__()
        self.net, self.rank = net, rank
        self.scale = 1.0 if alpha is None else alpha / rank
        patterns = [targets] if isinstance(targets, str) else list(targets)
        linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
        self.targets = [name for name in linear if any(fnmatch(name, pattern) for pattern in patterns)]
        for pattern in patterns or [""]:
            if not any(fnmatch(name, pattern) for name in linear):
                raise BadInput(
                    f"roles.adapter.targets: no linear layer of {type(net).__name__} matches '{pattern}'."
                    f"{suggest(pattern, _endings(linear))}"
                )

    @property
    def wrapped(self) -> Network:
        return as_network(self.net)

    def forward(self, *args, **kwargs) -> Any:
        return self.net(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> LoRAAdapter:
        return LoRAAdapter(self)


def _endings(names: list[str]) -> list[str]:
    """Patterns to suggest: the names, and `*.` followed by their last one to three parts."""
    endings = set()
    for name in names:
        parts = name.split(".")
        endings |= {"*." + ".".join(parts[-n:]) for n in (1, 2, 3) if len(parts) > n}
    return names + sorted(endings)


class LoRAAdapter(Delegate):
    """The shared base plus low-rank terms. Only the low-rank factors are parameters and state of this module."""

    def __init__(self, shared: SharedBase):
        super().__init__()
        self._shared = (shared,)  # in a tuple, so that the base is not registered as a submodule
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name in shared.targets:
            weight = shared.net.get_submodule(name).weight
            down = torch.empty(shared.rank, weight.shape[1], device=weight.device, dtype=weight.dtype)
            self.down.append(nn.Parameter(nn.init.kaiming_uniform_(down, a=math.sqrt(5))))
            self.up.append(nn.Parameter(down.new_zeros(weight.shape[0], shared.rank)))

    @property
    def shared(self) -> SharedBase:
        """The base that this adapter belongs to."""
        return self._shared[0]

    @property
    def wrapped(self) -> Network:
        return self._shared[0].wrapped

    def forward(self, *args, **kwargs) -> Any:
        shared = self._shared[0]
        with ExitStack() as hooks:
            for name, down, up in zip(shared.targets, self.down, self.up):
                hook = self._lora_hook(down, up, shared.scale)
                hooks.callback(shared.net.get_submodule(name).register_forward_hook(hook).remove)
            return shared(*args, **kwargs)  # not shared.net: under FSDP the call gathers the weights of the base

    @staticmethod
    def _lora_hook(down: Tensor, up: Tensor, scale: float) -> Any:
        def add_term(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            return out + scale * F.linear(F.linear(args[0], down), up)

        return add_term

    def __deepcopy__(self, memo: dict) -> LoRAAdapter:
        copied = LoRAAdapter(self._shared[0])
        copied.load_state_dict(self.state_dict())
        for source, target in zip(self.parameters(), copied.parameters()):
            target.requires_grad_(source.requires_grad)
        return copied.to(next(self.parameters()).device).train(self.training)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A copy of the base network with the weights W + (alpha / rank) B A."""
        shared = self._shared[0]
        net = copy.deepcopy(shared.net)
        for name, down, up in zip(shared.targets, self.down, self.up):
            weight = net.get_submodule(name).weight
            weight += shared.scale * (up @ down).to(weight)
        return net

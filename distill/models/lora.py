r"""LoRA roles on one shared, frozen base network (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = W x + b + (alpha / rank) B A x,     A (rank, in) random, B (out, rank) zero at initialisation

Copying the shared base creates an adapter; copying an adapter creates another adapter of the same base. Student, critic
and EMA then hold rank (in + out) numbers per layer instead of in x out. The weights of the base are not modified:
an adapter adds its term by forward hooks, which are registered for one call, and again where activation checkpointing
repeats a part of it. Adapters are float32; the base may be bfloat16.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
                    f"roles.adapter.targets: no linear layer of {net._get_name()} matches '{pattern}'."
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
        self._checkpointed: list[nn.Module] = []  # parts of the base to recompute in the backward pass
        self._entered = False  # whether this adapter's hooks are on
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name in shared.targets:
            weight = shared.net.get_submodule(name).weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            down = torch.empty(shared.rank, weight.shape[1], device=weight.device, dtype=dtype)
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
        with self._hooks(), self._checkpointing():
            return self.shared(*args, **kwargs)  # not shared.net: under FSDP the call gathers the weights of the base

    def checkpoint_activations(self, parts: Sequence[nn.Module]) -> None:
        """Keep no activations inside parts of the base; stock diffusers networks choose their own parts."""
        self._checkpointed = list(parts)

    @contextmanager
    def _hooks(self, part: nn.Module | None = None) -> Iterator[None]:
        """Add this adapter's terms in the layers of a part of the base, or of all of it."""
        shared, inside = self.shared, None if part is None else set(part.modules())
        with ExitStack() as hooks:
            for name, down, up in zip(shared.targets, self.down, self.up):
                layer = shared.net.get_submodule(name)
                if inside is None or layer in inside:
                    hooks.callback(layer.register_forward_hook(_lora_hook(down, up, shared.scale)).remove)
            hooks.callback(setattr, self, "_entered", self._entered)
            self._entered = True
            yield

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Checkpoint the base's parts within this call so that the backward pass repeats them with this adapter's terms.

        The base's own checkpointing, which repeats them without, is replaced for the call.
        """
        if not torch.is_grad_enabled():
            yield
            return
        base, on = self.shared.base, bool(self._checkpointed)
        stock = [m for m in base.modules() if "gradient_checkpointing" in vars(m)]
        with ExitStack() as restore:
            for module in stock:
                if on or vars(module)["gradient_checkpointing"]:
                    restore.enter_context(_replaced(module, "gradient_checkpointing", True))
                    restore.enter_context(_replaced(module, "_gradient_checkpointing_func", self._checkpoint))
            for part in self._checkpointed if not stock else ():
                repeat = functools.partial(self._checkpoint, part.forward)
                restore.enter_context(_replaced(part, "forward", repeat))
            yield

    def _checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args)`, a part of the base or a method of one, whose activations are computed again when needed."""
        owner = function.__self__ if isinstance(function, MethodType) else function
        part = owner if isinstance(owner, nn.Module) else None

        def again(*args: Any, **kwargs: Any) -> Any:
            if self._entered:
                return function(*args, **kwargs)
            with self._hooks(part):
                return function(*args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, **kwargs)

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


def _lora_hook(down: Tensor, up: Tensor, scale: float) -> Callable[..., Tensor]:
    def add_term(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        x = args[0]
        if not torch.is_autocast_enabled("cpu" if x.is_meta else x.device.type):  # shapes are traced under the CPU's
            x = x.to(down.dtype)
        return out + (scale * F.linear(F.linear(x, down), up)).to(out.dtype)

    return add_term


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """A module's attribute with another value; afterwards it is as before, absent from the instance if it was."""
    attributes = vars(module)
    present, before = name in attributes, attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if present:
            attributes[name] = before
        else:
            del attributes[name]

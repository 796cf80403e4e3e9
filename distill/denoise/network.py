"""The interface of networks, and adapters to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Conditions = dict[str, Any]


class Network(nn.Module):
    """Interface of a backbone `net(x_t, t, **cond)`; the defaults are those of an unconditional network.

    Wrappers forward every attribute and method declared here (`Delegate`). A module that is not a Network is adapted by
    `as_network`.

    Attributes:
        shape: shape of one sample; empty if the network accepts any shape.
        classes: number of classes that `label` can take; 0 for none.
        null_class: whether the network accepts label -1, "no class".
        guided: whether the network takes the guidance scale as an input `w`.
        flow_map: whether the network takes a second time as an input `s`.
        conditions: names of the required condition tensors, such as "text".
        optional_conditions: names of the optional condition tensors.
        null_keeps: names of the `conditions` that the null condition does not replace.
        timesteps: number of discrete timesteps N; 0 if the network takes t in [0, 1].
        part: name of the network's component in a diffusers pipeline ("unet", "transformer").
        folder: path of the pipeline folder that the network was loaded from.
        source: (path or hub name, revision) as passed to `load`.
        scheduler_settings: those that `load` was given in place of the folder's.
    """

    shape: tuple[int, ...] = ()
    classes: int = 0
    null_class: bool = True
    guided: bool = False
    flow_map: bool = False
    conditions: tuple[str, ...] = ()
    optional_conditions: tuple[str, ...] = ()
    null_keeps: tuple[str, ...] = ()
    timesteps: int = 0
    part: str = ""
    folder: Any = None
    source: tuple[str, str | None] | None = None
    scheduler_settings: dict[str, Any] = {}

    def null(self, cond: Conditions) -> Conditions:
        """`cond` with the null condition: "label" becomes -1, "no class"."""
        return {k: torch.full_like(v, -1) if k == "label" else v for k, v in cond.items()}

    @property
    def needs_null(self) -> bool:
        """Whether the network was loaded without a null condition, which `set_null` must then provide."""
        return False

    def set_null(self, null: dict[str, Tensor] | None) -> nn.Module:
        """Set the null condition, tensors of one row by name; does nothing for networks without condition tensors."""
        return self

    @property
    def base(self) -> nn.Module:
        """The innermost network, whose layer names configs refer to: the network itself, or the one inside a wrapper."""
        return self

    def merged(self) -> nn.Module:
        """A network without wrappers: the changes of an adapter are added to its weights."""
        return self


PROTOCOL = tuple(name for name in vars(Network) if not name.startswith("_"))


class Delegate(Network):
    """Base class of wrappers: every name of PROTOCOL is read from `wrapped`, unless a subclass overrides it."""

    @property
    def wrapped(self) -> Network:
        """The wrapped network."""
        raise NotImplementedError


def _forwarded(name: str) -> property:
    return property(lambda self: getattr(self.wrapped, name))


for _name in PROTOCOL:
    setattr(Delegate, _name, _forwarded(_name))


class Foreign(Network):
    """Adapts a module that is not a Network: its attributes named in PROTOCOL, and defaults for those it lacks."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self._net = (net,)  # in a tuple, so that it is not registered as a submodule
        for name in PROTOCOL:
            if name not in ("base", "merged") and hasattr(net, name):
                self.__dict__[name] = getattr(net, name)

    @property
    def base(self) -> nn.Module:
        return self._net[0]

    def merged(self) -> nn.Module:
        return self._net[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._net[0](*args, **kwargs)


def as_network(net: nn.Module | None) -> Network:
    """`net` if it is a Network, else an adapter with the same interface; a default Network for None."""
    if net is None:
        return Network()
    return net if isinstance(net, Network) else Foreign(net)

"""Copies of networks, with or without shared memory, and freeing of parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from distill.denoise import network_of

_sharing: ContextVar[bool] = ContextVar("sharing", default=False)


@contextmanager
def share_weights() -> Iterator[None]:
    """Within this context `copy_network` shares the memory of the weights: for copies that are only read, or sharded next."""
    token = _sharing.set(True)
    try:
        yield
    finally:
        _sharing.reset(token)


def copy_network(network: nn.Module) -> nn.Module:
    """A deep copy of a network; its parameters share memory with the original within `share_weights()`."""
    shared = network.parameters() if _sharing.get() else ()
    return copy.deepcopy(network, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in shared})


def to_float32(network: nn.Module) -> None:
    """Convert 16-bit weights to float32: in 16 bits most of an optimizer's or an average's steps would be rounded away."""
    network._apply(lambda v: v.float() if v.is_floating_point() and v.element_size() < 4 else v)


def free_except(module: nn.Module, role: nn.Module) -> None:
    """Free the memory of all parameters of `module` except those of `role` and, if it is an adapter, of its base."""
    needed = {id(p) for m in (role, network_of(role).base) for p in m.parameters()}
    for p in module.parameters():
        if id(p) not in needed:
            p.data = p.data.new_empty(0)

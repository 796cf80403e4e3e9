"""The blocks of a network: what is sharded, and what activation checkpointing recomputes."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from distill.denoise import has_network
from distill.models.lora import LoRAAdapter


def root(role: nn.Module) -> nn.Module:
    """The module that a role's forward passes call: a Denoiser's network (`native` calls it too), or the role itself."""
    net = role.net if has_network(role) else None
    inside = net is not None and {id(p) for p in role.parameters()} <= {id(p) for p in net.parameters()}
    return net if inside else role


def blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost repeated blocks: the items of the network's ModuleLists that are called as modules."""
    found = []
    for child in network.children():
        items = list(child) if isinstance(child, nn.ModuleList) else []
        called = [m for m in items if type(m).forward is not nn.Module.forward and any(True for _ in m.parameters())]
        found += called if items else blocks(child)
    return found


def recompute(role: nn.Module) -> None:
    """Activation checkpointing: activations inside blocks are recomputed in the backward pass."""
    network = root(role)
    if isinstance(network, LoRAAdapter):
        base = network.base
        network.checkpoint_activations(blocks(base) or [base])
        return
    stock = [m for m in network.modules() if hasattr(m, "enable_gradient_checkpointing")]
    for module in stock:
        module.enable_gradient_checkpointing()
    for block in [] if stock else blocks(network) or [network]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

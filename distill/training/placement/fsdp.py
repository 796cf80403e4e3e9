"""FSDP2: networks sharded along the first dimension of their parameters."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distill.methods.placement import Placement, Replicas, tensors
from distill.training.placement.blocks import blocks, root


class Sharded(Replicas):
    """FSDP2: every network, also frozen and averaged ones, is sharded along the first dimension of its parameters.

    Args:
        offload: keep shards, gradients and moments on the CPU.
    """

    sharded = fresh = True

    def __init__(self, accumulate: int = 1, scale: bool = False, offload: bool = False):
        super().__init__(accumulate, scale)
        self.offload = offload

    def prepare(self, method: Any) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        self.rank, self.world, self.method = dist.get_rank(), dist.get_world_size(), method
        torch.set_autocast_cache_enabled(False)  # it would keep whole networks, cast, until the step ends
        self.start_alike()
        mesh = init_device_mesh(self.device.type, (self.world,))
        policy = {"offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda")} if self.offload else {}
        self.units: list[nn.Module] = []
        opened: set[nn.Module] = set()
        for name in self.names:
            if tensors(self.module(name)):
                network, seen = root(self.module(name)), set()
                for part in [*blocks(network), network]:  # a root too gives its weights back after each call:
                    fully_shard(part, mesh=mesh, reshard_after_forward=True, **policy)  # an optimizer may step between
                    for layer in part.modules():
                        if layer not in seen:
                            layer.register_forward_hook(functools.partial(_wake, part))
                            layer.register_forward_pre_hook(functools.partial(_open, opened, part))
                            layer.register_forward_hook(functools.partial(_close, opened, part), always_call=True)
                    seen.update(part.modules())
                    self.units.append(part)
        method.to(self.device) if not self.offload else None
        Placement.prepare(self, method)
        self.draw_apart()

    def backward(self, role: str, loss: Tensor, last: bool = True) -> None:
        super().backward(role, loss, last)
        for unit in self.units:  # units of which only features were read
            unit.reshard()

    def reduce(self, role: str) -> None:
        """FSDP2 has averaged them in the backward pass."""

    def whole(self, value: Any) -> Any:
        """A full copy of `value` on the CPU of rank 0; a collective, None on other ranks."""
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if self.rank:
            return None
        gathered = full is not value and self.world > 1 or isinstance(full, Tensor) and full.device.type != "cpu"
        return full if not isinstance(full, Tensor) else full.detach().cpu() if gathered else full.detach().clone()

    def weights(self, name: str) -> dict[str, Tensor]:
        found = {k: self.whole(v) for k, v in self.module(name).state_dict().items()}
        return found if self.rank == 0 else {}

    @torch.no_grad()
    def load_weights(self, name: str, weights: dict[str, Tensor]) -> None:
        for key, target in self.module(name).state_dict().items():
            target.copy_(_like(target, weights[key]))

    def moments(self, role: str) -> dict[str, Any]:
        found = self.optimizers[role].state_dict()
        found["state"] = {i: {k: self.whole(v) for k, v in s.items()} for i, s in found["state"].items()}
        return found | self._scale_state(role)

    def load_moments(self, role: str, state: dict[str, Any]) -> None:
        whole = zip(self.parameters(role), state["state"].items())
        cut = {i: {k: _like(p, v) if v.shape == p.shape else v for k, v in s.items()} for p, (i, s) in whole}
        super().load_moments(role, state | {"state": cut})


def _wake(unit: nn.Module, layer: nn.Module, args: Any, out: Any) -> None:
    """Gather a unit's weights before the backward pass enters one of its layers.

    FSDP2 gathers them when the gradient enters at the unit's output; the gradient of a head that reads a layer's
    features enters inside the unit.
    """
    for value in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_grad_enabled() else ():
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(lambda _: unit.unshard())


def _open(opened: set[nn.Module], unit: nn.Module, layer: nn.Module, args: Any) -> None:
    """Gather a unit's weights for a layer that is called from outside the unit, such as an embedding in the first block."""
    if any(isinstance(p, DTensor) for p in layer.parameters(recurse=False)):
        opened.add(layer)
        unit.unshard()


def _close(opened: set[nn.Module], unit: nn.Module, layer: nn.Module, args: Any, out: Any) -> None:
    if layer in opened:
        opened.remove(layer)
        unit.reshard()


def _like(target: Tensor, whole: Tensor) -> Tensor:
    """This rank's shard of a tensor that every rank holds."""
    if not isinstance(target, DTensor):
        return whole
    whole = whole.to(target.to_local().device, target.dtype)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)

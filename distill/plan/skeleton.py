"""A config's objects without their weights: networks on the meta device, data as shapes where there is none yet."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from distill import config
from distill.data.info import Info
from distill.denoise import network_of
from distill.engine.ranks import recompute
from distill.errors import BadInput
from distill.plan.trace import networks
from distill.session import Session, assemble

LARGE = 2**30  # bytes of weights that are held at most, for networks that cannot be built as shapes


class Stand:
    """Batches of the right shapes, for data that is not here.

    Args:
        shape, classes: of the samples; classes 0 gives no labels.
        batch_size: samples a batch.
    """

    samples = True

    def __init__(self, shape: list[int], classes: int = 0, batch_size: int = 1):
        self.info, self.batch_size = Info(tuple(shape), classes, source="shapes alone"), batch_size

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[dict[str, Tensor]]:
        label = {"label": torch.zeros(self.batch_size, dtype=torch.long)} if self.info.classes else {}
        return repeat({"x": torch.randn(self.batch_size, *self.info.shape)} | label)


def session_of(cfg: Any, allow: tuple[str, ...] = (), real: bool = False) -> tuple[Session, list[str]]:
    """The config's session with every network on the meta device, and what should be known of it.

    `real` builds them as a run does.

    Raises:
        BadInput: as `session.assemble`; data that is not here for a network whose conditions are tensors.
    """
    cfg, notes = OmegaConf.create(cfg), []
    path = cfg.data.get("path") if cfg.data else None
    if isinstance(path, str) and not any(c in path for c in "{*?[") and not Path(path).expanduser().exists():
        notes.append(f"{path} does not exist; samples of the network's shape stand for it.")
        cfg.data = _stand(cfg, allow)
    session = assemble(cfg, allow, config.build if real else build)
    for role in session.method.trainable if cfg.engine.checkpoint_activations else ():
        recompute(getattr(session.method, role))
    for module in () if real else networks(session.method).values():
        module.to("meta")
    method = session.method
    method._parameters_of = {r: list(getattr(method, r).parameters()) for r in method.trainable}
    return session, notes


def build(node: Any, allow: tuple[str, ...] = (), where: str = "", **given: Any) -> Any:
    """`config.build`, but networks are shapes."""
    from distill.nets.diffusers import folder

    with folder.shapes_alone():
        return config.build(_with_networks(OmegaConf.to_container(node, resolve=True), allow, where), allow, where, **given)


def _with_networks(node: Any, allow: tuple[str, ...], where: str) -> Any:
    """`node` with every `net` built on the meta device."""
    if not isinstance(node, dict):
        return node
    out = {}
    for key, value in node.items():
        at = f"{where}.{key}" if where else key
        if key == "net" and isinstance(value, dict) and config.TARGET in value:
            out[key] = _network(value, allow, at)
        else:
            out[key] = _with_networks(value, allow, at)
    return out


def _network(node: dict, allow: tuple[str, ...], where: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return config.build(node, allow, where)
    except BadInput as error:
        if error.__cause__ is None:
            raise
    except (NotImplementedError, RuntimeError):
        pass
    return config.build(node, allow, where)  # it needs values while it is built


def _stand(cfg: Any, allow: tuple[str, ...]) -> dict[str, Any]:
    roles = build(cfg.roles, allow, "roles")
    nets = [net for r in roles.values() if (net := network_of(r)).shape]
    if not nets or nets[0].told:
        raise BadInput(f"data.path: {cfg.data.path} does not exist, and the network's conditions have the shapes of the "
                       "data; write it first, a few samples are enough.")  # fmt: skip
    return {config.TARGET: f"{Stand.__module__}.{Stand.__name__}", "shape": list(nets[0].shape),
            "classes": nets[0].classes, "batch_size": cfg.data.get("batch_size", 1)}  # fmt: skip

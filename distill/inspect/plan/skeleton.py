"""A config's objects without weights: networks on the meta device, random data if the data does not exist yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill import config
from distill.data.toy import ShapeData
from distill.denoise import network_of
from distill.errors import BadInput
from distill.inspect.plan.trace import networks
from distill.training.experiment import Experiment, build_experiment
from distill.training.placement.blocks import recompute

LARGE = 2**30  # largest size in bytes of a network that is built with weights because it cannot be on the meta device


def experiment_of(cfg: Any, allow: tuple[str, ...] = (), real: bool = False) -> tuple[Experiment, list[str]]:
    """The config's experiment with every network on the meta device, and notes about it.

    Args:
        real: build the networks with weights, as a run does.

    Raises:
        BadInput: as `build_experiment`; missing data for a network with tensor conditions.
    """
    cfg, notes = config.merge(cfg, {}), []  # a copy
    path = cfg.data.get("path") if cfg.data else None
    if isinstance(path, str) and not any(c in path for c in "{*?[") and not Path(path).expanduser().exists():
        notes.append(f"{path} does not exist; random samples of the network's shape are used instead.")
        cfg.data = _stand(cfg, allow)
    experiment = build_experiment(cfg, allow, config.build if real else build)
    for role in experiment.method.trainable if cfg.engine.checkpoint_activations else ():
        recompute(getattr(experiment.method, role))
    for module in () if real else networks(experiment.method).values():
        module.to("meta")
    method = experiment.method
    method._parameters_of = {r: list(getattr(method, r).parameters()) for r in method.trainable}
    return experiment, notes


def build(node: Any, allow: tuple[str, ...] = (), where: str = "", **given: Any) -> Any:
    """`config.build` with networks on the meta device."""
    from distill.models.diffusers import folder

    with folder.shapes_only():
        return config.build(_with_networks(config.plain(node, resolve=True), allow, where), allow, where, **given)


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
    return config.build(node, allow, where)  # its constructor needs values


def _stand(cfg: Any, allow: tuple[str, ...]) -> dict[str, Any]:
    roles = build(cfg.roles, allow, "roles")
    nets = [net for r in roles.values() if (net := network_of(r)).shape]
    if not nets or nets[0].conditions:
        raise BadInput(
            f"data.path: {cfg.data.path} does not exist, and the network's conditions have the shapes of the "
            "data; write it first, a few samples are enough."
        )
    return {
        config.TARGET: f"{ShapeData.__module__}.{ShapeData.__name__}",
        "shape": list(nets[0].shape),
        "classes": nets[0].classes,
        "batch_size": cfg.data.get("batch_size", 1),
    }

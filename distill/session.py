"""A config's objects, put together and fitted to each other: what every verb of the command line begins with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from distill import config
from distill.errors import BadInput
from distill.eval import suite
from distill.methods import Diffusion
from distill.methods.base import Method
from distill.nets.lora import lay_out
from distill.place import optimizer_of
from distill.schema import Optim


@dataclass
class Session:
    """A config's objects."""

    cfg: DictConfig
    method: Method
    data: Any
    allow: tuple[str, ...] = ()
    preempted: bool = False

    @property
    def teacher(self) -> Any:
        """The reference model: the frozen teacher, the averaged student of a run that trains a teacher, else None."""
        teacher = getattr(self.method, "teacher", None)
        return self.method.ema if teacher is None and isinstance(self.method, Diffusion) else teacher

    def noise(self, n: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """n fixed noises and balanced labels."""
        z = torch.randn(n, *self.method.shape, generator=torch.Generator().manual_seed(seed))
        classes = self.data.info.classes
        return z, {"label": torch.arange(n) % classes} if classes else {}

    def suite(self) -> Any:
        """What to measure: an exact law where the data comes from an oracle, else the data's own split."""
        if hasattr(self.data, "source") and hasattr(self.data.source, "log_prob"):
            return suite.Toy(self.data.source)
        real, held_out = self.data.all(), None
        if self.cfg.eval.reference:
            _check_path(self.cfg.eval.reference, "eval.reference")
            held_out = config.build(self.cfg.eval.reference, self.allow, "eval.reference").all()["x"]
        if "x" not in real:
            raise BadInput("data holds conditions alone, to which no sample compares; use distill.data.shards.Shards.")
        return suite.Images(real["x"], real.get("label"), held_out)


def assemble(cfg: DictConfig, allow: tuple[str, ...] = (), build: Any = config.build) -> Session:
    """Seed, then build data, roles (by `build`) and method, and check that they fit each other."""
    for key in ("method", "data", "roles"):
        if not cfg[key]:
            raise BadInput(f"The config has no '{key}'; start from one in configs/, for example configs/toy/tdm.yaml.")
    for key in ("method", "data"):
        if not cfg[key].get(config.TARGET):
            raise BadInput(f"{key}._target_ is missing; name a class, for example distill.{key}s.TDM for a method.")
    _check_path(cfg.data, "data")
    torch.manual_seed(cfg.seed)
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    data = config.build(cfg.data, allow, "data")
    if not (hasattr(data, "info") and hasattr(data, "loader")):
        raise BadInput(f"data._target_: {cfg.data[config.TARGET]} is no source of data; name one of distill.data.")
    roles = _roles(cfg, allow, build)
    optim = {role: Optim(**settings) for role, settings in cfg.optim.items()}
    method = config.build(cfg.method, allow, "method", roles=roles, optim=optim)
    if not isinstance(method, Method):
        raise BadInput(f"method._target_: {cfg.method['_target_']} is not a Method; name one of distill.methods.")
    _fits(method, data)
    _trains(method)
    return Session(cfg, method, data, allow)


def _trains(method: Method) -> None:
    """Refuse settings that an optimiser does not take, while nothing is written."""
    for role, settings in method.optim.items():
        weights = list(getattr(method, role).parameters())
        if not weights:
            raise BadInput(f"roles.{role} has no weights to train; give it a network of distill.nets.")
        try:
            optimizer_of(settings, weights, role)
        except BadInput:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            text = str(error).splitlines()[0]
            raise BadInput(f"optim.{role}: torch.optim.{settings.name} refuses its settings: {text}") from error


def _roles(cfg: DictConfig, allow: tuple[str, ...], build: Any) -> dict[str, Any]:
    roles = build(cfg.roles, allow, "roles")
    layout, settings = (roles.pop(k, None) if isinstance(roles, dict) else None for k in ("layout", "adapter"))
    for name, role in roles.items() if isinstance(roles, dict) else [("_target_", None)]:
        if not isinstance(role, (torch.nn.Module, str)):
            raise BadInput(f"roles.{name} is no network; give it a _target_, such as distill.denoise.Denoiser.")
    lay_out(roles, layout or "full", settings)
    return roles


def _check_path(settings: DictConfig, key: str) -> None:
    """Refuse a source whose files are not there, and name the command that makes them."""
    path = settings.get("path")
    if not isinstance(path, str) or any(c in path for c in "{*?[") or Path(path).expanduser().exists():
        return
    out = Path(path).parent if Path(path).name in ("train", "test") else Path(path)
    kind = "digits" if "digits" in out.parts else "images PHOTOS"
    kind = "pairs CONFIG" if settings[config.TARGET].endswith("Pairs") else kind
    raise BadInput(f"{key}.path: {path} does not exist; make it by `distill data {kind} {out}`, or correct the path.")


def _fits(method: Method, data: Any) -> None:
    """Refuse data that a network of the method cannot take."""
    info, where = data.info, f"data ({data.info.path or data.info.source})"
    if method.needs_data and not getattr(data, "samples", True):
        raise BadInput(f"{where} holds no samples, and {type(method).__name__} trains on them: take a source with data, "
                       "for example distill.data.shards.Shards.")
    for role in (*method.trainable, *method.frozen):
        net = getattr(getattr(method, role), "net", None)
        shape, classes = tuple(getattr(net, "shape", info.shape)), getattr(net, "classes", 0)
        if shape != tuple(info.shape):
            raise BadInput(
                f"{where} holds samples of shape {tuple(info.shape)}, the network of {role} expects {shape}; "
                f"change roles.{role}.net or the data."
            )
        if info.classes and classes not in (0, info.classes):
            raise BadInput(
                f"{where} holds {info.classes} classes, the network of {role} expects {classes}; "
                "set the network's classes to match."
            )

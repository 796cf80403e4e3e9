"""A config's objects, put together and fitted to each other: what every verb of the command line begins with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from distill import config
from distill.errors import BadInput
from distill.eval import suite
from distill.eval.latents import Latents
from distill.match import fits
from distill.methods import Diffusion
from distill.methods.base import Method
from distill.nets.lora import lay_out
from distill.nets.rewards import decoder
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
    stopped: str = ""  # why a run that came to a plateau ended before its last step
    validation: Any = None  # of the run that was trained: its alarms and the teacher's lines

    @property
    def teacher(self) -> Any:
        """The reference model: the frozen teacher, the averaged student of a run that trains a teacher, else None."""
        teacher = getattr(self.method, "teacher", None)
        return self.method.ema if teacher is None and isinstance(self.method, Diffusion) else teacher

    def noise(self, n: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """n fixed noises, and balanced labels or the first n conditions of the data."""
        z = torch.randn(n, *self.method.shape, generator=torch.Generator().manual_seed(seed))
        if members := getattr(self.data.info, "members", None):
            rows = self.data.all(n)
            return z, {k: rows[k][torch.arange(n) % len(rows[k])] for k in members}
        classes = self.data.info.classes
        return z, {"label": torch.arange(n) % classes} if classes else {}

    def suite(self) -> Any:
        """What to measure: an exact law where the data comes from an oracle, else the data's own split."""
        if hasattr(self.data, "source") and hasattr(self.data.source, "log_prob"):
            return suite.Toy(self.data.source)
        if getattr(self.data.info, "members", None) or getattr(self.data.info, "encoder", None):
            return self._latents()
        real, held_out = self.data.all(), None
        if self.cfg.eval.reference:
            _check_path(self.cfg.eval.reference, "eval.reference")
            held_out = config.build(self.cfg.eval.reference, self.allow, "eval.reference").all()["x"]
        if "x" not in real:
            raise BadInput("data holds conditions alone, to which no sample compares; use distill.data.shards.Shards.")
        metric = getattr(self.method, "metric", None)
        reward = None if getattr(metric, "paired", False) else metric
        return suite.Images(real["x"], real.get("label"), held_out, reward, metrics=self._metrics(), decode=self._decode(),
                            allow=self.allow)  # fmt: skip

    def _metrics(self) -> Any:
        return OmegaConf.to_container(self.cfg.eval)["metrics"]

    def _decode(self, folder: Any = None) -> Any:
        """Latents to pixels by the autoencoder of `eval.decode`, else of `folder`; None without one."""
        folder = self.cfg.eval.decode or folder
        return decoder(str(folder), "cuda" if torch.cuda.is_available() else "cpu") if folder else None

    def _latents(self) -> Latents:
        """Against the data's latents, or those of `eval.reference`; against nothing where there are conditions alone."""
        most, held_out, folder = self.cfg.eval.samples, None, getattr(getattr(self.teacher, "net", None), "folder", None)
        x = self.data.all(most, conditions=False).get("x")
        if self.cfg.eval.reference:
            _check_path(self.cfg.eval.reference, "eval.reference")
            held_out = config.build(self.cfg.eval.reference, self.allow, "eval.reference").all(most, conditions=False)["x"]
        x, held_out = (held_out, None) if x is None else (x, held_out)
        folder = folder if folder is not None and (folder / "vae").is_dir() else None
        captions = (lambda n: self.data.all(n, conditions=False)["caption"]) if self.data.info.captions else None
        return Latents(x, self._decode(folder), held_out, metrics=self._metrics(), captions=captions, allow=self.allow)


def assemble(cfg: DictConfig, allow: tuple[str, ...] = ()) -> Session:
    """Seed, then build data, roles and method, and check that they fit each other."""
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
    roles = _roles(cfg, allow)
    _remember(roles, data)
    if hasattr(data, "together"):
        data.together = cfg.engine.accumulate
    optim = {role: Optim(**settings) for role, settings in cfg.optim.items()}
    method = config.build(cfg.method, allow, "method", roles=roles, optim=optim)
    if not isinstance(method, Method):
        raise BadInput(f"method._target_: {cfg.method['_target_']} is not a Method; name one of distill.methods.")
    fits(method, data)
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


def _remember(roles: dict[str, Any], data: Any) -> None:
    """Networks that were loaded without a null condition take the one beside the data's index."""
    for role in roles.values():
        net = getattr(role, "net", None)
        if hasattr(net, "remember") and not net.null_zero and not any(n.startswith("null_") for n, _ in net.named_buffers()):
            if (null := getattr(data, "null", None)) is not None:
                net.remember(null)


def _roles(cfg: DictConfig, allow: tuple[str, ...]) -> dict[str, Any]:
    roles = config.build(cfg.roles, allow, "roles")
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
    kind = "encode PHOTOS --pipeline P --buckets" if settings[config.TARGET].endswith("Buckets") else kind
    raise BadInput(f"{key}.path: {path} does not exist; make it by `distill data {kind} {out}`, or correct the path.")

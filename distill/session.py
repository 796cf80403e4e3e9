"""A config's objects, put together and fitted to each other: what every verb of the command line begins with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from distill import config
from distill.denoise import Guided, network_of
from distill.errors import BadInput
from distill.eval import baselines, latents, suite
from distill.match import fits
from distill.methods import Diffusion
from distill.methods.base import Method
from distill.nets.lora import lay_out
from distill.nets.rewards import decoder
from distill.place import optimizer_of
from distill.schema import Optim

SAMPLES = ("x", "z", "label", "loser", "path", "times")  # of a batch, what is no condition that a network is told as a tensor


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
        """The reference model: the frozen teacher, the averaged student of a run that trains a teacher, else None.

        One that is told tensors is guided as the method guides it: its samples are what the student is to reach.
        """
        teacher = getattr(self.method, "teacher", None)
        if teacher is not None and self.told and self.method.guidance != 1:
            return Guided(teacher, self.method.guidance)
        return self.method.ema if teacher is None and isinstance(self.method, Diffusion) else teacher

    @cached_property
    def told(self) -> bool:
        """Whether the data brings conditions that are tensors, such as text, besides samples and labels."""
        return not self.data.info.classes and bool(self._rows(1))

    @property
    def rows(self) -> int:
        """Samples that are made in one call."""
        return self.data.batch_size if self.told else 1000

    def noise(self, n: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """n fixed noises and conditions: balanced labels, or those of the data's first rows, each for two noises."""
        z = torch.randn(n, *self.method.shape, generator=torch.Generator().manual_seed(seed))
        classes = self.data.info.classes
        return z, {"label": torch.arange(n) % classes} if classes else self._rows(n)

    def _rows(self, n: int) -> dict[str, Tensor]:
        batch = self.data.all(-(-n // 2))
        told = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k not in SAMPLES}
        return {k: v[torch.arange(n) % len(v)] for k, v in told.items()}

    def suite(self, folder: Path | None = None) -> Any:
        """What to measure: an exact law where the data comes from an oracle, else the data's own split; latents that are
        made under tensors against the data's, or where it has none, against the teacher's, which `folder` keeps."""
        if hasattr(self.data, "source") and hasattr(self.data.source, "log_prob"):
            return suite.Toy(self.data.source)
        if self.told or getattr(self.data.info, "encoder", None):
            return self._latents(folder)
        real, held_out = self.data.all(), self._held_out()
        if "x" not in real:
            raise BadInput("data holds conditions alone, to which no sample compares; use distill.data.shards.Shards.")
        metric = getattr(self.method, "metric", None)
        reward = None if getattr(metric, "paired", False) else metric
        return suite.Images(real["x"], real.get("label"), held_out, reward, metrics=self._metrics(),
                            decode=_decoder(self.cfg.eval.decode), allow=self.allow)  # fmt: skip

    def _metrics(self) -> Any:
        return OmegaConf.to_container(self.cfg.eval)["metrics"]

    def _captions(self, n: int) -> list[str]:
        """Those of the rows that `noise` takes its conditions from."""
        light = {"conditions": False} if getattr(self.data.info, "members", None) else {}
        found = self.data.all(-(-n // 2), **light)["caption"]
        return [found[i % len(found)] for i in range(n)]

    def _held_out(self, *most: int) -> Tensor | None:
        if not self.cfg.eval.reference:
            return None
        _check_path(self.cfg.eval.reference, "eval.reference")
        return _samples(config.build(self.cfg.eval.reference, self.allow, "eval.reference"), *most)

    def _latents(self, folder: Path | None) -> latents.Latents:
        settings, decode = self.cfg.roles.get("teacher") or {}, None
        if str(settings.get(config.TARGET, "")).endswith("diffusers.load"):
            decode = latents.decoder(settings["path"], lambda: next(self.method.student.parameters()).device)
        asked = {"metrics": self._metrics(), "allow": self.allow,
                 "look": _decoder(self.cfg.eval.decode or (settings["path"] if decode else None)),
                 "captions": self._captions if getattr(self.data.info, "captions", False) else None}  # fmt: skip
        count, seed, steps = self.cfg.eval.samples, self.cfg.eval.seed + 1, max(self.cfg.eval.evaluations)
        held_out, own = self._held_out(count), getattr(self.data, "samples", True)
        if own or held_out is not None:
            x, other = (_samples(self.data, count), held_out) if own else (held_out, None)
            return latents.Latents(x, decode=decode, held_out=other, **asked)
        if self.teacher is None:
            raise BadInput("data holds conditions alone, and without a teacher no sample compares to them; use "
                           "distill.data.shards.Shards.")  # fmt: skip
        price = 2 if isinstance(self.teacher, Guided) else 1

        def reference() -> Tensor:
            z, cond = self.noise(count, seed)
            made = baselines.baseline(self.teacher, z, cond, (steps * price,), ("ddim",), ("uniform",), batch=self.rows)
            return made[steps * price]["ddim/uniform"]

        key = f"{settings.get('path')}, {count} samples of seed {seed}, {steps} steps, w = {self.method.guidance:g}"
        return latents.Latents(reference, folder and Path(folder) / "reference.safetensors", key, decode, **asked)


def _decoder(folder: str | None) -> Any:
    return decoder(folder, "cuda" if torch.cuda.is_available() else "cpu") if folder else None


def _samples(data: Any, *most: int) -> Tensor:
    """x of a source, without the conditions where it can leave them."""
    return data.all(*most, **{"conditions": False} if getattr(data.info, "members", None) else {})["x"]


def assemble(cfg: DictConfig, allow: tuple[str, ...] = (), build: Any = config.build) -> Session:
    """Seed, then build data, roles (by `build`) and method, and check that they fit each other."""
    for key in ("method", "data", "roles"):
        if not cfg[key]:
            raise BadInput(f"The config has no '{key}'; start from one in configs/, for example configs/toy/tdm.yaml.")
    for key in ("method", "data"):
        if not cfg[key].get(config.TARGET):
            raise BadInput(f"{key}._target_ is missing; name a class, for example distill.{key}s.TDM for a method.")
    _check_path(cfg.data, "data", cfg.roles)
    torch.manual_seed(cfg.seed)
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    data = config.build(cfg.data, allow, "data")
    if not (hasattr(data, "info") and hasattr(data, "loader")):
        raise BadInput(f"data._target_: {cfg.data[config.TARGET]} is no source of data; name one of distill.data.")
    roles = _roles(cfg, allow, build)
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
        net, null = network_of(role), getattr(data, "null", None)
        if net.needs_null and null is not None:
            net.remember(null)


def _roles(cfg: DictConfig, allow: tuple[str, ...], build: Any) -> dict[str, Any]:
    roles = build(cfg.roles, allow, "roles")
    layout, settings = (roles.pop(k, None) if isinstance(roles, dict) else None for k in ("layout", "adapter"))
    for name, role in roles.items() if isinstance(roles, dict) else [("_target_", None)]:
        if not isinstance(role, (torch.nn.Module, str)):
            raise BadInput(f"roles.{name} is no network; give it a _target_, such as distill.denoise.Denoiser.")
    lay_out(roles, layout or "full", settings)
    return roles


def _check_path(settings: DictConfig, key: str, roles: Any = None) -> None:
    """Refuse a source whose files are not there, and name the command that makes them."""
    path = settings.get("path")
    if not isinstance(path, str) or any(c in path for c in "{*?[") or Path(path).expanduser().exists():
        return
    out = Path(path).parent if Path(path).name in ("train", "test") else Path(path)
    kind = "digits" if "digits" in out.parts else "images PHOTOS"
    kind = "pairs CONFIG" if settings[config.TARGET].endswith("Pairs") else kind
    teacher = (roles or {}).get("teacher") or {}
    if settings[config.TARGET].endswith("Buckets"):
        kind = "encode PHOTOS --pipeline P --buckets"
    elif kind == "images PHOTOS" and str(teacher.get(config.TARGET, "")).endswith("diffusers.load"):
        kind, out = "prompts FILE" if out.name.endswith("prompts") else "encode SOURCE", f"{out} --pipeline {teacher['path']}"
    raise BadInput(f"{key}.path: {path} does not exist; make it by `distill data {kind} {out}`, or correct the path.")

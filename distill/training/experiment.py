"""A config's objects, built and checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import config
from distill.config import DictConfig, recipes
from distill.config.schema import Optim
from distill.data.base import Dataset
from distill.denoise import Guided, network_of
from distill.errors import BadInput, near_path, suggest
from distill.files import read_json
from distill.methods import Diffusion
from distill.methods.base import Method
from distill.methods.optim import OWN, optimizer_of
from distill.metrics import latents, suite
from distill.metrics.evaluate import ddim_sampler
from distill.metrics.rewards import decoder
from distill.metrics.shared_draw import SharedDraw, without_noise
from distill.metrics.shares import SampleShares
from distill.models.lora import apply_layout
from distill.training.compatibility import check_compatible

SAMPLES = (
    "x",
    "z",
    "label",
    "loser",
    "path",
    "times",
)  # batch keys that are not tensor conditions of a network


@dataclass
class Experiment:
    """A config's objects."""

    cfg: DictConfig
    method: Method
    data: Dataset
    allow: tuple[str, ...] = ()
    preempted: bool = False
    stopped: str = ""  # why the run stopped early (train.patience)
    validation: Any = None  # the Validation callback of the trained run: alarms, teacher baseline

    @property
    def teacher(self) -> Any:
        """The reference model: the frozen teacher; in a run that trains a teacher its averaged student; else None.

        With tensor conditions it has the method's guidance, since its guided samples are the student's target.
        """
        teacher = self.method.role("teacher")
        if teacher is not None and self.conditions and self.method.guidance != 1:
            return Guided(teacher, self.method.guidance)
        return self.method.ema if teacher is None and isinstance(self.method, Diffusion) else teacher

    @cached_property
    def conditions(self) -> bool:
        """Whether batches have tensor conditions, such as text embeddings, besides samples and labels."""
        return not self.data.info.classes and bool(self._rows(1))

    @property
    def batch_rows(self) -> int:
        """Batch size of sampling."""
        return self.data.batch_size if self.conditions else 1000

    def noise(self, n: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """n fixed noises and conditions: balanced labels, or the conditions of the data's first rows, twice each."""
        z = torch.randn(n, *self.method.shape, generator=torch.Generator().manual_seed(seed))
        classes = self.data.info.classes
        return z, {"label": torch.arange(n) % classes} if classes else self._rows(n)

    def _rows(self, n: int) -> dict[str, Tensor]:
        batch = self.data.all(-(-n // 2))
        conditions = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k not in SAMPLES}
        return {k: v[torch.arange(n) % len(v)] for k, v in conditions.items()}

    def suite(self, folder: Path | None = None) -> Any:
        """The metrics of this data: against an exact distribution for toys; against the data's samples for images; for latents
        under tensor conditions against the data's, or without samples against the teacher's, saved in `folder`."""
        if self.data.oracle is not None:
            return suite.ToySuite(self.data.oracle, metrics=self._metrics())
        if self.conditions or self.data.info.encoder:
            return self._latents(folder)
        real, held_out = self.data.all(), self._held_out()
        if "x" not in real:
            raise BadInput(
                "The dataset has conditions but no samples, so metrics have no reference: set eval.reference, or train on "
                "distill.data.shards.Shards."
            )
        metric = self.method.metric
        reward = None if getattr(metric, "paired", False) else metric
        return suite.ImageSuite(
            real["x"],
            real.get("label"),
            held_out,
            reward,
            metrics=self._metrics(),
            decode=_decoder(self.cfg.eval.decode),
            allow=self.allow,
        )

    def _metrics(self) -> Any:
        return config.plain(self.cfg.eval)["metrics"]

    def _captions(self, n: int) -> list[str]:
        """The captions of the rows whose conditions `noise` uses."""
        found = self.data.all(-(-n // 2), conditions=False)["caption"]
        return [found[i % len(found)] for i in range(n)]

    def _held_out(self, *most: int) -> Tensor | None:
        if not self.cfg.eval.reference:
            return None
        _check_path(self.cfg.eval.reference, "eval.reference")
        return _samples(config.build(self.cfg.eval.reference, self.allow, "eval.reference"), *most)

    def _latents(self, folder: Path | None) -> latents.LatentSuite:
        settings, decode = self.cfg.roles.get("teacher") or {}, None
        if str(settings.get(config.TARGET, "")).endswith("diffusers.load"):
            decode = latents.transient_decoder(settings["path"], lambda: next(self.method.student.parameters()).device)
        options = {
            "metrics": self._metrics(),
            "allow": self.allow,
            "look": _decoder(self.cfg.eval.decode or (settings["path"] if decode else None)),
            "captions": self._captions if self.data.info.captions else None,
        }
        count, seed, steps = self.cfg.eval.samples, self.cfg.eval.seed + 1, max(self.cfg.eval.evaluations)
        held_out, own = self._held_out(count), self.data.samples
        if own or held_out is not None:
            x, other = (_samples(self.data, count), held_out) if own else (held_out, None)
            return latents.LatentSuite(x, decode=decode, held_out=other, **options)
        if self.teacher is None:
            raise BadInput(
                "The dataset has conditions but no samples, and there is no teacher to draw a reference from: set "
                "eval.reference, or train on distill.data.shards.Shards."
            )
        precision = self.cfg.engine.precision

        def reference(ranks: SampleShares) -> Tensor:
            draw = SharedDraw(*self.noise(count, seed), self.batch_rows, ranks, precision)
            return ranks.gather_to_all(draw(without_noise(ddim_sampler(self.teacher, steps)), self.teacher))

        key = f"{settings.get('path')}, {count} samples of seed {seed}, {steps} steps, w = {self.method.guidance:g}"
        key += "" if precision == "32" else f", {precision}"
        return latents.LatentSuite(reference, folder and Path(folder) / "reference.safetensors", key, decode, **options)


def _decoder(folder: str | None) -> Any:
    return decoder(folder, "cuda" if torch.cuda.is_available() else "cpu") if folder else None


def _samples(data: Dataset, *most: int) -> Tensor:
    """x of a dataset."""
    return data.all(*most, conditions=False)["x"]


def check_config(cfg: DictConfig, allow: tuple[str, ...] = ()) -> None:
    """Check sections and keys of a config before anything is read: method, data, roles, optim, eval.reference.

    Raises:
        BadInput: a section is empty; a key is unknown, missing or of another type; a role is misspelt.
    """
    for key in ("method", "data", "roles"):
        if not cfg[key]:
            raise BadInput(f"The config has no '{key}'; start from one in configs/, for example configs/toy/tdm.yaml.")
    for key in ("method", "data"):
        if not cfg[key].get(config.TARGET):
            raise BadInput(f"{key}._target_ is missing; name a class, for example distill.{key}s.TDM for a method.")
    sections: Any = config.plain({k: cfg[k] for k in ("data", "method", "roles")})
    config.verify(sections["method"], allow, "method", ("roles", "optim"))
    for key in ("roles", "data"):
        config.verify(sections[key], allow, key)
    if cfg.eval.reference:
        config.verify(config.plain(cfg.eval)["reference"], allow, "eval.reference")
    kind = config.resolve(cfg.method[config.TARGET], allow, f"method.{config.TARGET}")
    if isinstance(kind, type) and issubclass(kind, Method):
        _check_roles(kind, cfg)


def _check_roles(kind: type[Method], cfg: DictConfig) -> None:
    """Raises BadInput for a slip in the name of a role; whether the method has a role, it decides when it is built."""
    trainable = kind.trainable
    for key, known, text in (
        ("roles", trainable + kind.frozen + ("layout", "adapter"), f"{kind.__name__} has no such role."),
        ("optim", trainable, "not a trainable role."),
    ):
        for role in cfg[key]:
            if role not in known and (hint := suggest(role, known)):
                raise BadInput(f"{key}.{role}: {text}{hint}")


def build_experiment(cfg: DictConfig, allow: tuple[str, ...] = (), build: Any = config.build) -> Experiment:
    """Set the seed, build data, roles (by `build`) and method, and check that they are compatible."""
    check_config(cfg, allow)
    _check_path(cfg.data, "data", cfg.roles)
    torch.manual_seed(cfg.seed)
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    data = config.build(cfg.data, allow, "data")
    if not isinstance(data, Dataset):
        raise BadInput(f"data._target_: {cfg.data[config.TARGET]} is not a Dataset; name a class of distill.data.")
    roles = _build_roles(cfg, allow, build)
    _set_null_conditions(roles, data)
    data.accumulate = cfg.engine.accumulate
    optim = {role: Optim(**settings) for role, settings in cfg.optim.items()}
    method = config.build(cfg.method, allow, "method", roles=roles, optim=optim)
    if not isinstance(method, Method):
        raise BadInput(f"method._target_: {cfg.method['_target_']} is not a Method; name one of distill.methods.")
    check_compatible(method, data)
    _check_optimizers(method, allow)
    return Experiment(cfg, method, data, allow)


def _check_optimizers(method: Method, allow: tuple[str, ...]) -> None:
    """Raises BadInput for optimizers of packages that are not allowed and for settings that a class refuses."""
    for role, settings in method.optim.items():
        weights = list(getattr(method, role).parameters())
        if not weights:
            raise BadInput(f"roles.{role} has no weights to train; give it a network of distill.models.")
        name = settings.name.removeprefix(OWN)
        if "." in name:
            config.resolve(name, allow, f"optim.{role}.name")
        try:
            optimizer_of(settings, weights, role)
        except BadInput:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            text = str(error).splitlines()[0]
            raise BadInput(
                f"optim.{role}: {name if '.' in name else OWN + name} refuses its settings: {text}"
            ) from error


def _set_null_conditions(roles: dict[str, Any], data: Any) -> None:
    """Sets the null (unconditional) condition of networks that lack one from the dataset."""
    for role in roles.values():
        net, null = network_of(role), data.null
        if net.needs_null and null is not None:
            net.set_null(null)


def _build_roles(cfg: DictConfig, allow: tuple[str, ...], build: Any) -> dict[str, Any]:
    roles = build(cfg.roles, allow, "roles")
    layout, settings = (roles.pop(k, None) if isinstance(roles, dict) else None for k in ("layout", "adapter"))
    for name, role in roles.items() if isinstance(roles, dict) else [("_target_", None)]:
        if not isinstance(role, (torch.nn.Module, str)):
            raise BadInput(f"roles.{name} is not a network; give it a _target_, such as distill.denoise.Denoiser.")
    apply_layout(roles, layout or "full", settings)
    return roles


def _check_path(settings: DictConfig, key: str, roles: Any = None) -> None:
    """Raise BadInput if the files of a data source are missing, and name the command that writes them."""
    path = settings.get("path")
    if not isinstance(path, str) or any(c in path for c in "{*?[") or Path(path).expanduser().exists():
        return
    target, out = settings[config.TARGET], Path(path).parent if Path(path).name in ("train", "test") else Path(path)
    teacher = (roles or {}).get("teacher") or {}
    words = "digits" if suggest("digits", out.parts) else "images PHOTOS"
    if target.endswith("Pairs"):
        words = "pairs CONFIG"
    elif target.endswith("Buckets"):
        words = "encode PHOTOS --pipeline P --buckets"
    elif words != "digits" and str(teacher.get(config.TARGET, "")).endswith("diffusers.load"):
        if _takes_text(teacher["path"]):
            words = "prompts FILE" if out.name.endswith("prompts") else "encode SOURCE"
            out = f"{out} --pipeline {teacher['path']}"
    if near := near_path(path):
        raise BadInput(f"{key}.path: {path} does not exist.{near}")
    raise BadInput(f"{key}.path: {path} does not exist; make it by `distill data {words} {out}`, or correct the path.")


def _takes_text(path: str) -> bool:
    """Whether a teacher's folder has a text encoder; assumed of those that are not on this machine."""
    index = recipes.checkpoint(path) / "model_index.json"
    return not index.is_file() or "text_encoder" in read_json(index)

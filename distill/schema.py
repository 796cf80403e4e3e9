"""The keys of a run: their names, types, defaults, and the values that are allowed."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Optim:
    """One role's optimiser: a `torch.optim` class by name, its settings, the clip and the learning-rate schedule."""

    name: str = "AdamW"
    lr: float = 1e-4
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm; 0 does not clip
    warmup: int = 0  # steps of linear warm-up
    decay: str = "constant"  # or "cosine", to zero at the last step


@dataclasses.dataclass
class Train:
    """How long, how often, on what."""

    steps: int = 1000
    validate_every: int = 0  # steps; 0: at the start and the end only
    save_every: int = 0  # steps; 0: at the end and on interruption only
    log_every: int = 10
    keep: int = 2  # newest checkpoints kept; 0: all
    keep_best: int = 0  # and this many of the best by `best`; saves at every validation then
    best: str = ""  # "min fd", "max accuracy"; empty: the lowest of what validation mainly measures
    patience: int = 0  # validations in a row that do not improve `best`, before the run ends; 0: it never ends early
    min_delta: float = 0.0  # what counts as an improvement of `best`
    skips: int = 10  # turns of a role in a row without a finite loss or gradient, before the run goes back
    threads: int = 0  # torch threads; 0: torch's own choice


@dataclasses.dataclass
class Engine:
    """On what a run trains, and how its networks are spread over processes; docs/strategies.md says which, when."""

    strategy: str = "auto"  # auto: ddp where there are several processes; ddp, fsdp, zero1, zero2, zero3
    accelerator: str = "auto"  # auto, cpu, cuda, mps
    devices: int = 1  # processes on this machine; torchrun's or srun's own number counts before this one
    precision: str = "32"  # 32, bf16, 16: of the networks' arithmetic; weights stay in float32
    accumulate: int = 1  # micro-batches of the data's batch size a step
    offload_optimizer: bool = False  # moments in the machine's memory: zero1, zero2, zero3
    offload_parameters: bool = False  # weights too: fsdp, zero3
    checkpoint_activations: bool = False  # compute activations again in the backward pass
    compile: list[str] = dataclasses.field(default_factory=list)  # roles
    deepspeed: str | None = None  # JSON file of DeepSpeed settings, under ours


@dataclasses.dataclass
class Log:
    """Where the numbers go besides the console and `metrics.csv`, which has them always."""

    to: list[str] = dataclasses.field(default_factory=lambda: ["wandb"])  # wandb, tensorboard, csv (alone: nothing else)
    wandb: str = "auto"  # auto: online when a key is at hand, else offline; online, offline, disabled
    project: str = "distill"


@dataclasses.dataclass
class Eval:
    """What validation and `distill eval` measure."""

    samples: int = 4000
    validation_samples: int = 1000
    evaluations: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 4, 8, 50])
    reference: Any = None  # data of the held-out split; the training data when absent
    metrics: Any = None  # names, or names with settings, of docs/metrics.md; those of the samples themselves when absent
    decode: str | None = None  # diffusers folder whose autoencoder makes pixels of samples that are latents
    seed: int = 1


@dataclasses.dataclass
class Run:
    """The whole of a run. `roles`, `method`, `data` hold objects by `_target_`."""

    name: str = "run"
    model: str = "full"  # or "tiny": with what `tiny` says merged over the files, to try the run where it is small
    tiny: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    roles: dict[str, Any] = dataclasses.field(default_factory=dict)
    method: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    optim: dict[str, Optim] = dataclasses.field(default_factory=dict)
    train: Train = dataclasses.field(default_factory=Train)
    engine: Engine = dataclasses.field(default_factory=Engine)
    log: Log = dataclasses.field(default_factory=Log)
    eval: Eval = dataclasses.field(default_factory=Eval)
    expect: dict[str, Any] = dataclasses.field(default_factory=dict)  # metrics a shipped recipe promises


# Smallest value by key, and the values of keys that have but a few; `optim.*` stands for every role.
LEAST = {
    "engine.devices": 1, "engine.accumulate": 1,
    "seed": 0, "train.steps": 1, "train.validate_every": 0, "train.save_every": 0, "train.log_every": 1,
    "train.keep": 0, "train.keep_best": 0, "train.skips": 1, "train.threads": 0,
    "train.patience": 0, "train.min_delta": 0,
    "eval.samples": 2, "eval.validation_samples": 2, "eval.seed": 0,
    "optim.*.lr": 0, "optim.*.warmup": 0, "optim.*.clip": 0, "optim.*.weight_decay": 0,
}  # fmt: skip
MOVED = {"train.accelerator": "engine.accelerator", "train.precision": "engine.precision"}
CHOICES = {
    "model": ("full", "tiny"),
    "log.wandb": ("auto", "online", "offline", "disabled"),
    "engine.strategy": ("auto", "ddp", "fsdp", "zero1", "zero2", "zero3"),
    "engine.accelerator": ("auto", "cpu", "cuda", "gpu", "mps"),
    "engine.precision": ("32", "bf16", "16"),
    "optim.*.decay": ("constant", "cosine"),
}  # fmt: skip
DASHBOARDS = ("wandb", "tensorboard", "csv")

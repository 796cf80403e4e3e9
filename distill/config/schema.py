"""The keys of a config: names, types, defaults and allowed values."""

from __future__ import annotations

import dataclasses
from typing import Any

TARGET = "_target_"


@dataclasses.dataclass
class Optim:
    """One role's optimizer: its class and settings, the clip and the learning-rate schedule."""

    name: str = "AdamW"  # a class of `torch.optim`, or the dotted path of one of an allowed package
    lr: float = 1e-4  # peak learning rate
    betas: list[float] = dataclasses.field(
        default_factory=lambda: [0.9, 0.99]
    )  # decays of the moments, for classes that take `betas`
    eps: float = 1e-8  # for classes that take `eps`
    weight_decay: float = 0.0  # decoupled under AdamW
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # further arguments of the class
    clip: float = 1.0  # largest gradient norm; 0 does not clip
    warmup: int = 0  # steps of linear warm-up
    decay: str = "constant"  # or "cosine", to zero at the last step


@dataclasses.dataclass
class Train:
    """Number of steps, and how often to validate, save and log."""

    steps: int = 1000  # passes of the turns
    validate_every: int = 0  # steps; 0: at the start and the end only
    save_every: int = 0  # steps; 0: at the end and on interruption only
    log_every: int = 10  # steps between rows of metrics.csv and the dashboards
    keep: int = 2  # newest checkpoints kept; 0: all
    keep_best: int = 0  # best checkpoints kept besides, by `best`; above 0 every validation saves one
    best: str = ""  # "min fd", "max accuracy"; empty: the main metric of validation
    patience: int = 0  # validations in a row without improvement of `best` that end the run; 0: never
    min_delta: float = 0.0  # smallest improvement of `best` that counts
    nonfinite_limit: int = 10  # non-finite turns of a role in a row that roll the run back
    threads: int = 0  # torch threads; 0: torch's own choice


@dataclasses.dataclass
class Engine:
    """Devices, precision, and the distribution of networks over processes; docs/strategies.md compares the strategies."""

    strategy: str = "auto"  # auto (ddp where there are several processes), ddp, fsdp, zero1, zero2, zero3
    accelerator: str = "auto"  # auto, cpu, cuda, mps
    devices: int = 1  # processes on this machine; overridden by torchrun and srun
    precision: str = "32"  # of computation: 32, bf16, 16; weights stay in float32
    accumulate: int = 1  # micro-batches per step, each of data.batch_size
    offload_optimizer: bool = False  # optimizer state in host memory: zero1, zero2, zero3
    offload_parameters: bool = False  # weights in host memory: fsdp, zero3
    checkpoint_activations: bool = False  # recompute activations in the backward pass
    compile: list[str] = dataclasses.field(default_factory=list)  # roles to compile
    timeout: float = 30.0  # minutes that a process waits for the others within a training step
    validation_timeout: float = 1440.0  # minutes that it waits for their samples and scores in validation and eval
    deepspeed: str | None = None  # JSON file of DeepSpeed settings; those of distill override it


@dataclasses.dataclass
class Log:
    """Dashboards, besides the console and `metrics.csv`."""

    to: list[str] = dataclasses.field(default_factory=lambda: ["wandb"])  # wandb, tensorboard, csv (no dashboard)
    wandb: str = "auto"  # auto (online if a key is found, else offline), online, offline, disabled or off
    project: str = "distill"  # of wandb
    entity: str | None = None  # user or team of wandb; its default where absent
    group: str | None = None  # runs of one group are shown together
    tags: list[str] = dataclasses.field(default_factory=list)  # of the wandb run
    artifacts: bool = False  # upload the last checkpoint and every export to wandb as artifacts


@dataclasses.dataclass
class Eval:
    """What validation and `distill eval` measure."""

    samples: int = 4000  # of `distill eval`, for each row of its table
    validation_samples: int = 1000  # of each validation during training
    evaluations: list[int] = dataclasses.field(
        default_factory=lambda: [1, 2, 4, 8, 50]
    )  # numbers of network evaluations
    reference: Any = None  # dataset of the held-out split; the training data by default
    metrics: Any = None  # names, or names with settings, of docs/metrics.md; metrics that need no network by default
    decode: str | None = None  # diffusers folder whose VAE decodes samples that are latents
    seed: int = 1  # of the noise of validation and `distill eval`


@dataclasses.dataclass
class RunConfig:
    """A whole config. `roles`, `method`, `data` and `eval.reference` describe objects by `_target_`."""

    name: str = "run"  # of the run folder, and of the run on dashboards
    model: str = "full"  # full, or tiny: the section `tiny` replaces sizes by small ones, for a quick try
    tiny: dict[str, Any] = dataclasses.field(default_factory=dict)  # settings that `model: tiny` merges over the others
    seed: int = 0  # of weights and training
    roles: dict[str, Any] = dataclasses.field(default_factory=dict)  # networks by role, and their layout
    method: dict[str, Any] = dataclasses.field(default_factory=dict)  # a class of distill.methods and its settings
    data: dict[str, Any] = dataclasses.field(default_factory=dict)  # a dataset of distill.data and its settings
    optim: dict[str, Optim] = dataclasses.field(default_factory=dict)
    train: Train = dataclasses.field(default_factory=Train)
    engine: Engine = dataclasses.field(default_factory=Engine)
    log: Log = dataclasses.field(default_factory=Log)
    eval: Eval = dataclasses.field(default_factory=Eval)
    expect: dict[str, Any] = dataclasses.field(default_factory=dict)  # metrics that a shipped recipe reaches
    allow: list[str] = dataclasses.field(default_factory=list)  # record of packages that --allow named; grants nothing


# Smallest value by key, and the values of keys that take one of a few; `optim.*` stands for every role.
LEAST = {
    "engine.devices": 1,
    "engine.accumulate": 1,
    "engine.timeout": 0,
    "engine.validation_timeout": 0,
    "seed": 0,
    "train.steps": 1,
    "train.validate_every": 0,
    "train.save_every": 0,
    "train.log_every": 1,
    "train.keep": 0,
    "train.keep_best": 0,
    "train.nonfinite_limit": 1,
    "train.threads": 0,
    "train.patience": 0,
    "train.min_delta": 0,
    "eval.samples": 2,
    "eval.validation_samples": 2,
    "eval.seed": 0,
    "optim.*.lr": 0,
    "optim.*.warmup": 0,
    "optim.*.clip": 0,
    "optim.*.weight_decay": 0,
}
MOVED_MODULES = {  # where a module of an older config is now; longer names first
    "distill.nets.rewards": "distill.metrics.rewards",
    "distill.nets.vision": "distill.metrics.networks.vision",
    "distill.nets.inception": "distill.metrics.networks.inception",
    "distill.nets.diffusers.backbones": "distill.models.diffusers",
    "distill.models.families.label": "distill.models.diffusers",
    "distill.nets": "distill.models",
    "distill.grid": "distill.times",
    "distill.data.buckets": "distill.data.shards.buckets",
    "distill.data.stream": "distill.data.shards.stream",
    "distill.eval": "distill.metrics",
}
_TRUTH = "was removed; name a callable metric(x, data=, **cond) of your own, with --allow PACKAGE."
MOVED_OBJECTS = {  # classes of an older config: the new name, or a sentence; empty: removed
    "distill.denoise.Under": "distill.denoise.Rescheduled",
    "distill.metrics.rewards.Truth": _TRUTH,
    "distill.nets.heads.Judge": "",
    "distill.nets.heads.Layers": "",
    "distill.nets.rewards.Truth": _TRUTH,
    "distill.nets.rewards.Clip": "distill.metrics.rewards.ClipScore",
    "distill.nets.vision.Clip": "distill.metrics.networks.vision.ClipNetwork",
    "distill.nets.vision.Inception": "distill.metrics.networks.vision.InceptionFeatures",
    "distill.solvers.flowmap.Gamma": "distill.solvers.flowmap.GammaSampler",
    "distill.solvers.stochastic.ReverseSDE": "",
}
MOVED_ARGUMENTS = {  # (class, argument) of an older config: the new name, or a sentence; empty: removed
    ("distill.data.toy.Tensors", "told"): "conditions",
    ("distill.methods.LADD", "same_noise"): "",
    ("distill.methods.DistillationDPO", "loser"): "form",
    ("distill.methods.Guidance", "weight"): "was removed; leave it out, the weight is max(SNR, 1).",
    ("distill.methods.Reflow", "weight"): "was removed; leave it out, the weight is that of the error in z - x.",
    ("distill.methods.MMD", "clamp"): "was removed; clip the samples in the forward of your roles.features.",
}
MOVED = {
    "train.skips": "train.nonfinite_limit",
    "train.accelerator": "engine.accelerator",
    "train.precision": "engine.precision",
}
CHOICES = {
    "model": ("full", "tiny"),
    "log.wandb": ("auto", "online", "offline", "disabled", "off"),
    "engine.strategy": ("auto", "ddp", "fsdp", "zero1", "zero2", "zero3"),
    "engine.accelerator": ("auto", "cpu", "cuda", "gpu", "mps"),
    "engine.precision": ("32", "bf16", "16"),
    "optim.*.decay": ("constant", "cosine"),
}
DASHBOARDS = ("wandb", "tensorboard", "csv")

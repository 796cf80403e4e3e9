"""YAML and `key=value` overrides to objects, strictly.

A run is one mapping (`Run`). Objects are named by dotted path under `_target_` and their signature is the schema:

    method: {_target_: distill.methods.TDM, grid: 4, guidance: 1.5}

Unknown keys raise and suggest the nearest name; only paths under `distill.` resolve unless the user allows a package.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import types
import typing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.errors import BadInput, suggest

TARGET = "_target_"


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
    keep: int = 2  # checkpoints kept
    threads: int = 0  # torch threads; 0: torch's own choice
    accelerator: str = "auto"
    precision: str = "32"


@dataclasses.dataclass
class Log:
    """Where the numbers go besides the console: `metrics.csv` always, wandb by mode."""

    wandb: str = "auto"  # auto: online when a key is at hand, else offline; online, offline, disabled
    project: str = "distill"


@dataclasses.dataclass
class Eval:
    """What validation and `distill eval` measure."""

    samples: int = 4000
    validation_samples: int = 1000
    evaluations: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 4, 8, 50])
    reference: Any = None  # data of the held-out split; the training data when absent
    seed: int = 1


@dataclasses.dataclass
class Run:
    """The whole of a run. `roles`, `method`, `data` hold objects by `_target_`."""

    name: str = "run"
    seed: int = 0
    roles: dict[str, Any] = dataclasses.field(default_factory=dict)
    method: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    optim: dict[str, Optim] = dataclasses.field(default_factory=dict)
    train: Train = dataclasses.field(default_factory=Train)
    log: Log = dataclasses.field(default_factory=Log)
    eval: Eval = dataclasses.field(default_factory=Eval)
    expect: dict[str, Any] = dataclasses.field(default_factory=dict)  # metrics a shipped recipe promises


def read(path: str | Path) -> DictConfig:
    """One YAML file; its `base:` (one path or a list, relative to the file) is read first and merged under it."""
    path = Path(path)
    if not path.is_file():
        near = suggest(path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        raise BadInput(f"Config file {path} does not exist.{near}")
    try:
        node = OmegaConf.load(path)
    except Exception as error:  # yaml's own errors come in several classes
        raise BadInput(f"Config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, DictConfig):
        raise BadInput(f"Config file {path} must hold a mapping of keys, not a list or a scalar.")
    bases = node.pop("base", None) or []
    for base in reversed([bases] if isinstance(bases, str) else bases):
        node = merge(read(path.parent / base), node)
    return node


def merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """Right wins; a mapping whose `_target_` changes is replaced whole, for its old keys mean nothing to the new object."""
    return OmegaConf.create(_merge(OmegaConf.to_container(below), OmegaConf.to_container(above)))


def _merge(below: dict, above: dict) -> dict:
    out = dict(below)
    for key, value in above.items():
        old = below.get(key)
        same = isinstance(value, dict) and isinstance(old, dict) and value.get(TARGET) in (None, old.get(TARGET))
        out[key] = _merge(old, value) if same else value
    return out


def load(paths: list[str | Path], overrides: list[str] = ()) -> DictConfig:
    """Merge YAML files left to right, then `key=value` overrides; check the keys and types of `Run`."""
    node = OmegaConf.create({})
    for path in paths:
        node = merge(node, read(path))
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not key:
            raise BadInput(f"Override '{item}' must have the form key=value, for example train.steps=100.")
        node = merge(node, OmegaConf.from_dotlist([item]))
    return checked(node)


def checked(node: DictConfig) -> DictConfig:
    """`node` over the defaults of `Run`; unknown keys and wrong types raise BadInput."""
    _check_keys(node, Run, "")
    try:
        full = OmegaConf.merge(OmegaConf.structured(Run), node)
        return OmegaConf.create(OmegaConf.to_container(full, resolve=True))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        raise BadInput(f"{key}: {str(error).splitlines()[0]}; give a value of the stated type.") from None


def _check_keys(node: Any, schema: type, prefix: str) -> None:
    names = {f.name: f for f in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    for key in node:
        if key not in names:
            raise BadInput(f"Unknown key '{prefix}{key}'.{suggest(str(key), names)} Known keys: {', '.join(names)}.")
        value, hint = node.get(key), hints[key]
        if not isinstance(value, DictConfig):
            continue
        if dataclasses.is_dataclass(hint):
            _check_keys(value, hint, f"{prefix}{key}.")
        elif typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            for name in value:
                if isinstance(value[name], DictConfig):
                    _check_keys(value[name], typing.get_args(hint)[1], f"{prefix}{key}.{name}.")


def save(node: DictConfig, path: str | Path) -> None:
    """Write the resolved config as YAML."""
    Path(path).write_text(OmegaConf.to_yaml(node))


def fingerprint(node: DictConfig) -> str:
    """Twelve hex digits that name the config: SHA-256 of its YAML with sorted keys."""
    return hashlib.sha256(OmegaConf.to_yaml(node, sort_keys=True).encode()).hexdigest()[:12]


def resolve(dotted: str, allow: tuple[str, ...] = (), where: str = TARGET) -> Any:
    """The object at a dotted path under `distill.` (or an allowed package)."""
    if dotted.split(".")[0] not in ("distill", *allow):
        raise BadInput(
            f"{where}: '{dotted}' is outside distill; allow its package by name with --allow {dotted.split('.')[0]}."
        )
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(error.name + ".")):
                continue
            raise
        for depth, part in enumerate(parts[cut:]):
            if not hasattr(found, part):
                near = suggest(part, [n for n in dir(found) if not n.startswith("_")])
                raise BadInput(f"{where}: '{'.'.join(parts[: cut + depth])}' has no '{part}'.{near}")
            found = getattr(found, part)
        return found
    raise BadInput(f"{where}: no module '{dotted}'; write a dotted path such as distill.methods.TDM.")


def signature(target: Any) -> dict[str, inspect.Parameter]:
    """Parameters that `target` accepts by name; a class's `**keywords` are those of its bases."""
    layers = [c.__init__ for c in target.__mro__ if "__init__" in c.__dict__] if isinstance(target, type) else [target]
    found: dict[str, inspect.Parameter] = {}
    for layer in layers:
        parameters = list(inspect.signature(layer).parameters.values())
        for p in parameters[isinstance(target, type) :]:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                found.setdefault(p.name, p)
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return found


def open_ended(target: Any) -> bool:
    """A function with `**keywords` checks its names itself, such as one that hands them to a stock class."""
    kinds = [] if isinstance(target, type) else [p.kind for p in inspect.signature(target).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def build(node: Any, allow: tuple[str, ...] = (), where: str = "", **given: Any) -> Any:
    """The object that `node` describes; mappings without `_target_` and lists are built item by item.

    `given` are arguments of the outermost object that do not come from the config.

    Raises:
        BadInput: unknown, missing or wrongly typed argument, with its full key.
    """
    if isinstance(node, DictConfig) or OmegaConf.is_list(node):
        node = OmegaConf.to_container(node, resolve=True)
    dot = f"{where}." if where else ""
    if isinstance(node, list):
        return [build(v, allow, f"{where}[{i}]") for i, v in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if TARGET not in node:
        return {k: build(v, allow, f"{dot}{k}") for k, v in node.items()}
    target = resolve(node[TARGET], allow, f"{dot}{TARGET}")
    schema = signature(target)
    arguments = {}
    for key, value in node.items():
        if key == TARGET:
            continue
        if (key not in schema and not open_ended(target)) or key in given:
            known = [k for k in schema if k not in given]
            raise BadInput(
                f"Unknown key '{dot}{key}' for {node[TARGET]}.{suggest(key, known)} Known keys: {', '.join(known)}."
            )
        made = build(value, allow, f"{dot}{key}")
        arguments[key] = _typed(made, schema[key], target, f"{dot}{key}") if key in schema else made
    missing = [k for k, p in schema.items() if p.default is p.empty and k not in arguments and k not in given]
    if missing:
        raise BadInput(f"Missing key '{dot}{missing[0]}' for {node[TARGET]}; give it in the config.")
    return target(**arguments, **given)


_PLAIN = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}


def _typed(value: Any, parameter: inspect.Parameter, target: Any, where: str) -> Any:
    """Plain annotations (int, float, str, bool and unions of them) are checked; anything richer is left to the object."""
    hint = _hint(parameter, target)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if not all(o in _PLAIN or o is type(None) for o in options):
        return value
    accepted = tuple(t for o in options for t in (_PLAIN.get(o) or (type(None),)))
    if isinstance(value, bool) and bool not in accepted or not isinstance(value, accepted):
        names = " or ".join("none" if o is type(None) else o.__name__ for o in options)
        raise BadInput(f"{where}: expected {names}, got {value!r} of type {type(value).__name__}.")
    return float(value) if float in options and int not in options and isinstance(value, int) else value


def _hint(parameter: inspect.Parameter, target: Any) -> Any:
    hint = parameter.annotation
    if isinstance(hint, str):
        try:
            return eval(hint, dict(vars(importlib.import_module(target.__module__))))  # our own annotation text
        except Exception:
            return Any
    return hint

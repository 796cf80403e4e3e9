"""Reads YAML files and `key=value` overrides into one config, strictly.

A run is one mapping (`Run`). Objects are named by dotted path under `_target_` and their signature is the schema:

    method: {_target_: distill.methods.TDM, grid: 4, guidance: 1.5}

Unknown keys raise and suggest the nearest name; only paths under `distill.` resolve unless the user allows a package.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config import launcher, plugins, recipes
from distill.config.objects import plain, resolve
from distill.config.schema import CHOICES, DASHBOARDS, LEAST, MOVED, TARGET, RunConfig
from distill.errors import BadInput, suggest
from distill.files import write_text

# `${oc.env:NAME}` would copy secrets into saved configs; `oc.decode` and `oc.create` can assemble such text.
RESOLVERS = ("oc.select", "oc.dict.keys", "oc.dict.values")
_INNERMOST = re.compile(r"\$\{([^{}]*)\}")
_VARIABLE = re.compile(r"\$\{oc\.env:(\w+)\}")


def read(path: str | Path, above: tuple[Path, ...] = ()) -> DictConfig:
    """A YAML file merged over its `base:`, one path or a list of them (relative to the file, or shipped recipes)."""
    path = recipes.find(path)
    name = recipes.shown(path)
    if path.resolve() in above:
        raise BadInput(
            f"Config file {name} is its own base, by way of {recipes.shown(above[-1])}; remove one of the `base:` lines."
        )
    try:
        node = OmegaConf.load(path)
    except Exception as error:  # yaml's own errors come in several classes
        quote = ' Write a key called null in quotes, "null".' if "key type 'NoneType'" in str(error) else ""
        raise BadInput(f"Config file {name} is not valid YAML: {' '.join(str(error).split())}{quote}") from None
    if not isinstance(node, DictConfig):
        raise BadInput(f"Config file {name} must hold a mapping of keys, not a list or a scalar.")
    _check_resolvers(plain(node), f"Config file {name}")
    bases = node.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, (list, ListConfig)) or not all(isinstance(b, str) for b in bases):
        raise BadInput(f"base in {name} must be a path or a list of paths, relative to that file.")
    for base in reversed(bases):
        node = merge(read(recipes.beside(path, base), (*above, path.resolve())), node)
    return node


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> DictConfig:
    """Merge two configs or mappings; `above` wins. A mapping whose `_target_` changes is replaced whole."""
    return OmegaConf.create(_merge(plain(below), plain(above)))


def _merge(below: Any, above: dict) -> dict:
    out = dict(below)
    for key, value in above.items():
        old = below.get(key)
        same = isinstance(value, dict) and isinstance(old, dict) and value.get(TARGET) in (None, old.get(TARGET))
        out[key] = _merge(old, value) if same else value
    return out


def load(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> DictConfig:
    """Merge YAML files left to right, then `key=value` overrides; check the keys and types of `Run`.

    With `model=tiny`, the section `tiny` of the files is merged over the files and under the overrides. An override of a
    single `_target_` warns of the keys that go with the former one.
    """
    node, above = OmegaConf.create({}), OmegaConf.create({})
    for path in paths:
        node = merge(node, read(path))
    for item in overrides:
        above = merge(above, override(item))
    if above.get("model") == "tiny":
        node = merge(node, _twin(node))
    for item in overrides:
        _warn_of_dropped_keys(item.partition("=")[0], node, above)
    return checked(merge(node, above))


def _warn_of_dropped_keys(key: str, node: DictConfig, above: DictConfig) -> None:
    """Warn if the override `KEY._target_=CLASS` replaces another class, whose keys are dropped with it."""
    where, dot, last = key.rpartition(".")
    old = OmegaConf.select(node, where) if dot and last == TARGET else None
    new = OmegaConf.select(above, where) if isinstance(old, DictConfig) else {}
    if not isinstance(old, DictConfig) or not isinstance(new, DictConfig) or old.get(TARGET) in (None, new[TARGET]):
        return
    dropped = [str(name) for name in old if name not in new]
    try:
        resolve(new[TARGET], tuple(plugins.imported), key)
    except Exception:  # a class that is refused, or whose module fails: what builds it says so
        return
    if dropped and launcher.launcher_rank()[0] == 0:
        warnings.warn(
            f"{key}={new[TARGET]} drops the keys of {old[TARGET]}: {', '.join(dropped)}; write {where}.KEY=VALUE for those "
            "to keep.",
            stacklevel=2,
        )


def _twin(node: DictConfig) -> DictConfig:
    twin = node.pop("tiny", None)
    if not twin and node.get("model") != "tiny":  # a saved config is merged already
        raise BadInput(
            "model=tiny: the config has no section 'tiny', which holds its small networks and data; copy the one of "
            "configs/sd15/base.yaml."
        )
    name = f"{node.get('name', 'run')}-tiny"  # a separate name, so that the tiny run does not resume the full one
    return merge(OmegaConf.create({"name": name}), twin) if twin else OmegaConf.create({})


def override(item: str) -> DictConfig:
    """The mapping of a `key=value` override.

    Overrides come from the user, so `${oc.env:NAME}` in them is replaced by the environment variable, for launchers
    without a shell. Config files may come from others, so it is refused there.
    """
    key, equals, _ = item.partition("=")
    if not equals or not all(key.split(".")):
        raise BadInput(f"Override '{item}' must have the form key=value, for example train.steps=100.")
    try:
        node = OmegaConf.from_dotlist([_VARIABLE.sub(lambda found: _variable(found[1], key), item)])
    except BadInput:
        raise
    except Exception as error:  # omegaconf's and yaml's own come in several classes
        raise BadInput(f"Override '{item}' has a value that is not YAML: {' '.join(str(error).split())}") from None
    _check_resolvers(plain(node), f"Override '{item}'")
    return node


def _variable(name: str, key: str) -> str:
    if name not in os.environ:
        raise BadInput(f"{key}: the environment variable {name} is not set; set it, or write the value itself.")
    return os.environ[name]


def _check_resolvers(node: Any, where: str) -> None:
    """Refuse every `${resolver:...}` except those of `RESOLVERS`, anywhere in a value, also nested."""
    if isinstance(node, dict):
        for key, value in node.items():
            _check_resolvers(value, f"{where}: {key}" if ": " not in where else f"{where}.{key}")
    elif isinstance(node, list):
        for value in node:
            _check_resolvers(value, where)
    while isinstance(node, str) and (innermost := _INNERMOST.search(node)):
        name, colon, _ = innermost[1].partition(":")
        if colon and name.strip() not in RESOLVERS:
            raise BadInput(
                f"{where} uses '${{{name.strip()}:...}}', which configs may not: write the value itself, or refer to a "
                "key by ${key}; secrets belong in environment variables, not in configs."
            )
        node = node.replace(innermost[0], "_")  # the enclosing one is checked next


def checked(node: DictConfig) -> DictConfig:
    """`node` over the defaults of `Run`; unknown keys and wrong types raise BadInput."""
    _check_resolvers(plain(node), "config")
    _check_keys(plain(node), RunConfig, "")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), node)
        full = OmegaConf.create(plain(merged, resolve=True))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        mend = (
            "refer to a key that the config has"
            if "nterpolation" in type(error).__name__
            else "give a value of that type"
        )
        raise BadInput(f"{key}: {str(error).splitlines()[0].rstrip('.')}; {mend}.") from None
    if full.log.wandb.lower() in ("off", "false"):  # YAML reads `off` as false
        full.log.wandb = "disabled"
    _check_values(full)
    return full


def _check_values(full: DictConfig) -> None:
    for pattern, least in LEAST.items():
        for key, value in _matching(full, pattern):
            if not value >= least:  # NaN too
                raise BadInput(f"{key}: {value} must be {least} or more.")
    for pattern, known in CHOICES.items():
        for key, value in _matching(full, pattern):
            if value not in known:
                raise BadInput(f"{key}: '{value}' must be one of {', '.join(known)}.{suggest(str(value), known)}")
    for name in full.log.to:
        if name not in DASHBOARDS:
            raise BadInput(f"log.to: '{name}' must be one of {', '.join(DASHBOARDS)}.{suggest(name, DASHBOARDS)}")
    if not full.name or not full.eval.evaluations or min(full.eval.evaluations) < 1:
        message = "eval.evaluations: give a list of numbers from 1 on" if full.name else "name: give the run a name"
        raise BadInput(f"{message}.")
    if Path(full.name).is_absolute() or ".." in Path(full.name).parts:
        raise BadInput(f"name: '{full.name}' is outside the folder of runs; give a name, and the folder by --runs.")


def _matching(full: DictConfig, pattern: str) -> list[tuple[str, Any]]:
    """(key, value) of all keys that match a pattern in which `*` is any name."""
    head, star, tail = pattern.partition(".*.")
    if not star:
        return [(pattern, OmegaConf.select(full, pattern))]
    return [(f"{head}.{name}.{tail}", full[head][name][tail]) for name in full[head]]


def _check_keys(node: dict[str, Any], schema: Any, prefix: str) -> None:
    names = {f.name: f for f in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    for key, value in node.items():
        if prefix + key in MOVED:
            raise BadInput(f"'{prefix}{key}' is now {MOVED[prefix + key]}; write it there.")
        if key not in names:
            raise BadInput(f"Unknown key '{prefix}{key}'.{suggest(str(key), names)} Known keys: {', '.join(names)}.")
        hint, inner = hints[key], (*typing.get_args(hints[key]), None, None)[1]
        if isinstance(value, str) and "${" in value:
            continue
        default = names[key].default_factory
        _check_kind(value, hint, f"{prefix}{key}", [] if default is dataclasses.MISSING else default())
        if dataclasses.is_dataclass(hint):
            _check_keys(value, hint, f"{prefix}{key}.")
        elif dataclasses.is_dataclass(inner):
            for name, settings in value.items():
                _check_kind(settings, inner, f"{prefix}{key}.{name}")
                _check_keys(settings, inner, f"{prefix}{key}.{name}.")


def _check_kind(value: Any, hint: Any, key: str, default: Any = ()) -> None:
    mapping = dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict
    if mapping and not isinstance(value, dict):
        raise BadInput(f"{key}: expected keys of its own, got {value!r}; write {key}.KEY=VALUE.")
    if typing.get_origin(hint) is list and not isinstance(value, list):
        rest = default[1:] if key.endswith(".betas") else []  # a pair
        raise BadInput(f"{key}: expected a list, got {value!r}; write {[value, *rest]}.")


def save(node: DictConfig, path: str | Path) -> None:
    """Write the resolved config as YAML, atomically."""
    write_text(path, to_yaml(node))


def to_yaml(node: Mapping[str, Any]) -> str:
    """A config as YAML, references as written."""
    return OmegaConf.to_yaml(node)


def fingerprint(node: Mapping[str, Any]) -> str:
    """Twelve hex digits that name the config: SHA-256 of its YAML with sorted keys."""
    return hashlib.sha256(OmegaConf.to_yaml(node, sort_keys=True).encode()).hexdigest()[:12]

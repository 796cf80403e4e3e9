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
import os
import pkgutil
import types
import typing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.errors import BadInput, suggest
from distill.schema import CHOICES, DASHBOARDS, LEAST, MOVED, Run

TARGET = "_target_"


def read(path: str | Path, above: tuple[Path, ...] = ()) -> DictConfig:
    """One YAML file; its `base:` (one path or a list, relative to the file) is read first and merged under it."""
    path = Path(path)
    if path.resolve() in above:
        raise BadInput(f"Config file {path} is its own base, by way of {above[-1]}; take one of the `base:` lines out.")
    if not path.is_file():
        near = suggest(path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        raise BadInput(f"Config file {path} does not exist.{near}")
    try:
        node = OmegaConf.load(path)
    except Exception as error:  # yaml's own errors come in several classes
        quote = ' Write a key called null in quotes, "null".' if "key type 'NoneType'" in str(error) else ""
        raise BadInput(f"Config file {path} is not valid YAML: {' '.join(str(error).split())}{quote}") from None
    if not isinstance(node, DictConfig):
        raise BadInput(f"Config file {path} must hold a mapping of keys, not a list or a scalar.")
    bases = node.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, (list, ListConfig)) or not all(isinstance(b, str) for b in bases):
        raise BadInput(f"base in {path} must be a path or a list of paths, relative to that file.")
    for base in reversed(bases):
        node = merge(read(path.parent / base, (*above, path.resolve())), node)
    return node


def merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """Right wins; a mapping whose `_target_` changes is replaced whole: its old keys mean nothing to the new object."""
    return OmegaConf.create(_merge(OmegaConf.to_container(below), OmegaConf.to_container(above)))


def _merge(below: dict, above: dict) -> dict:
    out = dict(below)
    for key, value in above.items():
        old = below.get(key)
        same = isinstance(value, dict) and isinstance(old, dict) and value.get(TARGET) in (None, old.get(TARGET))
        out[key] = _merge(old, value) if same else value
    return out


def load(paths: list[str | Path], overrides: list[str] = ()) -> DictConfig:
    """Merge YAML files left to right, then `key=value` overrides; check the keys and types of `Run`.

    With `model=tiny`, what the files say under `tiny` comes between: above the files, below the overrides.
    """
    node, above = OmegaConf.create({}), OmegaConf.create({})
    for path in paths:
        node = merge(node, read(path))
    for item in overrides:
        above = merge(above, override(item))
    if above.get("model") == "tiny":
        node = merge(node, _twin(node))
    return checked(merge(node, above))


def _twin(node: DictConfig) -> DictConfig:
    twin = node.pop("tiny", None)
    if not twin and node.get("model") != "tiny":  # a run that was made so has it merged already
        raise BadInput("model=tiny: the config says under 'tiny' what replaces its networks and data, and has no such "
                       "section; copy the one of configs/sd15/base.yaml.")  # fmt: skip
    name = f"{node.get('name', 'run')}-tiny"  # the name is left to the run itself
    return merge(OmegaConf.create({"name": name}), twin) if twin else OmegaConf.create({})


def override(item: str) -> DictConfig:
    """The mapping that `key=value` stands for."""
    key, equals, _ = item.partition("=")
    if not equals or not all(key.split(".")):
        raise BadInput(f"Override '{item}' must have the form key=value, for example train.steps=100.")
    try:
        return OmegaConf.from_dotlist([item])
    except Exception as error:  # omegaconf's and yaml's own come in several classes
        raise BadInput(f"Override '{item}' has a value that is not YAML: {' '.join(str(error).split())}") from None


def checked(node: DictConfig) -> DictConfig:
    """`node` over the defaults of `Run`; unknown keys and wrong types raise BadInput."""
    _check_keys(OmegaConf.to_container(node), Run, "")
    try:
        full = OmegaConf.merge(OmegaConf.structured(Run), node)
        full = OmegaConf.create(OmegaConf.to_container(full, resolve=True))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        mend = "write a key that the config has" if "nterpolation" in type(error).__name__ else "give one of that type"
        raise BadInput(f"{key}: {str(error).splitlines()[0].rstrip('.')}; {mend}.") from None
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
        what = "eval.evaluations: give a list of numbers from 1 on" if full.name else "name: give the run a name"
        raise BadInput(f"{what}.")


def _matching(full: DictConfig, pattern: str) -> list[tuple[str, Any]]:
    """(key, value) for a key in which `*` stands for every name."""
    head, star, tail = pattern.partition(".*.")
    if not star:
        return [(pattern, OmegaConf.select(full, pattern))]
    return [(f"{head}.{name}.{tail}", full[head][name][tail]) for name in full[head]]


def _check_keys(node: dict[str, Any], schema: type, prefix: str) -> None:
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
        _check_kind(value, hint, f"{prefix}{key}")
        if dataclasses.is_dataclass(hint):
            _check_keys(value, hint, f"{prefix}{key}.")
        elif dataclasses.is_dataclass(inner):
            for name, settings in value.items():
                _check_kind(settings, inner, f"{prefix}{key}.{name}")
                _check_keys(settings, inner, f"{prefix}{key}.{name}.")


def _check_kind(value: Any, hint: Any, key: str) -> None:
    mapping = dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict
    if mapping and not isinstance(value, dict):
        raise BadInput(f"{key}: expected keys of its own, got {value!r}; write {key}.KEY=VALUE.")
    if typing.get_origin(hint) is list and not isinstance(value, list):
        raise BadInput(f"{key}: expected a list, got {value!r}; write [{value}].")


def save(node: DictConfig, path: str | Path) -> None:
    """Write the resolved config as YAML: all of it, or nothing."""
    staging = Path(path).with_suffix(".writing")
    staging.write_text(OmegaConf.to_yaml(node))
    os.replace(staging, path)


def fingerprint(node: DictConfig) -> str:
    """Twelve hex digits that name the config: SHA-256 of its YAML with sorted keys."""
    return hashlib.sha256(OmegaConf.to_yaml(node, sort_keys=True).encode()).hexdigest()[:12]


def resolve(dotted: str, allow: tuple[str, ...] = (), where: str = TARGET) -> Any:
    """The class or function at a dotted path under `distill.` (or an allowed package).

    What our modules import from elsewhere is outside too: `distill.run.os.remove` is refused as `os.remove` is.
    """
    if not isinstance(dotted, str):
        raise BadInput(f"{where}: {dotted!r} is no dotted path; write one such as distill.methods.TDM.")
    found = _find(dotted, allow, where)
    home = found.__name__ if isinstance(found, types.ModuleType) else getattr(found, "__module__", None) or ""
    if not callable(found):
        raise BadInput(f"{where}: '{dotted}' is neither a class nor a function; name one, such as distill.methods.TDM.")
    if dotted.split(".")[0] == "distill" and home.split(".")[0] not in ("distill", *allow):
        package = home.split(".")[0] or "builtins"
        raise BadInput(f"{where}: '{dotted}' comes from outside distill; allow its package with --allow {package}.")
    return found


def _find(dotted: str, allow: tuple[str, ...], where: str) -> Any:
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
                files = [m.name for m in pkgutil.iter_modules(getattr(found, "__path__", []))]
                near = suggest(part, [*(n for n in dir(found) if not n.startswith("_")), *files])
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
        BadInput: unknown, missing or wrongly typed argument, or one that the object refuses, with its full key.
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
    return _call(target, arguments, given, where)


def _call(target: Any, arguments: dict[str, Any], given: dict[str, Any], where: str) -> Any:
    """The object; its own refusal gets the key in front, unless it names one already."""
    try:
        return target(**arguments, **given)
    except BadInput as error:
        if not where or str(error).startswith((f"{where}.", f"{where}:", *(f"{g}." for g in given))):
            raise
        raise BadInput(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:  # an argument of a kind that its annotation does not tell
        name = getattr(target, "__qualname__", str(target))
        text = " ".join(str(error).split())
        raise BadInput(f"{where}: {name} refuses {', '.join(arguments)}: {text} (--debug shows where).") from error


_PLAIN = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}


def _typed(value: Any, parameter: inspect.Parameter, target: Any, where: str) -> Any:
    """Plain annotations (int, float, str, bool and unions of them) are checked; richer ones are left to the object."""
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

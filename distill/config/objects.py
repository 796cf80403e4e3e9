"""Builds objects from mappings: `_target_` is the dotted path of a class or function, its signature is the schema."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.config import plugins
from distill.config.schema import MOVED_ARGUMENTS, MOVED_MODULES, MOVED_OBJECTS, TARGET
from distill.errors import BadInput, suggest

# Modules of distill that a config may name. Configs may come from others, so everything else of distill is refused.
PARTS = ("noise", "times", "denoise", "tangent", "solvers", "losses", "models", "data", "methods", "metrics")


@typing.runtime_checkable
class _Source(typing.Protocol):
    """Whether a config may name an object of `distill.data`: data sources only, never writers."""

    def loader(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[dict]: ...


@typing.runtime_checkable
class _Network(typing.Protocol):
    """What a config may name in `distill.models` and `distill.methods`: a torch module."""

    def forward(self, *inputs: Any) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...


# Of these modules a config may name only classes of this kind: they also hold functions that read, write and delete files.
KINDS = {
    "data": (_Source, "a data source"),
    "metrics": (Callable, "a reward or a feature network"),
    "models": (_Network, "a network"),
    "methods": (_Network, "a method"),
}
LOADER = "distill.models.diffusers.loading.load"  # the one function of these modules that a config may call


def resolve(dotted: str, allow: tuple[str, ...] = (), where: str = TARGET) -> Any:
    """The class or function at a dotted path in the parts of distill, in a plugin or in an allowed package.

    Args:
        dotted: such as `distill.methods.TDM`.
        allow: further packages that may be named, by their top-level names.
        where: the config key, for messages.

    Raises:
        BadInput: the path is private, does not exist, or cannot be used in a config. An imported object is judged by the
            module that defines it: `distill.noise.torch.load` is refused as `torch.load` is.
    """
    if not isinstance(dotted, str):
        raise BadInput(f"{where}: {dotted!r} is not a dotted path; write one such as distill.methods.TDM.")
    _check_name(dotted, allow, where)
    target = _find(dotted, where)
    kind = _unwrapped(target)
    if not (isinstance(kind, (type, types.FunctionType)) or callable(target) and not _ours(dotted)):
        raise BadInput(f"{where}: '{dotted}' is neither a class nor a function; name one, such as distill.methods.TDM.")
    _check_definition(dotted, kind, allow, where)
    return target


def _ours(dotted: str) -> bool:
    return dotted.split(".")[0] == "distill"


def _unwrapped(target: Any) -> Any:
    """The function behind a classmethod or a decorator."""
    if isinstance(target, types.MethodType):
        target = target.__func__ if isinstance(target.__self__, type) else None
    return inspect.unwrap(target) if callable(target) else target


def _check_name(dotted: str, allow: tuple[str, ...], where: str) -> None:
    """Checks by name, before anything is imported."""
    parts = dotted.split(".")
    if not all(part.isidentifier() for part in parts) or len(parts) < 2:
        raise BadInput(f"{where}: '{dotted}' is not a dotted path; write one such as distill.methods.TDM.")
    if any(part.startswith("_") for part in parts):
        raise BadInput(f"{where}: '{dotted}' is private; name a public class or function.")
    if not _ours(dotted) and not plugins.may_name(parts[0], allow):
        raise BadInput(f"{where}: '{dotted}' is outside distill; allow its package by name with --allow {parts[0]}.")
    if dotted in MOVED_OBJECTS:
        raise BadInput(f"{where}: '{dotted}' {_moved(MOVED_OBJECTS[dotted])}")
    for old, new in MOVED_MODULES.items():
        if dotted.startswith(f"{old}."):
            raise BadInput(f"{where}: '{dotted}' is now {new}{dotted.removeprefix(old)}; write it so.")
    if _ours(dotted) and parts[1] not in PARTS:
        raise BadInput(
            f"{where}: '{dotted}' cannot be used in a config; it may name what is in {', '.join(PARTS)}."
            f"{suggest(parts[1], PARTS)}"
        )


def _moved(name: str) -> str:
    if " " in name:
        return name
    return f"is now {name}; write it so." if name else "was removed; leave it out."


def _check_definition(dotted: str, target: Any, allow: tuple[str, ...], where: str) -> None:
    """Refuse objects whose defining module is not a part of a run."""
    module = (getattr(target, "__module__", None) or "builtins").split(".")
    if module[0] != "distill":
        if not plugins.may_name(module[0], allow):
            raise BadInput(
                f"{where}: '{dotted}' comes from outside distill; allow its package with --allow {module[0]}."
            )
        return
    room = module[1] if len(module) > 1 else ""
    if room not in PARTS or target.__name__.startswith("_"):
        raise BadInput(f"{where}: '{dotted}' cannot be used in a config: it is defined in {'.'.join(module)}.")
    wanted: Any
    wanted, name = KINDS.get(room, (None, ""))
    if f"{target.__module__}.{target.__qualname__}" == LOADER:
        return
    if wanted and not (isinstance(target, type) and issubclass(target, wanted)):
        raise BadInput(f"{where}: '{dotted}' is not {name}, the only kind of object of distill.{room} in a config.")
    if "allow" in signature(target):
        raise BadInput(
            f"{where}: '{dotted}' cannot be used in a config: it would let a config allow packages by itself."
        )


def _find(dotted: str, where: str) -> Any:
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
    raise BadInput(f"{where}: {plugins.not_installed(parts[0])}, or correct the path '{dotted}'.")


def signature(target: Any) -> dict[str, inspect.Parameter]:
    """Parameters that `target` accepts by name; a class's `**keywords` are those of its bases."""
    layers: list[Any] = [target]
    if isinstance(target, type):
        layers = [vars(c)["__init__"] for c in target.__mro__ if "__init__" in vars(c)]
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
    """Whether `target` is a function with `**keywords`, which checks the names itself (it may pass them to diffusers)."""
    kinds = [] if isinstance(target, type) else [p.kind for p in inspect.signature(target).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def verify(node: Any, allow: tuple[str, ...] = (), where: str = "", given: tuple[str, ...] = ()) -> None:
    """Check the keys and plain values of what `build` takes, at every depth, without building anything.

    Args:
        node, allow, where: as of `build`.
        given: names of the arguments of the outermost object that do not come from the config.

    Raises:
        BadInput: as `build` for unknown, missing and wrongly typed arguments.
    """
    plugins.import_allowed(allow)
    dot = f"{where}." if where else ""
    if isinstance(node, list):
        for i, value in enumerate(node):
            verify(value, allow, f"{where}[{i}]")
    if not isinstance(node, dict):
        return
    if TARGET in node:
        target = resolve(node[TARGET], allow, f"{dot}{TARGET}")
        schema = signature(target)
        _check_arguments(node, target, schema, given, where)
        for key, value in node.items():
            if key in schema and not isinstance(value, (dict, list)):
                _typed(value, schema[key], target, f"{dot}{key}")
    for key, value in node.items():
        verify(value, allow, f"{dot}{key}")


def plain(node: Any, resolve: bool = False) -> Any:
    """The dictionary or list of a config, or of one that holds configs; references `${key}` as written or resolved."""
    return OmegaConf.to_container(node if OmegaConf.is_config(node) else OmegaConf.create(node), resolve=resolve)


def build(node: Any, allow: tuple[str, ...] = (), where: str = "", **given: Any) -> Any:
    """The object that `node` describes; mappings without `_target_` and lists are built item by item.

    `given` are arguments of the outermost object that do not come from the config. The packages of `allow` are imported
    first, for what they register.

    Raises:
        BadInput: unknown, missing or wrongly typed argument, or one that the object refuses, with its full key.
    """
    plugins.import_allowed(allow)
    if isinstance(node, DictConfig) or OmegaConf.is_list(node):
        node = plain(node, resolve=True)
    dot = f"{where}." if where else ""
    if isinstance(node, list):
        return [build(v, allow, f"{where}[{i}]") for i, v in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if TARGET not in node:
        return {k: build(v, allow, f"{dot}{k}") for k, v in node.items()}
    target = resolve(node[TARGET], allow, f"{dot}{TARGET}")
    schema = signature(target)
    _check_arguments(node, target, schema, tuple(given), where)
    arguments = {}
    for key, value in node.items():
        if key != TARGET:
            argument = build(value, allow, f"{dot}{key}")
            arguments[key] = _typed(argument, schema[key], target, f"{dot}{key}") if key in schema else argument
    return _call(target, arguments, given, where)


def _check_arguments(
    node: dict, target: Any, schema: dict[str, inspect.Parameter], given: tuple[str, ...], where: str
) -> None:
    """Raises BadInput for a key that `target` does not take, and for one that it needs and the node lacks."""
    dot = f"{where}." if where else ""
    for key in node:
        if key != TARGET and (key not in schema and not open_ended(target) or key in given):
            known = [k for k in schema if k not in given]
            if (node[TARGET], key) in MOVED_ARGUMENTS:
                raise BadInput(f"'{dot}{key}' of {node[TARGET]} {_moved(MOVED_ARGUMENTS[node[TARGET], key])}")
            raise BadInput(
                f"Unknown key '{dot}{key}' for {node[TARGET]}.{suggest(key, known)} Known keys: {', '.join(known)}."
            )
    missing = [k for k, p in schema.items() if p.default is p.empty and k not in node and k not in given]
    if missing:
        raise BadInput(f"Missing key '{dot}{missing[0]}' for {node[TARGET]}; give it in the config.")


def _call(target: Any, arguments: dict[str, Any], given: dict[str, Any], where: str) -> Any:
    """Build the object; a BadInput that it raises is prefixed with the config key, unless it names one already."""
    try:
        return target(**arguments, **given)
    except BadInput as error:
        if not where or str(error).startswith((f"{where}.", f"{where}:", *(f"{g}." for g in given))):
            raise
        raise BadInput(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:  # a wrong type that the annotation does not exclude
        name = getattr(target, "__qualname__", str(target))
        text = " ".join(str(error).split())
        raise BadInput(f"{where}: {name} refuses {', '.join(arguments)}: {text} (--debug shows where).") from error


_PLAIN = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}


def _typed(value: Any, parameter: inspect.Parameter, target: Any, where: str) -> Any:
    """Check a value against an annotation of int, float, str, bool, classes of distill, or a union; others pass."""
    hint = _hint(parameter, target)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if not all(o in _PLAIN or o is type(None) or _is_ours(o) for o in options):
        return value
    ours = any(map(_is_ours, options))
    if ours and not isinstance(value, (str, bool, int, float)):
        return value  # an object, which may do without the class
    accepted = tuple(t for o in options for t in (_PLAIN.get(o) or (type(None),)))
    if isinstance(value, bool) and bool not in accepted or not isinstance(value, accepted):
        names = " or ".join("none" if o is type(None) else o.__name__ for o in options)
        mend = f"; describe an object by its {TARGET}" if ours else ""
        raise BadInput(f"{where}: expected {names}, got {value!r} of type {type(value).__name__}{mend}.")
    return float(value) if float in options and int not in options and isinstance(value, int) else value


def _is_ours(option: Any) -> bool:
    return isinstance(option, type) and _ours(option.__module__)


def _hint(parameter: inspect.Parameter, target: Any) -> Any:
    hint = parameter.annotation
    if isinstance(hint, str):
        try:
            return eval(hint, dict(vars(importlib.import_module(target.__module__))))  # our own annotation text
        except Exception:
            return Any
    return hint

"""Diffusers folders, local or on the hub: resolving paths, finding the network, loading weights. No code is executed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.config.recipes import checkpoint, near_checkpoint
from distill.errors import BadInput, suggest
from distill.files import read_json
from distill.models.families.refusals import refusal_of
from distill.models.families.registry import FAMILIES, LABEL_FAMILIES, family_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

_SHAPES_ONLY: ContextVar[bool] = ContextVar("shapes only", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within this context networks are built on the meta device from config.json; weights are not downloaded or read."""
    token = _SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(token)


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Within this context diffusers and transformers draw no progress bars for the components and weights they load."""
    libraries = (sys.modules.get("diffusers.utils.logging"), sys.modules.get("transformers.utils.logging"))
    switched = [library for library in libraries if library is not None and library.is_progress_bar_enabled()]
    for library in switched:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in switched:
            library.enable_progress_bar()


def dtype_of(name: str) -> torch.dtype:
    """The dtype of this name in DTYPES; raises BadInput for another name."""
    if name not in DTYPES:
        raise BadInput(f"dtype '{name}' must be one of {', '.join(DTYPES)}.{suggest(name, DTYPES)}")
    return DTYPES[name]


def network_part(folder: Path) -> tuple[str, str]:
    """(component, class name) of the denoising network of a folder; the component is "unet" or "transformer".

    Raises:
        BadInput: if no family supports the class, or the pipeline is one of `families.refusals`.
    """
    index = read_json(folder / "model_index.json")
    part = next((p for p in ("unet", "transformer") if p in index), None)
    name = index[part][1] if part else None
    exported = {"_exported": (folder / "distill.json").is_file()}
    if part and (reason := refusal_of(index | exported, read_config(folder, part))):
        raise BadInput(f"{folder} ({index.get('_class_name')}): {reason}")
    if part is None or family_of(name) is None:
        known = ", ".join(LABEL_FAMILIES | FAMILIES)
        raise BadInput(
            f"{folder}: its network is {name}, and only {known} can be loaded; if a package of yours registers a family "
            "for it, add --allow PACKAGE."
        )
    return part, name


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """The config.json of a component; empty if the folder does not have it."""
    path = folder / part / "config.json"
    return read_json(path) if path.is_file() else {}


def takes_first_frame(folder: Path) -> bool:
    """Whether a folder's pipeline is image-to-video of a supported family."""
    pipeline, family = read_json(folder / "model_index.json").get("_class_name", ""), network_part(folder)[1]
    return "ImageToVideo" in pipeline and family in FAMILIES and bool(FAMILIES[family].frame_conditions)


def weight_variant(folder: Path) -> str | None:
    """The variant of the weights to read from a component's folder: "" for the plain ones, "fp16" where there are only those.

    None where there are no weights in safetensors.
    """
    names = [file.name for file in folder.glob("*.safetensors") if ".non_ema" not in file.name]
    if not names:
        return None
    return "fp16" if all(".fp16" in name for name in names) else ""


def pipeline_variant(folder: Path) -> str | None:
    """The `variant` with which stock `from_pretrained` reads every component of a pipeline; None for the plain weights."""
    variants = {weight_variant(part) for part in folder.iterdir() if part.is_dir()} if folder.is_dir() else set()
    return "fp16" if "fp16" in variants else None


def load_weights(kind: Any, folder: Path, **kw: Any) -> Any:
    """A model of the diffusers class `kind` from a folder with config.json and safetensors.

    Args:
        kind: the class.
        folder: the component's folder.
        kw: arguments of `from_pretrained`, such as dtype.

    Raises:
        BadInput: if weights are missing, unreadable or of other shapes.
    """
    if _SHAPES_ONLY.get():
        with torch.device("meta"):
            return torch.nn.Module.to(kind.from_config(kind.load_config(folder)), kw.get("dtype"))
    variant = weight_variant(folder)
    if variant is None:
        mend = "save the pickled weights again as safetensors" if list(folder.glob("*.bin")) else "copy them there"
        raise BadInput(f"{folder}: the network's weights (*.safetensors) are missing: {mend}.")
    try:
        with without_loading_bars():
            model, report = kind.from_pretrained(
                folder, use_safetensors=True, variant=variant or None, **kw, output_loading_info=True
            )
    except Exception as error:  # diffusers, safetensors and torch raise different classes
        raise BadInput(f"{folder}: the weights cannot be read, copy the folder again ({error}).") from error
    if wrong := report["missing_keys"] or report["mismatched_keys"]:
        raise BadInput(f"{folder}: weights missing or misshapen, such as {wrong[0]}: copy the folder again.")
    return model


def folder_of(path: str | Path, revision: str | None = None, more: tuple[str, ...] = ()) -> Path:
    """The local diffusers folder of `path`.

    Args:
        path: a diffusers folder, a model of the hub ("owner/name"), or "tiny:FAMILY".
        revision: of a model of the hub.
        more: patterns of files to download from the hub beside configs and safetensors.

    Raises:
        BadInput: if the path is not a diffusers folder, or the hub does not provide the model.
    """
    if str(path).startswith("tiny:"):
        from distill.models.diffusers import tiny

        return tiny.folder(str(path).removeprefix("tiny:"))
    folder = checkpoint(path)
    if (folder / "model_index.json").is_file():
        return folder
    # "checkpoints/x" beside a folder named checkpoints is a mistyped path, not a model of the hub.
    near = near_checkpoint(path) if not folder.exists() else ""
    local = folder.is_absolute() or folder.parent.is_dir() or near and folder.parts[0] == "checkpoints"
    if folder.exists() or local or len(folder.parts) != 2 or folder.parts[0].startswith("."):
        raise BadInput(f"{folder} is not a diffusers folder: it has no model_index.json.{near}")
    return _download(str(path), revision, more)


def _download(name: str, revision: str | None, more: tuple[str, ...]) -> Path:
    """The local snapshot of a model of the hub."""
    from huggingface_hub import snapshot_download

    # "*/*.safetensors" skips single-file copies at the top level; other precisions are ignored.
    allowed = ["*.json"] if _SHAPES_ONLY.get() else ["*.json", "*/*.safetensors", *more]
    try:
        get = partial(snapshot_download, name, revision=revision, allow_patterns=allowed)
        snapshot = get(ignore_patterns=["*.fp16*", "*.non_ema.*"])
        if not _SHAPES_ONLY.get() and not list(
            Path(snapshot).glob("*/*.safetensors")
        ):  # a model in half precision only
            snapshot = get(ignore_patterns=["*.non_ema.*"])
    except Exception as error:  # offline, absent or gated: the hub raises different classes
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise BadInput(
            f"'{name}' is neither a local folder nor a model that the hub provides ({reason}): correct the name, log in "
            f"if the model is gated, or download it on another machine and pass the folder.{near_checkpoint(name)}"
        ) from error
    return Path(snapshot)

"""What a diffusers folder holds, here or on the hub: configs and safetensors are read, no code."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from distill.errors import BadInput
from distill.nets.diffusers.audio import StableAudio
from distill.nets.diffusers.backbones import DiT, UNet2D
from distill.nets.diffusers.conditioned import Conditioned
from distill.nets.diffusers.schedulers import read_json
from distill.nets.diffusers.text import SD3, Flux, PixArt, Sana, TextUNet
from distill.nets.diffusers.video import LTX, CogVideoX, Wan

# Stock class of the denoising network -> its family: told a class number, or told tensors such as `text`.
CLASSES = {"UNet2DModel": UNet2D, "DiTTransformer2DModel": DiT}
FAMILIES: dict[str, type[Conditioned]] = {
    "UNet2DConditionModel": TextUNet, "PixArtTransformer2DModel": PixArt, "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux, "SanaTransformer2DModel": Sana, "WanTransformer3DModel": Wan,
    "CogVideoXTransformer3DModel": CogVideoX, "StableAudioDiTModel": StableAudio,
    "LTXVideoTransformer3DModel": LTX,
}
BACKBONES = {name: kind.wrap for name, kind in (CLASSES | FAMILIES).items()}  # `wrap(model, timesteps=N, **kw)`


_SHAPES: ContextVar[bool] = ContextVar("shapes alone", default=False)


@contextmanager
def shapes_alone():
    """Networks are built from their config.json on the meta device, and no weight is downloaded or read."""
    token = _SHAPES.set(True)
    try:
        yield
    finally:
        _SHAPES.reset(token)


def network_of(folder: Path) -> tuple[str, str]:
    """(part, class name) of the denoising network of a folder; BadInput for one that nothing here can load."""
    index = read_json(folder / "model_index.json")
    part = next((p for p in ("unet", "transformer") if p in index), None)
    name = index[part][1] if part else None
    if name not in BACKBONES:
        raise BadInput(f"{folder}: its network is {name}, and only {', '.join(BACKBONES)} can be loaded.")
    return part, name


def told_a_frame(folder: Path) -> bool:
    """Whether a folder's pipeline makes video from a first frame, in a way that is here."""
    kind = read_json(folder / "model_index.json").get("_class_name", "")
    return "ImageToVideo" in kind and hasattr(FAMILIES.get(network_of(folder)[1]), "framed")


def weights(kind: type, folder: Path, **kw):
    """A stock model from a folder with config.json and safetensors, every weight of it."""
    if _SHAPES.get():
        with torch.device("meta"):
            return torch.nn.Module.to(kind.from_config(kind.load_config(folder)), kw.get("dtype"))
    if not list(folder.glob("*.safetensors")):
        mend = "save the pickled weights again as safetensors" if list(folder.glob("*.bin")) else "copy them there"
        raise BadInput(f"{folder}: the network's weights (*.safetensors) are missing: {mend}.")
    try:
        model, report = kind.from_pretrained(folder, use_safetensors=True, **kw, output_loading_info=True)
    except Exception as error:  # diffusers, safetensors and torch each raise their own
        raise BadInput(f"{folder}: the weights cannot be read, copy the folder again ({error}).") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise BadInput(f"{folder}: weights missing or misshapen, such as "
                       f"{(report['missing_keys'] or report['mismatched_keys'])[0]}: copy the folder again.")
    return model


def folder_of(path: str | Path, revision: str | None = None, more: tuple[str, ...] = ()) -> Path:
    """A local diffusers folder, the local snapshot of a model of the hub (configs, parts' safetensors and `more`), or the
    pipeline that `tiny:FAMILY` stands for."""
    if str(path).startswith("tiny:"):
        from distill.nets.diffusers import tiny

        return tiny.folder(str(path).removeprefix("tiny:"))
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return folder
    here = folder.is_absolute() or folder.parent.is_dir()  # "checkpoints/x" beside a folder checkpoints is no hub id
    if folder.exists() or here or len(folder.parts) != 2 or folder.parts[0].startswith("."):
        raise BadInput(f"{folder} is no diffusers folder: it has no model_index.json.")
    from huggingface_hub import snapshot_download

    try:
        # Single-file copies of the whole pipeline lie at the top, and other precisions beside the weights.
        wanted = ["*.json"] if _SHAPES.get() else ["*.json", "*/*.safetensors", *more]
        return Path(snapshot_download(str(path), revision=revision, ignore_patterns=["*.fp16.*", "*.non_ema.*"],
                                      allow_patterns=wanted))
    except Exception as error:  # offline, absent, gated: each its own class
        text = str(error).strip().split("\n")[0].rstrip(".")
        raise BadInput(f"'{path}' is neither a folder here nor a model that the hub gives us ({text}): correct the name, log in "
                       "for a gated one, or without a network download it elsewhere and give the folder.") from error

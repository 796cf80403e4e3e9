"""A diffusers folder, here or on the hub, becomes a Denoiser: configs and safetensors are read, no code."""

from __future__ import annotations

from pathlib import Path

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.nets.diffusers.backbones import DiT, UNet2D
from distill.nets.diffusers.schedulers import prediction_of, read_json, schedule_of, stock_class
from distill.noise import Table

# Stock class of the denoising network -> how to wrap it, `wrap(model, timesteps=N, **kw)`.
BACKBONES = {"UNet2DModel": UNet2D.wrap, "DiTTransformer2DModel": DiT.wrap}


def load(path: str | Path, revision: str | None = None, **kw) -> Denoiser:
    """A Denoiser from a diffusers folder, or from a model of the hub ("owner/name"); in eval mode, float32.

    The network is read from safetensors; schedule and prediction are the scheduler's. `kw` goes to the wrapper
    (`UNet2D.wrap`: guided, flow_map, null_class, math_attention).

    Raises:
        BadInput: for a path that is no diffusers folder, missing or broken weights, a class without a wrapper, or a
            class-conditional network of which nobody says whether its last class is "no class".
    """
    folder = _folder(path, revision)
    index = read_json(folder / "model_index.json")
    part = next((p for p in ("unet", "transformer") if p in index), None)
    name = index[part][1] if part else None
    if name not in BACKBONES:
        raise BadInput(f"{folder}: its network is {name}, and only {', '.join(BACKBONES)} can be loaded.")
    schedule = schedule_of(folder)
    if not isinstance(schedule, Table):
        raise BadInput(f"{folder}: {name} counts discrete timesteps, but {index['scheduler'][1]} has none.")
    model = _weights(stock_class(name), folder / part)
    if model.config.get("num_class_embeds") and "null_class" not in kw:
        record = read_json(folder / "distill.json") if (folder / "distill.json").is_file() else {}
        if "null_class" not in record:
            raise BadInput(f"{folder}: is the last class of its network 'no class'? Pass null_class=True or False.")
        kw["null_class"] = record["null_class"]
    net = BACKBONES[name](model, timesteps=len(schedule.alphas_cumprod), **kw)
    return Denoiser(net, schedule, prediction_of(folder)).eval()


def _weights(kind: type, folder: Path):
    """A stock model from a folder with config.json and safetensors, every weight of it."""
    if not list(folder.glob("*.safetensors")):
        mend = "save the pickled weights again as safetensors" if list(folder.glob("*.bin")) else "copy them there"
        raise BadInput(f"{folder}: the network's weights (*.safetensors) are missing: {mend}.")
    try:
        model, report = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # diffusers, safetensors and torch each raise their own
        raise BadInput(f"{folder}: the weights cannot be read, copy the folder again ({error}).") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise BadInput(f"{folder}: weights missing or misshapen, such as "
                       f"{(report['missing_keys'] or report['mismatched_keys'])[0]}: copy the folder again.")
    return model


def _folder(path: str | Path, revision: str | None) -> Path:
    """A local diffusers folder, or the local snapshot of a model of the hub: configs and safetensors, no code."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return folder
    here = folder.is_absolute() or folder.parent.is_dir()  # "checkpoints/x" beside a folder checkpoints is no hub id
    if folder.exists() or here or len(folder.parts) != 2 or folder.parts[0].startswith("."):
        raise BadInput(f"{folder} is no diffusers folder: it has no model_index.json.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # offline, absent, gated: each its own class
        raise BadInput(f"'{path}' is neither a folder here nor a model that the hub gives us ({error}).") from error

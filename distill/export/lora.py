r"""LoRA files of adapters on a shared base, for weight 1.0.

y = W x + B' A x with B' = (alpha / rank) B: the factor is in the weights, so that the alpha of the file is its rank and
readers that look for an alpha and readers that do not agree. Layouts of keys:

    diffusers            unet.down_blocks.0.[...].to_q.lora_A.weight, .lora_B.weight; transformer.* for transformers
    kohya, ComfyUI       lora_unet_down_blocks_0_[...]_to_q.lora_down.weight, .lora_up.weight, .alpha      (U-Nets)
    ComfyUI              diffusion_model.blocks.0.self_attn.q.lora_A.weight, .lora_B.weight                (Wan)
    peft                 base_model.model.[...].lora_A.weight, and adapter_config.json         (PixArt, whose pipelines
                         load no LoRA: `peft.PeftModel.from_pretrained(pipe.transformer, folder)`)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import BadInput
from distill.export import text
from distill.export.request import ExportRequest
from distill.files import read_json, write_json

STOCK = "pytorch_lora_weights.safetensors"
PEFT = "adapter_model.safetensors"
# Where kohya's names and the original code's are not those of diffusers.
SDXL = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
WAN = {
    ".attn1.to_": ".self_attn.",
    ".attn2.to_": ".cross_attn.",
    ".out.0": ".o",
    ".ffn.net.0.proj": ".ffn.0",
    ".ffn.net.2": ".ffn.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
}


def write(request: ExportRequest) -> dict:
    """Write the adapter's files, the scheduler and the reference samples; return the record for distill.json.

    Raises:
        BadInput: the student has no adapter, takes w or s as an input, or has adapters on layers that the stock network
            lacks.
    """
    net = request.student.net
    if not text.takes_text(request.student):
        raise BadInput(f"{type(net).__name__} has no stock pipeline that loads a LoRA: export it {text.kinds_of(net)}.")
    if request.adapter is None:
        raise BadInput("A full fine-tune has no LoRA: train with roles.layout=shared_base, or export it as a pipeline.")
    if net.guided or net.flow_map:
        raise BadInput(
            "A student that takes w or s as an input changes biases of its base, which a LoRA does not hold: export it "
            "as a pipeline."
        )
    base = text.source(net)
    kind = text.pipeline_class(read_json(base / "model_index.json"))
    scheduler, call = text.serving(request.student, request.grid, request.sampler, base)
    weights = factors(request.adapter, net.part)
    if hasattr(kind, "load_lora_weights"):
        files = {STOCK: stock_keys(weights, net.part)}
        if net.lora_layout:
            files[f"{request.name}.safetensors"] = EXTRA_LAYOUTS[net.lora_layout](weights)
    else:
        files = {PEFT: stock_keys(weights, "base_model.model")}
        write_json(request.staging / "adapter_config.json", _peft(weights, text.base_name(net)))
    for name, keys in files.items():
        save(keys, request.staging / name, request.dtype)
    scheduler.save_pretrained(request.staging / "scheduler")
    call = text.call_arguments(kind, net, request.grid, call, guided=True)
    return (
        text.describe(request, scheduler, call)
        | {
            "pipeline": kind.__name__,
            "files": list(files),
            "rank": len(next(iter(weights.values()))[0]),
        }
        | text.write_references(request, base, kind)
    )


def factors(adapter: Any, part: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B') of every layer by its name in the stock network: W + B' A is the student's weight."""
    shared, prefix, pairs = adapter.shared, f"{part}.", {}
    for name, down, up in zip(shared.targets, adapter.down, adapter.up):
        if not name.startswith(prefix):
            raise BadInput(
                f"The adapter has a layer {name}, which is not the stock network's: set roles.adapter.targets "
                f"to '{prefix}*'."
            )
        pairs[name.removeprefix(prefix)] = (down.detach().cpu().float(), shared.scale * up.detach().cpu().float())
    return pairs


def stock_keys(weights: dict[str, tuple[Tensor, Tensor]], part: str) -> dict[str, Tensor]:
    """The layout of peft and diffusers, without alpha: that is the rank."""
    return {f"{part}.{name}.lora_{ab}.weight": w for name, pair in weights.items() for ab, w in zip("AB", pair)}


def kohya_keys(weights: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The layout of kohya's scripts and of ComfyUI for a U-Net of diffusers, with alpha = rank."""
    found = {}
    for name, (down, up) in weights.items():
        key = f"lora_unet_{SDXL.get(name, name).replace('.', '_')}"
        found |= {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(float(len(down))),
        }
    return found


def wan_keys(weights: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The layout of Wan's own code, which ComfyUI reads."""
    found = {}
    for name, pair in weights.items():
        for theirs, original in WAN.items():
            name = name.replace(theirs, original)
        found |= {f"diffusion_model.{name}.lora_{ab}.weight": w for ab, w in zip("AB", pair)}
    return found


EXTRA_LAYOUTS: dict[str, Callable[[dict], dict]] = {"kohya": kohya_keys, "wan": wan_keys}


def _peft(weights: dict[str, tuple[Tensor, Tensor]], base: str) -> dict:
    rank = len(next(iter(weights.values()))[0])
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(weights),
        "bias": "none",
        "base_model_name_or_path": base,
        "inference_mode": True,
    }


def save(weights: dict[str, Tensor], file: Path, dtype: str | None = None) -> None:
    """Write a safetensors file, with weights in `dtype` if it is given."""
    from safetensors.torch import save_file

    wanted = getattr(torch, dtype) if dtype else None
    save_file({k: w.to("cpu", wanted).contiguous() for k, w in weights.items()}, file, metadata={"format": "pt"})

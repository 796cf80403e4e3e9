r"""LoRA files of adapters on a shared base, for weight 1.0.

y = W x + B' A x with B' = (alpha / rank) B: the factor is in the weights, so that the alpha of the file is its rank and
readers that look for an alpha and readers that do not agree. Layouts of keys:

    diffusers            unet.down_blocks.0.[...].to_q.lora_A.weight, .lora_B.weight; transformer.* for transformers
    original, ComfyUI    a second file where the family has such keys (`Family.lora_keys`)
    peft                 base_model.model.[...].lora_A.weight, and adapter_config.json, where the stock pipeline loads no
                         LoRA: `peft.PeftModel.from_pretrained(pipe.transformer, folder)`
"""

from __future__ import annotations

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
        if net.family.lora_keys:
            files[f"{request.name}.safetensors"] = net.family.lora_keys(weights)
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

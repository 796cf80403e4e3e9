r"""An adapter on a shared base as a LoRA file that is right at weight 1.0.

y = W x + B' A x with B' = (alpha / rank) B: the factor is in the weights, so that the alpha of the file is its rank and
readers that look for an alpha and readers that do not agree. Two layouts of keys:

    diffusers, peft      unet.down_blocks.0.[...].to_q.lora_A.weight, .lora_B.weight; transformer.* for transformers
    kohya, ComfyUI       lora_unet_down_blocks_0_[...]_to_q.lora_down.weight, .lora_up.weight, .alpha

ComfyUI reads the first for the transformers that it knows; of U-Nets, both are written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import BadInput
from distill.export import text
from distill.export.job import Job
from distill.nets.diffusers.schedulers import read_json

STOCK, KOHYA = "pytorch_lora_weights.safetensors", "kohya.safetensors"


def write(job: Job) -> dict:
    """The adapter's files, the student's scheduler and references; the record of distill.json.

    Raises:
        BadInput: for a student without an adapter, one that is told w or s, or adapters on layers that are not the stock
            network's own.
    """
    if job.adapter is None:
        raise BadInput("A full fine-tune is no LoRA: train with roles.layout=shared_base, or export it as a pipeline.")
    net = job.student.net
    if not text.told(job.student):
        raise BadInput(f"{type(net).__name__} has no stock pipeline that loads a LoRA: export it as a pipeline.")
    if net.guided or net.flow_map:
        raise BadInput("A student that is told w or s changes biases of its base, which a LoRA does not hold: export it "
                       "as a pipeline.")
    base = text.source(net)
    kind = text.pipeline_class(read_json(base / "model_index.json"))
    if not (hasattr(kind, "load_lora_weights") or hasattr(type(net.stock), "load_lora_adapter")):
        raise BadInput(f"Neither {kind.__name__} nor {type(net.stock).__name__} loads a LoRA: export it as a pipeline.")
    scheduler, call = text.serving(job.student, job.grid, job.sampler, base)
    weights = factors(job.adapter, net.part)
    save(stock_keys(weights, net.part), job.staging / STOCK)
    files = [STOCK]
    if net.part == "unet":
        save(kohya_keys(weights), job.staging / KOHYA)
        files.append(KOHYA)
    scheduler.save_pretrained(job.staging / "scheduler")
    call = text.ask(kind, net, job.grid, call, guided=True)
    return text.describe(job, scheduler, call) | {
        "pipeline": kind.__name__, "files": files, "rank": len(next(iter(weights.values()))[0]),
    } | text.references(job, base, kind)


def factors(adapter: Any, part: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B') of every layer by its name in the stock network: W + B' A is the student's weight."""
    shared, prefix, found = adapter.shared, f"{part}.", {}
    for name, down, up in zip(shared.targets, adapter.down, adapter.up):
        if not name.startswith(prefix):
            raise BadInput(f"The adapter has a layer {name}, which is not the stock network's: set roles.adapter.targets "
                           f"to '{prefix}*'.")
        found[name.removeprefix(prefix)] = (down.detach().cpu().float(), shared.scale * up.detach().cpu().float())
    return found


def stock_keys(weights: dict[str, tuple[Tensor, Tensor]], part: str) -> dict[str, Tensor]:
    """The layout of peft and diffusers, without alpha: that is the rank."""
    return {f"{part}.{name}.lora_{ab}.weight": w for name, pair in weights.items() for ab, w in zip("AB", pair)}


def kohya_keys(weights: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The layout of kohya's scripts and of ComfyUI for a U-Net of diffusers, with alpha = rank."""
    found = {}
    for name, (down, up) in weights.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up,
                  f"{key}.alpha": torch.tensor(float(len(down)))}
    return found


def save(weights: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: w.contiguous() for k, w in weights.items()}, file, metadata={"format": "pt"})

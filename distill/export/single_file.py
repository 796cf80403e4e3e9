r"""The student's network as one safetensors file, for `from_single_file` of its stock class.

A U-Net is written under the names of the original Stable Diffusion code (`model.diffusion_model.input_blocks.[...]`),
a transformer under the names of its stock class, since the original layouts differ by family.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from distill.errors import BadInput
from distill.export import text
from distill.export.lora import save
from distill.export.request import ExportRequest
from distill.files import read_json

ROOT = "model.diffusion_model."
LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def write(request: ExportRequest) -> dict:
    """Write the network's file, the scheduler and the reference samples; return the record for distill.json.

    Raises:
        BadInput: the stock class of the network reads no single file.
    """
    model, net = text.folded_network(request), request.student.net
    name = type(model).__name__
    if name not in _loadable():
        raise BadInput(f"{name} reads no single file in diffusers: export it as a pipeline.")
    base = text.source(net)
    kind = text.pipeline_class(read_json(base / "model_index.json"))
    scheduler, call = text.serving(request.student, request.grid, request.sampler, base)
    weights = model.state_dict()
    if net.original_file:
        weights = {ROOT + key: value for key, value in originals(weights, model.config.layers_per_block).items()}
    file = f"{request.name}.safetensors"
    save(weights, request.staging / file)
    scheduler.save_pretrained(request.staging / "scheduler")
    call = text.call_arguments(kind, net, request.grid, call, guided=True)
    return (
        text.describe(request, scheduler, call)
        | {"pipeline": kind.__name__, "file": file}
        | text.write_references(request, base, kind)
    )


def originals(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The weights of a `UNet2DConditionModel` with `layers` residual blocks a resolution, by the original code's names."""
    attending = {int(found[1]) for key in weights if (found := re.match(r"up_blocks\.(\d+)\.attentions\.", key))}
    return {original(key, layers, attending): value for key, value in weights.items()}


def original(key: str, layers: int, attending: set[int]) -> str:
    """The original code's name of a weight; `attending` are the up blocks with attention, after which they upsample.

    Raises:
        BadInput: the original network has no such weight.
    """
    for name, original_name in ENDS.items():
        if key.startswith(f"{name}."):
            return original_name + key.removeprefix(name)
    found = re.fullmatch(
        r"(down|up|mid)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key
    )
    if not found:
        raise BadInput(f"The original layout of Stable Diffusion has no weight {key}: export this U-Net as a pipeline.")
    side, i, kind, j, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        name, _, end = rest.partition(".")
        rest = f"{LAYERS[name]}.{end}"
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * j}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(i + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{i * (layers + 1) + layers}.{1 + (i in attending)}.{rest}"
    block = i * (layers + 1) + j
    return f"{'input' if side == 'down' else 'output'}_blocks.{block + (side == 'down')}.{int(kind == 'attentions')}.{rest}"


def _loadable() -> Any:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    return SINGLE_FILE_LOADABLE_CLASSES

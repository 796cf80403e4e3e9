r"""The student's network as one safetensors file, for `from_single_file` of its stock class.

Weights are written under the names of the original code where the family states them (`Family.original_keys`), else under
those of the stock class.
"""

from __future__ import annotations

from typing import Any

from distill.errors import BadInput
from distill.export import text
from distill.export.lora import save
from distill.export.request import ExportRequest
from distill.files import read_json


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
    if net.family.original_keys:
        weights = net.family.original_keys(weights, model.config)
    file = f"{request.name}.safetensors"
    save(weights, request.staging / file)
    scheduler.save_pretrained(request.staging / "scheduler")
    call = text.call_arguments(kind, net, request.grid, call, guided=True)
    return (
        text.describe(request, scheduler, call)
        | {"pipeline": kind.__name__, "file": file}
        | text.write_references(request, base, kind)
    )


def _loadable() -> Any:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    return SINGLE_FILE_LOADABLE_CLASSES

"""Writes a trained Denoiser in a form that others load: pipeline, LoRA, single file or ONNX."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import __version__
from distill.data.sources.image import tile, to_uint8
from distill.denoise import Delegate, Denoiser
from distill.errors import BadInput, suggest
from distill.export.card import card
from distill.export.licence import Licence, licence_of
from distill.export.request import ExportRequest
from distill.export.verify import TOLERANCES
from distill.files import atomic_folder, write_json, write_text
from distill.models.copies import copy_network, share_weights
from distill.times import Grid

KINDS = ("pipeline", "lora", "single-file", "onnx")
PICTURED = 64  # samples on the card at most


def export(
    student: Denoiser,
    grid: Grid | int | list,
    sampler: str,
    out: str | Path,
    *,
    kind: str = "pipeline",
    method: str = "",
    recipe: dict | str | None = None,
    metrics: dict | None = None,
    samples: Tensor | None = None,
    w: float | None = None,
    licence: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> Path:
    """Write `student` in a form that others load, atomically.

    Args:
        student: a Denoiser around a network of `distill.models.diffusers`, or an adapter on one.
        grid: the times it was trained on.
        sampler: "ode" (DDIM, Euler) or "renoise" (multistep consistency, LCM).
        out: the folder to make; it must not exist.
        kind: "pipeline", "lora", "single-file" or "onnx".
        method, recipe, metrics: for the model card; recipe is the run's configuration (mapping or YAML text).
        samples: (B, C, H, W) in [-1, 1] for the picture on the card; a text-conditioned student draws its own.
        w: the guidance scale of the student, for the card; folded into the weights of a student with an input w.
        licence: of the weights, as the hub names it; by default that of the pipeline the network was loaded from, and
            "other" where none is known.
        dtype: of the weights that are written: "float32", "bfloat16" or "float16".
        device: that draws the reference samples.

    Returns:
        The folder, with the weights, distill.json, README.md and reference.safetensors.

    Raises:
        BadInput: `out` exists, no stock class serves this student in this kind, or the kind has no such dtype.
    """
    from distill.export import folder, lora, onnx, single_file, text  # and diffusers with them

    out, grid = Path(out), Grid.of(grid)
    _check_options(kind, sampler, dtype)
    device = "cpu" if kind == "onnx" else device
    recipe = recipe if isinstance(recipe, str) or recipe is None else _yaml(recipe)
    with atomic_folder(out) as staging:
        terms = Licence(licence) if licence else licence_of(student)
        request = ExportRequest(*_prepare(student, dtype, device), grid, sampler, w, staging, out.name, dtype, device)
        writers = {
            "pipeline": text if text.takes_text(request.student) else folder,
            "lora": lora,
            "single-file": single_file,
            "onnx": onnx,
        }
        about = writers[kind].write(request)
        pictures = about.pop("pictures", None)
        samples = pictures if samples is None else samples
        record = {"distill": __version__, "kind": kind, "dtype": dtype} | about
        record |= (
            {"method": method, "metrics": metrics or {}}
            | terms.record()
            | {"recipe_hash": recipe and hashlib.sha256(recipe.encode()).hexdigest()}
        )
        if samples is not None:
            tile(to_uint8(samples[:PICTURED]))[0].save(staging / "samples.png")
        if terms.file:
            shutil.copyfile(terms.file, staging / terms.file.name)
        write_text(staging / "README.md", card(record, recipe, out.name, samples is not None))
        write_json(staging / "distill.json", record)
        _share(staging)
    return out


def _check_options(kind: str, sampler: str, dtype: str) -> None:
    """Raises BadInput for an unknown kind, sampler or dtype, or two that do not go together."""
    from distill.export.folder import SAMPLERS

    if kind not in KINDS:
        raise BadInput(f"'{kind}' is not a kind of export: {', '.join(KINDS)} are.{suggest(kind, KINDS)}")
    if sampler not in SAMPLERS:
        raise BadInput(f"sampler '{sampler}' is none of {', '.join(SAMPLERS)}.")
    if dtype not in TOLERANCES:
        raise BadInput(f"dtype '{dtype}' must be one of {', '.join(TOLERANCES)}.{suggest(dtype, TOLERANCES)}")
    if kind == "onnx" and dtype != "float32":
        raise BadInput(f"ONNX graphs are written in float32: leave dtype {dtype} out.")


def _prepare(student: Denoiser, dtype: str, device: str) -> tuple[Denoiser, Any]:
    """A copy of the student in `dtype` on `device`, an adapter merged into its base; and that adapter."""
    from distill.models.diffusers import StockNetwork

    with share_weights():  # a network may fill the memory: there is room for one
        student, adapter = copy_network(student), None
    if isinstance(student.net, Delegate):
        adapter, student.net = student.net, student.net.merged()
    wanted = getattr(torch, dtype)
    if isinstance(student.net, StockNetwork):
        student.net.cast(wanted)
        return student.to(device).eval(), adapter
    return student.to(device, wanted).eval(), adapter


def _share(folder: Path) -> None:
    """Give every file the mode of a plain new file: safetensors writes files that only their owner reads.

    Hard links to the base's weights keep theirs.
    """
    mode = (folder / "distill.json").stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_nlink == 1:
            file.chmod(mode)


def _yaml(recipe: dict) -> str:
    import yaml

    return yaml.safe_dump(recipe, sort_keys=False)

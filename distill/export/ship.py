"""A trained Denoiser to a folder that others load: one function, four kinds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from distill import __version__
from distill.denoise import Delegate, Denoiser
from distill.errors import BadInput, suggest
from distill.export.card import card, picture
from distill.export.job import Job
from distill.grid import Grid
from distill.place import copy_of, shared_copies

KINDS = ("pipeline", "lora", "single-file", "onnx")


def export(student: Denoiser, grid: Grid | int | list, sampler: str, out: str | Path, *, kind: str = "pipeline",
           method: str = "", recipe: dict | str | None = None, metrics: dict | None = None,
           samples: Tensor | None = None, w: float | None = None, licence: str = "apache-2.0") -> Path:
    """Write `student` for others: all of it, or nothing.

    Args:
        student: a Denoiser around a network of `distill.nets.diffusers`, or an adapter on one.
        grid: the times it was trained on.
        sampler: "ode" or "renoise", the way it walks them.
        out: the folder to make; it must not exist.
        kind: "pipeline", "lora", "single-file" or "onnx".
        method, recipe, metrics: for the model card; recipe is the run's configuration (mapping or YAML text).
        samples: (B, C, H, W) in [-1, 1] for the picture on the card; a student that is told text draws its own.
        w: the guidance that the student imitates, for the card; folded into a student that has it as an input.
        licence: of the weights, an SPDX name in lower case.

    Returns:
        the folder, with the weights, distill.json, README.md and reference.safetensors.

    Raises:
        BadInput: if `out` exists, or nothing stock serves this student in this kind.
    """
    from distill.export import folder, lora, onnx, single, text  # and diffusers with them

    out, grid = Path(out), Grid.of(grid)
    if kind not in KINDS:
        raise BadInput(f"'{kind}' is no kind of export: {', '.join(KINDS)} are.{suggest(kind, KINDS)}")
    if sampler not in folder.SAMPLERS:
        raise BadInput(f"sampler '{sampler}' is none of {', '.join(folder.SAMPLERS)}.")
    if out.exists():
        raise BadInput(f"{out} exists already: remove it or export to another folder.")
    staging = out.with_name(f".{out.name}.partial-{os.getpid()}")
    job = Job(*_whole(student), grid, sampler, w, staging, out.name)
    recipe = recipe if isinstance(recipe, str) or recipe is None else _yaml(recipe)
    writers = {"pipeline": text if text.told(job.student) else folder, "lora": lora, "single-file": single, "onnx": onnx}
    try:
        staging.mkdir(parents=True)
        found = writers[kind].write(job)
        pictures = found.pop("pictures", None)
        samples = pictures if samples is None else samples
        record = {"distill": __version__, "kind": kind} | found | {
            "method": method, "metrics": metrics or {}, "licence": licence,
            "recipe_hash": recipe and hashlib.sha256(recipe.encode()).hexdigest(),
        }
        (staging / "distill.json").write_text(json.dumps(record, indent=2) + "\n")
        if samples is not None:
            picture(samples).save(staging / "samples.png")
        (staging / "README.md").write_text(card(record, recipe, out.name, samples is not None))
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def _whole(student: Denoiser) -> tuple[Denoiser, Any]:
    """A copy of the student that can be written, an adapter merged into its base; and that adapter."""
    with shared_copies():  # of a network as large as memory there is room for one
        student, adapter = copy_of(student), None
    if isinstance(student.net, Delegate):
        adapter, student.net = student.net, student.net.merged()
    return student.cpu().float().eval(), adapter


def _yaml(recipe: dict) -> str:
    import yaml

    return yaml.safe_dump(recipe, sort_keys=False)

"""Folders of published models without weights, from the configs that the families declare."""

from __future__ import annotations

import json
from pathlib import Path

from distill.models.diffusers import FAMILIES

MODELS = {name: (family, model) for family in FAMILIES.values() for name, model in family.published.items()}


def folder(out: Path, name: str) -> Path:
    """A pipeline's folder with configs alone."""
    family, model = MODELS[name]
    index = {
        "_class_name": model.pipeline,
        family.part: ["diffusers", family.network],
        "scheduler": ["diffusers", model.scheduler],
    }
    files = {
        "model_index.json": index | dict(model.index),
        f"{family.part}/config.json": model.network,
        "scheduler/scheduler_config.json": model.scheduler_config,
        "vae/config.json": model.vae,
    }
    for file, content in files.items():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text(json.dumps(content))
    return out

"""Verifies an export: a new process with stock diffusers, without distill, must draw the trainer's own samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

from distill.errors import BadInput
from distill.files import read_json

# Of max |stock - ours| / max(1, max |ours|), by the dtype of the weights: stock pipelines round their latents to it.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

STOCK = Path(__file__).with_name("stock.py").read_text()  # it must run without this package


def verify(out: str | Path, steps: int | None = None, base: str | Path = "", device: str = "cpu") -> float:
    r"""max |x_stock - x_ours| / max(1, max |x_ours|) over an export's reference samples; printed, and returned.

    x_stock is drawn in a new process where `import distill` fails, from the noise, labels or prompts that were stored: by
    `DiffusionPipeline.from_pretrained(out)`; for a LoRA or a single file by the base's pipeline with it, at weight 1.0;
    for ONNX by onnxruntime. `steps` other than those in distill.json only warns. `base` is where the base
    is now, if it was moved. The evaluations are in the export's dtype, on `device`.

    Raises:
        BadInput: the folder is not an export or does not load, or the difference exceeds TOLERANCES of its dtype.
    """
    trained = _steps(Path(out))
    dtype = read_json(Path(out) / "distill.json").get("dtype", "float32")
    tolerance = TOLERANCES[dtype]
    if steps not in (None, trained):
        warnings.warn(
            f"{out} is made for {trained} steps; with {steps} it may be evaluated at times it was not trained on.",
            stacklevel=2,
        )
    value = stock_differences([out], [steps or trained], base, device)[0]
    if isinstance(value, str):
        raise BadInput(f"{out}: stock code cannot sample from it: {value}")
    print(
        f"{out}: loads without distill; max |stock - ours| = {value:.2e} at {steps or trained} steps in {dtype} on "
        f"{device} (at most {tolerance:g})"
    )
    if steps in (None, trained) and not value <= tolerance:
        raise BadInput(
            f"{out}: stock code draws other samples than the trainer (max difference {value:.2e} > "
            f"{tolerance:g}): do not publish it, export again."
        )
    return value


def stock_differences(
    folders: list[str | Path], steps: list[int] | None = None, base: str | Path = "", device: str = "cpu"
) -> list[float | str]:
    """For each folder the difference, or why it cannot be computed; all in one new process."""
    steps = steps or [_steps(Path(folder)) for folder in folders]
    command = [
        sys.executable,
        "-c",
        STOCK,
        json.dumps(steps),
        str(base),
        device,
        *(str(Path(f).resolve()) for f in folders),
    ]
    offline = {"HF_HUB_OFFLINE": "1"} if all(Path(_base(Path(f)) or ".").exists() for f in folders) else {}
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)
    if run.returncode:
        raise BadInput(f"The process with stock diffusers failed: {(run.stderr.strip() or 'killed').splitlines()[-1]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def _base(out: Path) -> str | None:
    """The folder or hub name of the base of a LoRA or a single file."""
    try:
        record = read_json(out / "distill.json")
    except BadInput:
        return None
    return record.get("base") if record.get("kind") in ("lora", "single-file") else None


def _steps(out: Path) -> int:
    try:
        return read_json(out / "distill.json")["steps"]
    except (BadInput, KeyError) as error:
        raise BadInput(f"{out} was not exported by distill: it has no readable distill.json.") from error

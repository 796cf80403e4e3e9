"""Proof of an export: a fresh process with stock diffusers, and without us, must draw the trainer's own samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

from distill.errors import BadInput

TOLERANCE = 1e-4

# Runs by itself in the fresh process on argv = (steps, folder, folder, ...); a difference or a complaint of each.
STOCK = """
import json, sys
from pathlib import Path
sys.modules["distill"] = None  # from here on, importing it fails
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file


def difference(folder, steps):
    stored = load_file(folder / "reference.safetensors")
    noise, ours, states = stored["noise"], stored["samples"], []
    generator = torch.Generator().manual_seed(json.loads((folder / "distill.json").read_text())["reference"]["seed"])
    start = generator.get_state()
    if not torch.equal(torch.randn(noise.shape, generator=generator), noise):
        raise ValueError("torch draws other numbers here than where the references were made")
    torch.set_rng_state(generator.get_state())  # for pipelines that give their scheduler no generator
    generator.set_state(start)
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    step = pipe.scheduler.step

    def watched(*args, **kw):
        states.append(step(*args, **kw))
        return states[-1]

    pipe.scheduler.step = watched
    call = {"class_labels": stored["labels"].tolist()} if "labels" in stored else {}
    call |= {"guidance_scale": 1} if "transformer" in pipe.components else {"batch_size": len(noise)}
    images = pipe(num_inference_steps=steps, generator=generator, output_type="np", **call).images
    wrong = (states[-1].prev_sample - ours).abs().max() / ours.abs().max().clamp(min=1)
    shown = torch.from_numpy(images).permute(0, 3, 1, 2) - (ours / 2 + 0.5).clamp(0, 1)
    return torch.maximum(wrong, 2 * shown.abs().max()).nan_to_num(nan=float("inf")).item()


def attempt(folder, steps):
    try:
        return difference(Path(folder), steps)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


print(json.dumps([attempt(f, k) for f, k in zip(sys.argv[2:], json.loads(sys.argv[1]))]))
"""


def verify(out: str | Path, steps: int | None = None) -> float:
    r"""max |x_stock - x_ours| / max(1, max |x_ours|) over an export's reference samples; printed, and returned.

    x_stock is drawn by `DiffusionPipeline.from_pretrained(out)` in a new process where `import distill` fails, from
    the noise and labels in reference.safetensors. `steps` other than those in distill.json warns, and is not judged.

    Raises:
        BadInput: if the folder was not exported by us or does not load, or the difference exceeds 1e-4.
    """
    trained = _steps(Path(out))
    if steps not in (None, trained):
        warnings.warn(f"{out} is made for {trained} steps; {steps} may ask it at times it never saw.", stacklevel=2)
    value = compare([out], [steps or trained])[0]
    if isinstance(value, str):
        raise BadInput(f"{out}: stock diffusers cannot sample from it: {value}")
    print(f"{out}: max |stock - ours| = {value:.2e} at {steps or trained} steps")
    if steps in (None, trained) and not value <= TOLERANCE:
        raise BadInput(f"{out}: stock diffusers draws other samples than the trainer (max difference {value:.2e} > "
                       f"{TOLERANCE:g}): do not ship it, export again.")
    return value


def compare(folders: list[str | Path], steps: list[int] | None = None) -> list[float | str]:
    """What `verify` judges, of each folder, all in one fresh process: the difference, or why there is none."""
    steps = steps or [_steps(Path(folder)) for folder in folders]
    command = [sys.executable, "-c", STOCK, json.dumps(steps), *(str(Path(f).resolve()) for f in folders)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if run.returncode:
        raise BadInput(f"The process with stock diffusers failed: {(run.stderr.strip() or 'killed').splitlines()[-1]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def _steps(out: Path) -> int:
    try:
        return json.loads((out / "distill.json").read_text())["steps"]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{out} was not exported by distill: it has no readable distill.json.") from error

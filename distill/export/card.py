"""The model card of an exported student."""

from __future__ import annotations

import math

from PIL import Image
from torch import Tensor

CARD = """---
license: {licence}
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [distillation, few-step]
---

# {name}

{what}

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")  # the path of this folder
images = pipe({call}).images
images[0].save("sample.png")
```

{picture}Ask for exactly {steps} step{s}: {advice}

| convention | value |
|---|---|
| steps | {steps} |
| timesteps | {timesteps} |
| times (data 0, noise 1) | {times} |
| sampler | {sampler} |
| prediction | {prediction} |
| guidance (1 is conditional) | {guidance} |
| classes | {classes} |
{metrics}{recipe}
## Licence

{licence}
"""


def card(record: dict, recipe: str | None, name: str, pictured: bool) -> str:
    """README.md for the record of distill.json: what it is, how to load it, conventions, metrics, recipe, licence."""
    classes, steps = record["classes"], record["steps"]
    labels = f"class_labels=[i % {classes} for i in range(10)]"
    first = "batch_size=10" + f", {labels}" * (classes > 0)
    if record.get("part") == "transformer":  # its pipeline guides by default; here guidance is in the weights
        first = f"{labels}, guidance_scale=1"
    null = f"0 to {classes - 1}" + (f"; {classes} is \"no class\"" if record["null_class"] else "")
    method = f" with `{record['method']}`" if record["method"] else ""
    many = steps > 16
    return CARD.format(
        licence=record["licence"],
        name=name,
        what=f"A diffusion model for stock diffusers, made{method} by distill {record['distill']}; "
             f"it samples in {steps} step{'s' * (steps != 1)}.",
        call=f"{first}, num_inference_steps={steps}",
        picture="![samples](samples.png)\n\n" if pictured else "",
        s="s" * (steps != 1),
        steps=steps,
        advice="the numbers below were measured there." if many else "it was trained on these times only.",
        timesteps=_list(record["timesteps"]),
        times=_list(record["times"]),
        sampler={"ode": "deterministic (DDIM)", "renoise": "predict, then add fresh noise (LCM)"}[record["sampler"]],
        prediction=record["prediction"],
        guidance="none" if record["guidance"] is None else f"{record['guidance']:g}, in the weights",
        classes=null if classes else "none",
        metrics=_metrics(record["metrics"]),
        recipe=f"\n## Recipe\n\n```yaml\n{recipe.rstrip()}\n```\n" if recipe else "",
    )


def picture(samples: Tensor) -> Image.Image:
    """Samples (B, C, H, W) in [-1, 1], C = 1 or 3, side by side in one image; at most 64 of them."""
    samples = ((samples[:64].detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    count, channels, height, width = samples.shape
    columns = math.ceil(math.sqrt(count))
    sheet = Image.new("L" if channels == 1 else "RGB", (columns * width, math.ceil(count / columns) * height))
    for i, sample in enumerate(samples):
        tile = Image.fromarray((sample[0] if channels == 1 else sample.permute(1, 2, 0)).numpy())
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def _metrics(metrics: dict) -> str:
    """A table: a line for each metric or, for the nested dict of metrics.json, for each model and NFE."""
    if not metrics:
        return ""
    models = {key: metrics[key] for key in ("teacher", "training_free", "student") if key in metrics}
    if not models:
        return _table(["metric", "value"], [[name, _number(value)] for name, value in metrics.items()])
    lines = [(model, nfe, scores) for model, row in models.items() for nfe, scores in row.items()]
    names = list(dict.fromkeys(name for *_, scores in lines for name in scores))
    return _table(["model", "evaluations", *names],
                  [[model, nfe, *(_number(scores.get(name)) for name in names)] for model, nfe, scores in lines])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _list(values: list) -> str:
    text = [f"{v:g}" for v in values]
    return ", ".join(text if len(text) <= 9 else [*text[:4], "...", *text[-4:]])

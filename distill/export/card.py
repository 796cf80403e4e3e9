"""The model card of an exported student."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image
from torch import Tensor

from distill.export.usage import KINDS, task, usage

CARD = """---
license: {licence}
library_name: {library}
pipeline_tag: {task}
{base}tags: [distillation, few-step]
---

# {name}

{what}

```python
{code}
```

{picture}{advice}

| convention | value |
|---|---|
{conventions}{metrics}{recipe}
## Licence

{licence}
"""
SAMPLERS = {"ode": "deterministic (DDIM)", "renoise": "predict, then add fresh noise (LCM)"}


def card(record: dict, recipe: str | None, name: str, pictured: bool) -> str:
    """README.md for the record of distill.json: what it is, how to load it, conventions, metrics, recipe, licence."""
    code, advice = usage(record, name)
    method = f" with `{record['method']}`" if record["method"] else ""
    steps, base = record["steps"], record.get("base")
    return CARD.format(
        licence=record["licence"],
        library="onnx" if record.get("kind") == "onnx" else "diffusers",
        task=task(record),
        base=f"base_model: {base}\n" if base and not Path(base).exists() else "",  # a name on the hub
        name=name,
        what=f"A diffusion model{KINDS[record.get('kind', 'pipeline')]}, made{method} by distill {record['distill']}; "
             f"it samples in {steps} step{'s' * (steps != 1)}.",
        code=code,
        picture="![samples](samples.png)\n\n" if pictured else "",
        advice=advice,
        conventions="".join(f"| {key} | {value} |\n" for key, value in _conventions(record).items()),
        metrics=_metrics(record["metrics"]),
        recipe=f"\n## Recipe\n\n```yaml\n{recipe.rstrip()}\n```\n" if recipe else "",
    )


def _conventions(record: dict) -> dict[str, str]:
    classes, guidance = record["classes"], record["guidance"]
    null = f"0 to {classes - 1}" + (f"; {classes} is \"no class\"" if record["null_class"] else "")
    found = {
        "steps": record["steps"],
        "timesteps": _list(record["timesteps"]),
        "times (data 0, noise 1)": _list(record["times"]),
        "shift of time": f"{record['shift']:g}" if record.get("shift") else None,
        "sampler": SAMPLERS[record["sampler"]],
        "scheduler": record.get("scheduler"),
        "prediction": record["prediction"],
        "guidance (1 is conditional)": "none" if guidance is None else f"{guidance:g}, in the weights",
        "classes": (null if classes else "none") if "call" not in record else None,
        "base": record.get("base"),
        "LoRA": f"rank {record['rank']}, for weight 1.0" if "rank" in record else None,
    }
    return {key: value for key, value in found.items() if value not in (None, "")}


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

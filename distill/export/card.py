"""The model card of an exported student."""

from __future__ import annotations

from pathlib import Path

from distill.export.snippet import is_guided, kind_phrase, pipeline_tag, usage_snippet
from distill.files import markdown_table, sample_counts

CARD = """---
{front_matter}tags: [distillation, few-step]
---

# {name}

{summary}

```python
{code}
```

{picture}{advice}

{conventions}{metrics}{recipe}
## Licence

{licence}
"""
SAMPLERS = {"ode": "deterministic (DDIM)", "renoise": "multistep consistency (LCM): predict, then add fresh noise"}


def card(record: dict, recipe: str | None, name: str, pictured: bool) -> str:
    """README.md of an export.

    Args:
        record: what distill.json holds.
        recipe: the run's config as YAML.
        name: of the folder.
        pictured: whether samples.png is beside it.

    Returns:
        Summary, loading code, conventions, metrics, recipe and licence, in markdown.
    """
    code, advice = usage_snippet(record, name)
    method = f" with `{record['method']}`" if record["method"] else ""
    steps = record["steps"]
    conventions = [[key, value] for key, value in _conventions(record).items()]
    return CARD.format(
        front_matter=_front_matter(record),
        name=name,
        summary=f"A diffusion model{kind_phrase(record)}, made{method} by distill {record['distill']}; "
        f"it samples in {steps} step{'s' * (steps != 1)}.",
        code=code,
        picture="![samples](samples.png)\n\n" if pictured else "",
        advice=advice,
        conventions=markdown_table(["convention", "value"], conventions),
        metrics=_metrics(record["metrics"]),
        recipe=f"\n## Recipe\n\n```yaml\n{recipe.rstrip()}\n```\n" if recipe else "",
        licence=_licence(record),
    )


def _front_matter(record: dict) -> str:
    base = record.get("base")
    entries = {
        "license": record["licence"],
        "license_name": record.get("licence_name"),
        "license_link": record.get("licence_link"),
        "library_name": "onnx" if record.get("kind") == "onnx" else "diffusers",
        "pipeline_tag": pipeline_tag(record),
        "base_model": base if base and not Path(base).exists() else None,  # a name on the hub
    }
    return "".join(f"{key}: {value}\n" for key, value in entries.items() if value)


def _licence(record: dict) -> str:
    name = record.get("licence_name") or record["licence"]
    link = record.get("licence_link")
    if name == "other" and not link:
        return (
            "Not stated: the base model names no licence. Find its licence before you publish these weights, and state it "
            "as `license` in the front matter of this page."
        )
    return f"{name}" + (f", see {link}" if link else "") + "."


def _conventions(record: dict) -> dict[str, str]:
    classes, guidance = record["classes"], record["guidance"]
    null = f"0 to {classes - 1}" + (f'; {classes} is "no class"' if record["null_class"] else "")
    rows = {
        "steps": record["steps"],
        "timesteps": _list(record["timesteps"]),
        "times (data 0, noise 1)": _list(record["times"]),
        "shift of time": f"{record['shift']:g}" if record.get("shift") else None,
        "sampler": SAMPLERS[record["sampler"]],
        "scheduler": record.get("scheduler"),
        "prediction": record["prediction"],
        "guidance (1 is conditional)": f"{guidance:g}, in the weights" if is_guided(record) else "none",
        "classes": (null if classes else "none") if "base" not in record else None,
        "weights": record.get("dtype"),
        "base": record.get("base"),
        "LoRA": f"rank {record['rank']}, for weight 1.0" if "rank" in record else None,
    }
    return {key: value for key, value in rows.items() if value not in (None, "")}


def _metrics(metrics: dict) -> str:
    """A table with one row per metric or, for the nested dict of metrics.json, per model and number of evaluations."""
    if not metrics:
        return ""
    models = {key: metrics[key] for key in ("teacher", "training_free", "student") if key in metrics}
    if not models:
        return "\n" + markdown_table(["metric", "value"], [[name, _number(v)] for name, v in metrics.items()])
    rows = [(model, nfe, scores) for model, row in models.items() for nfe, scores in row.items()]
    names = list(dict.fromkeys(name for *_, scores in rows for name in scores))
    rows = [[model, nfe, *(_number(scores.get(name)) for name in names)] for model, nfe, scores in rows]
    counts = sample_counts(metrics.get("about", {}))
    return "\n" + markdown_table(["model", "evaluations", *names], rows) + (f"\n{counts}\n" if counts else "")


def _number(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _list(values: list) -> str:
    text = [f"{v:g}" for v in values]
    return ", ".join(text if len(text) <= 9 else [*text[:4], "...", *text[-4:]])

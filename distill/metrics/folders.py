"""Metrics of a folder of images or of shards, without a run, on one or several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import config
from distill.errors import BadInput, near_path
from distill.metrics import distances, named
from distill.metrics.features import ImageSet
from distill.metrics.shares import current_shares


def score(samples: Path, real: Path | None, metrics: Any, allow: tuple[str, ...] = ()) -> dict[str, Any]:
    """Metric -> value of the images at `samples` against those at `real`, and the number of images in both.

    Args:
        samples, real: a folder of image files, or shards; `real` may be a file of statistics for distances alone.
        metrics: names, or names with settings, as `eval.metrics` takes them. fd, mmd, precision and recall without
            `features` are of the pixels and require images of one size.

    Raises:
        BadInput: nothing to read, an unknown metric, or one that needs what is not there.
    """
    ranks, real = current_shares(), real and Path(real)
    for path in (samples, real):
        if path is not None and not path.exists():
            raise BadInput(f"{path} does not exist; give a folder of images or of shards.{near_path(path)}")
    wanted, statistics = named.settings(metrics, "--metrics"), real is not None and real.is_file()
    for name, options in wanted.items() if statistics else ():
        if name in named.FEATURES or name in ("precision", "recall") or "features" in options:
            options.setdefault("reference", str(real))
    images = named.images_of(samples)
    reference = named.images_of(real) if real is not None and not statistics else None
    measures = named.Measures(wanted, reference, allow, "--metrics")
    rows = ranks.share(len(images))
    conditions = {"caption": images.captions[rows]} if images.captions else {}
    values = measures.score(lambda: images.pixels(rows), conditions, ranks=ranks)
    plain = [name for name in wanted if name not in measures.names]
    if plain:
        values |= ranks.from_first(lambda: _plain(images, reference, plain))
    counts = {"samples": len(images), "reference": len(reference) if reference is not None else None}
    return {name: values[name] for name in wanted if name in values} | counts


def _plain(images: ImageSet, reference: ImageSet | None, names: list[str]) -> dict[str, float]:
    """Metrics of the pixels themselves."""
    if "accuracy" in names:
        raise BadInput("--metrics: accuracy needs a run's labels; leave it out, or give it `features`.")
    if reference is None:
        raise BadInput(f"--metrics: {names[0]} of pixels needs real images; leave it out, or give it `features`.")
    x, y = (_of_one_size(each) for each in (images, reference))
    if x.shape[1:] != y.shape[1:]:
        sizes = " and ".join("x".join(map(str, each.shape[:0:-1][:2])) for each in (x, y))
        raise BadInput(
            f"--metrics: {names[0]} of pixels needs images of one size, but {images.name} and {reference.name} hold {sizes}; "
            "resize them by `distill data images`, or give the metric `features`."
        )
    values: dict[str, float] = {}
    for name in names:
        if name in ("precision", "recall") and name not in values:
            values |= dict(zip(("precision", "recall"), distances.precision_recall(x, y)))
        elif name == "fd":
            values[name] = distances.frechet(x, y)
        elif name == "mmd":
            values[name] = distances.squared_mmd(x, y)
    return {name: values[name] for name in names}


def _of_one_size(images: ImageSet) -> Tensor:
    """All images (n, C, H, W); raises BadInput where they are of several sizes."""
    batches = list(images.pixels(slice(None)))
    sizes = list(dict.fromkeys(f"{batch.shape[3]}x{batch.shape[2]}" for batch in batches))
    if len(sizes) > 1:
        raise BadInput(
            f"{images.name} holds images of {len(sizes)} sizes ({', '.join(sizes[:3])}{', ...' * (len(sizes) > 3)}), and "
            "metrics of pixels need one; resize them by `distill data images`, or give the metric `features`."
        )
    return torch.cat(batches)


def metric_settings(names: str | None, settings: list[str]) -> dict[str, Any]:
    """`--metrics` and KEY=VALUE of the command line, NAME.KEY=VALUE, as `eval.metrics` takes them."""
    node: dict[str, Any] = {name: {} for name in (names or "").split(",") if name}
    for item in settings:
        if "." not in item.partition("=")[0]:
            raise BadInput(f"'{item}' must be NAME.KEY=VALUE of a metric, for example fid.weights=inception.pth.")
        node = config.plain(config.merge(node, config.override(item)))
    if not node:
        raise BadInput("--metrics: name some, for example --metrics fid,kid.")
    return node

"""Images against images: the metrics of a folder or of shards, without a run, on one process or many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distill import config
from distill.engine import launch
from distill.errors import BadInput
from distill.eval import metrics, named
from distill.eval.features import Images
from distill.eval.ranks import here
from distill.schema import Engine


def score(samples: Path, real: Path | None, asked: Any, allow: tuple[str, ...] = ()) -> dict[str, Any]:
    """Metric -> value of the images at `samples` against those at `real`, and how many there were of each.

    Args:
        samples, real: a folder of image files, or shards; `real` may be a file of statistics for distances alone.
        asked: names, or names with settings, as `eval.metrics` takes them. fd, mmd, precision and recall without
            `features` are of the pixels and want images of one size.

    Raises:
        BadInput: nothing to read, an unknown metric, or one that needs what is not there.
    """
    if launch.given():
        launch.join(Engine())
    ranks, real = here(), real and Path(real)
    file = real is not None and real.is_file()
    wanted = named.settings(asked, "--metrics")
    for name, own in wanted.items():
        if file and name in named.FEATURES | dict.fromkeys(("precision", "recall")) or "features" in own and file:
            own.setdefault("reference", str(real))
    for path in (samples, real):
        if path is not None and not path.exists():
            raise BadInput(f"{path} does not exist; give a folder of images or of shards.")
    made = named.images_of(samples)
    other = named.images_of(real) if real is not None and not file else None
    seen = named.Measures(wanted, other, allow, "--metrics")
    rows = ranks.share(len(made))
    told = {"caption": made.captions[rows]} if made.captions else {}
    found = seen.score(lambda: made.pixels(rows), told, ranks=ranks)
    plain = [name for name in wanted if name not in seen.names]
    if plain:
        found |= ranks.tell(lambda: _plain(made, other, plain))
    values = {name: found[name] for name in wanted if name in found}
    return values | {"samples": len(made), "reference": len(other) if other is not None else None}


def _plain(made: Images, other: Images | None, names: list[str]) -> dict[str, float]:
    import torch

    if other is None or "accuracy" in names:
        what = "accuracy needs a run's labels" if "accuracy" in names else f"{names[0]} of pixels needs real images"
        raise BadInput(f"--metrics: {what}; leave it out, or give it `features`.")
    x, y = (torch.cat(list(images.pixels(slice(None)))) for images in (made, other))
    both = dict(zip(("precision", "recall"), metrics.precision_recall(x, y))) if {"precision", "recall"} & set(names) else {}
    makers = {"fd": metrics.frechet, "mmd": metrics.mmd}
    return {name: both[name] if name in both else makers[name](x, y) for name in names}


def asked(names: str | None, settings: list[str]) -> dict[str, Any]:
    """`--metrics` and KEY=VALUE of the command line, NAME.KEY=VALUE, as `eval.metrics` takes them."""
    node: dict[str, Any] = {name: {} for name in (names or "").split(",") if name}
    for item in settings:
        if "." not in item.partition("=")[0]:
            raise BadInput(f"'{item}' must be NAME.KEY=VALUE of a metric, for example fid.weights=inception.pth.")
        node = OmegaConf.to_container(config.merge(OmegaConf.create(node), config.override(item)))
    if not node:
        raise BadInput("--metrics: name some, for example --metrics fid,kid.")
    return node

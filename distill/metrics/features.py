"""Features of images for metrics: feature networks by name, and cached features of reference images."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill import config
from distill.errors import BadInput, suggest
from distill.files import atomic_write
from distill.metrics.distances import moments
from distill.metrics.networks.vision import ClipNetwork, Dinov2, FeatureNetwork, InceptionFeatures, cache
from distill.metrics.shares import ALONE, SampleShares

NETWORKS: dict[str, type] = {"inception": InceptionFeatures, "dinov2": Dinov2, "clip": ClipNetwork}
BATCH = 64
Pixels = Iterator[Tensor]  # batches (B, C, H, W) in [-1, 1]


_built: dict[str, Any] = {}  # networks already built in this process, shared by metrics


def network(name: Any, settings: dict[str, Any] | None = None, allow: tuple[str, ...] = (), where: str = "") -> Any:
    """A feature network by name (inception, dinov2, clip) with settings, or any object by `_target_`, built once.

    A network of your own takes pixels (B, C, H, W) in [-1, 1] and gives features (B, d).

    Raises:
        BadInput: no such network or setting, or weights that cannot be loaded.
    """
    if isinstance(name, dict):
        node = name | (settings or {})
    elif name in NETWORKS:
        node = {config.TARGET: f"distill.metrics.networks.vision.{NETWORKS[name].__name__}"} | (settings or {})
    else:
        raise BadInput(f"{where}.features: '{name}' is none of {', '.join(NETWORKS)}.{suggest(str(name), NETWORKS)}")
    key = json.dumps([node, *allow], sort_keys=True, default=str)
    if key not in _built:
        _built[key] = config.build(node, allow, where)
    return _built[key]


def extract(net: Callable[[Tensor], Tensor], pixels: Pixels, device: torch.device | str = "cpu") -> Tensor:
    """Features (n, d), float32 on the CPU, of all batches; `net` is moved to `device` and back to the CPU afterwards."""
    if isinstance(net, FeatureNetwork):
        net.to(device)
    try:
        with torch.no_grad():
            parts = [_rows(net(x if isinstance(net, FeatureNetwork) else x.to(device)), x) for x in pixels]
    finally:
        if isinstance(net, FeatureNetwork):
            net.to("cpu")
    return torch.cat(parts) if parts else torch.empty(0, 0)


def _rows(features: Tensor, x: Tensor) -> Tensor:
    if not isinstance(features, Tensor) or len(features) != len(x):
        raise BadInput(f"features: the network must give one row for each of {len(x)} images; let it return (B, d).")
    return features.detach().float().flatten(1).cpu()


def batches(x: Tensor, size: int = BATCH, decode: Callable[[Tensor], Tensor] | None = None) -> Pixels:
    """Rows of x, decoded where they are latents."""
    for i in range(0, len(x), size):
        yield decode(x[i : i + size]) if decode else x[i : i + size]


# --- the reference ----------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """Statistics of the real images: features (n, d), or their mean and covariance, as published files have them."""

    name: str
    features: Tensor | None = None
    published: tuple[Tensor, Tensor] | None = None

    def rows(self, metric: str) -> Tensor:
        if self.features is None:
            raise BadInput(
                f"{metric} compares features one by one, and {self.name} holds their mean and covariance alone; "
                "give images, or a file with `features`."
            )
        return self.features

    def moments(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Mean and covariance, computed once."""
        if self.published is None:
            self.published = moments(self.features.to(device))
        return self.published


def stored(path: Path, width: int) -> Reference:
    """A file of statistics: .npz with `mu` and `sigma` as published, or .npz or .safetensors with `features` (n, d).

    Raises:
        BadInput: it holds none, or those of another network.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            arrays = load_file(path)
        else:
            with np.load(path, allow_pickle=False) as file:
                arrays = {k: torch.from_numpy(file[k]) for k in file.files if file[k].dtype.kind == "f"}
    except Exception as error:  # numpy's, zipfile's and safetensors' own
        text = (str(error) or repr(error)).splitlines()[0]
        raise BadInput(f"reference: {path} cannot be read as statistics ({text}); copy it again.") from error
    if "features" in arrays:
        real, size = Reference(str(path), arrays["features"].float()), arrays["features"].shape[1:]
    elif {"mu", "sigma"} <= arrays.keys():
        size = arrays["mu"].shape
        real = Reference(str(path), None, (arrays["mu"].double(), arrays["sigma"].double()))
    else:
        raise BadInput(f"reference: {path} holds {', '.join(arrays) or 'nothing'}; it needs mu and sigma, or features.")
    if size != (width,) or real.published and real.published[1].shape != (width, width):
        raise BadInput(
            f"reference: {path} holds statistics of {tuple(size)} features and the network gives {width}; "
            "use those of this network."
        )
    return real


def reference(
    net: Any, images: ImageSet, device: torch.device | str = "cpu", ranks: SampleShares = ALONE
) -> Reference | None:
    """Features of real images on the first rank, None on the others; all ranks call it.

    They are read from the cache if the same network has seen the same images before; else each rank computes its share.
    """
    file = cache() / "features" / f"{net.key}-{images.key}.safetensors" if isinstance(net, FeatureNetwork) else None
    features = _read(file) if ranks.rank == 0 else None
    if not ranks.from_first(lambda: features is not None):
        local = ranks.on_all(lambda: extract(net, images.pixels(ranks.share(len(images))), device))
        features = ranks.gather(local)
        if features is not None and file:
            _save(features, file)
    return None if features is None else Reference(images.name, features)


def _read(file: Path | None) -> Tensor | None:
    """The features in a cache file; None if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file or not file.is_file():
        return None
    try:
        return load_file(file).get("features")
    except (SafetensorError, OSError):
        return None


def _save(features: Tensor, file: Path) -> None:
    from safetensors.torch import save

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file, "wb") as out:
            out.write(save({"features": features.contiguous()}))
    except OSError:
        return  # only a cache: with a full or read-only disk it is computed again next time


# --- real images ------------------------------------------------------------------------------------------------


class ImageSet:
    """Images in memory, latents of them with `decode`, as a reference.

    Attributes:
        key: names their content.
        captions: one per image, or None.
    """

    def __init__(
        self,
        x: Tensor,
        decode: Callable[[Tensor], Tensor] | None = None,
        name: str = "the data",
        captions: list[str] | None = None,
    ):
        self.x, self.decode, self.name, self.captions = x, decode, name, captions

    def __len__(self) -> int:
        return len(self.x)

    @functools.cached_property
    def key(self) -> str:
        x = self.x.detach().cpu().float().contiguous()
        owner = getattr(self.decode, "__self__", None)  # the object that holds a decoder which is a bound method
        coder = getattr(self.decode, "key", None) or getattr(getattr(owner, "look", None), "key", None)
        total = hashlib.sha256(f"{tuple(x.shape)} {coder}".encode())
        total.update(x.numpy())
        return total.hexdigest()[:16]

    def pixels(self, rows: slice) -> Pixels:
        return batches(self.x[rows], decode=self.decode)


class ImageFolder(ImageSet):
    """Image files of a folder, of any sizes, read batch by batch."""

    def __init__(self, path: str | Path):
        from distill.data.sources.folder import SourceFolder
        from distill.data.sources.text import captions

        self.name, self.files = str(path), SourceFolder.open(Path(path)).files
        self.captions = captions(self.files)

    def __len__(self) -> int:
        return len(self.files)

    @functools.cached_property
    def key(self) -> str:
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]

    def pixels(self, rows: slice) -> Pixels:
        from distill.data.sources.folder import pixels

        batch: list[Tensor] = []
        for file in self.files[rows]:
            image = torch.from_numpy(pixels(file, 3, None)).float()[None] / 127.5 - 1
            if batch and (len(batch) == BATCH or batch[0].shape != image.shape):
                yield torch.cat(batch)
                batch = []
            batch.append(image)
        if batch:
            yield torch.cat(batch)

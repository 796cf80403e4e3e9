"""What to measure for a kind of data: images against a reference split, 2-D toys against their exact law."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import BadInput
from distill.eval import features, metrics, named, pictures, table
from distill.eval.ranks import ALONE, Ranks

WIDE = 4096  # values of a sample up to which the covariance of the samples themselves has a root in seconds


class Images:
    """Samples against reference images: by themselves, and by networks that look at them where `metrics` names such.

    Args:
        x, label: the reference split (n, C, H, W) in [-1, 1], or latents, and its classes (n,) or None.
        held_out: the other split, for the finite-sample floor: the distance of two sets of real images.
        reward: what a method ranks its samples by, `metric(x, **cond) -> (B,)`; its mean is scored too.
        metrics: what to measure, a list of names or names with settings (`distill.eval.named`); without it fd (of up to
            4,096 values), mmd, accuracy, precision and recall of the samples as they are.
        decode: latents to pixels, for networks and pictures.
        allow: packages that a metric's `_target_` may name.
    """

    def __init__(self, x: Tensor, label: Tensor | None = None, held_out: Tensor | None = None, reward: Any = None, *,
                 metrics: Any = None, decode: Callable[[Tensor], Tensor] | None = None, allow: tuple[str, ...] = ()):
        self.x, self.label, self.held_out, self.reward, self.decode = x, label, held_out, reward, decode
        wide = x[0].numel() > WIDE
        asked = named.settings(metrics) if metrics else dict.fromkeys(named.PLAIN[wide:], {})
        self.plain = [name for name in asked if name in named.PLAIN and "features" not in asked[name]]
        if wide and "fd" in self.plain:
            raise BadInput(f"eval.metrics: samples of {x[0].numel():,} values are too many for fd, which roots their covariance; "
                           "name a distance of features, such as kid or fd_dinov2.")  # fmt: skip
        self.k = {name: asked[name].get("k", 3) for name in self.plain}
        self.seen = named.Measures(asked, features.Images(x, decode), allow)
        self.names = [*asked, *(["reward"] if reward else [])]

    @property
    def headline(self) -> str:
        """The first metric of which less is better, or the first."""
        return next((name for name in self.names if not table.higher(name)), self.names[0])

    @cached_property
    def accuracy(self) -> metrics.Accuracy | None:
        return None if self.label is None else metrics.Accuracy(self.x, self.label)

    def score(self, x: Tensor, cond: dict[str, Any], quick: bool = False, ranks: Ranks = ALONE) -> dict[str, float]:
        """Metric -> value of samples x made under `cond`; `quick` leaves out what needs all pairs of samples.

        With `ranks`, all of them call it with their shares of the samples, and have the values of all.
        """
        x = x.cpu().float()
        label = cond.get("label")
        whole = ranks.gather(x), ranks.gather(label) if label is not None else None
        found = ranks.tell(lambda: self._plain(*whole, quick))
        if self.reward:
            each = ranks.gather(ranks.all_well(lambda: self.reward(x, **cond).double()))
            found["reward"] = ranks.tell(lambda: float(each.mean()))
        found |= self.seen.score(lambda: self.pixels(x), cond, quick, ranks)
        return {name: found[name] for name in self.names if name in found}

    def pixels(self, x: Tensor) -> features.Pixels:
        return features.batches(x, decode=self.decode)

    def _plain(self, x: Tensor, label: Tensor | None, quick: bool) -> dict[str, float]:
        out: dict[str, float] = {}
        for name in self.plain:
            if quick and name in named.SLOW and name != self.headline:
                continue
            if name == "fd":
                out[name] = metrics.frechet(x, self.x)
            elif name == "accuracy" and self.accuracy and label is not None:
                out[name] = self.accuracy.score(x, label)
            elif name == "mmd":
                out[name] = metrics.mmd(x, self.x)
            elif name in ("precision", "recall") and name not in out:
                both = dict(zip(("precision", "recall"), metrics.precision_recall(x, self.x, self.k[name])))
                out |= {key: value for key, value in both.items() if self.k.get(key) == self.k[name]}
        return out

    def floor(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Distances between the two real splits: what a perfect model would show against the held-out one."""
        if self.held_out is None:
            return {}
        own = self.held_out[ranks.share(len(self.held_out))]
        found = self.seen.score(lambda: self.pixels(own), {}, True, ranks, only=self.distances)
        return ({"fd": metrics.frechet(self.x, self.held_out)} if "fd" in self.plain else {}) | found

    @property
    def distances(self) -> list[str]:
        return [name for name in self.seen.names if not table.higher(name)]

    def picture(self, panels: dict[str, Tensor], path: str | Path, columns: int = 10) -> None:
        made = {k: torch.cat(list(self.pixels(v.cpu().float()))) for k, v in panels.items()}
        pictures.compare(made, path, columns=columns)


class Toy:
    """Energy distance, exact divergences and mode masses against an oracle of `distill.denoise`.

    In one dimension with a deterministic student also `map_error`: root mean square of G(z) - flow map(z), over the
    data's standard deviation.
    """

    headline = "energy"

    def __init__(self, oracle: Any, samples: int = 4000, seed: int = 12345):
        self.oracle = oracle
        self.x, _ = oracle.sample(samples, generator=torch.Generator().manual_seed(seed))

    def score(self, x: Tensor, cond: dict[str, Any], quick: bool = False, ranks: Ranks = ALONE) -> dict[str, float]:
        x = ranks.gather(x.float())
        return ranks.tell(lambda: self._score(x, quick))

    def _score(self, x: Tensor, quick: bool) -> dict[str, float]:
        out = {"energy": metrics.energy_distance(x, self.x)}
        if not quick:
            out["nll_gap"] = metrics.nll_gap(x, self.oracle)
            if hasattr(self.oracle, "means"):
                out["mode_kl"] = metrics.mode_kl(x, self.oracle)
        return out

    def map_error(self, z: Tensor, x: Tensor) -> float:
        """RMS of x - exact flow map(z, 1 -> 0), over the data's standard deviation."""
        n = len(z)
        exact = self.oracle.flow_map(z.double(), torch.ones(n).double(), torch.zeros(n).double())
        return float((x.double() - exact).square().mean().sqrt() / self.x.std())

    def floor(self, ranks: Ranks = ALONE) -> dict[str, float]:
        other, _ = self.oracle.sample(len(self.x), generator=torch.Generator().manual_seed(54321))
        return {"energy": metrics.energy_distance(other, self.x)}

    def picture(self, panels: dict[str, Tensor], path: str | Path, columns: int = 0) -> None:
        panels = {k: v.cpu().float() for k, v in panels.items()}
        if self.x.shape[1] == 2:
            pictures.scatter(panels, path, reference=self.oracle)
        else:
            pictures.histogram(panels, path, reference=self.x)

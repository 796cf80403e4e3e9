"""Data through a pipeline's own autoencoder and text encoders, once: `distill data encode` and `distill data prompts`.

OUT/SPLIT holds shards of latents `x`, conditions by the names that the networks are told them (`text`, `pooled`, ...),
captions, and the null condition beside each index. Latents are scaled as the network trains on them. Several processes
share the shards out; whatever is killed goes on with the same command.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.data import sources
from distill.data.info import Info
from distill.data.parts import Parts, Row, name
from distill.data.sources import Item, Plan, Settings
from distill.errors import BadInput

Say = Callable[[str], Any]


@dataclass
class Task:
    """All that a process needs to know.

    Attributes:
        src, out, pipeline: folder or prompts file, the folder to make, a diffusers folder or hub id.
        how: how the source is read.
        dtype: of stored floats, "float16" or "float32".
        precision: of the encoders' weights, "float32" or "bfloat16".
        batch: samples encoded at once.
        length: tokens of a prompt (`max_sequence_length`); None takes the pipeline's default.
        skip_bad: leave out what cannot be read, and list it in OUT/skipped.txt; else it is refused.
    """

    src: Path
    out: Path
    pipeline: str
    how: Settings
    dtype: str = "float16"
    precision: str = "float32"
    batch: int = 8
    length: int | None = None
    skip_bad: bool = False

    @property
    def prompts(self) -> bool:
        return not self.src.is_dir()


class Coder:
    """A pipeline's encoders on a device, loaded when they are asked."""

    def __init__(self, task: Task, device: str):
        from distill.nets.diffusers import Geometry, fingerprints

        self.task, self.device = task, device
        self.geometry, self.prints = Geometry.of(task.pipeline), fingerprints(task.pipeline)
        self.options = {} if task.length is None else {"max_sequence_length": task.length}

    @cached_property
    def latent(self) -> Any:
        from distill.nets.diffusers import Latent

        return Latent(self.task.pipeline, dtype=self.task.precision, device=self.device)

    @cached_property
    def text(self) -> Any:
        from distill.nets.diffusers import Prompts

        return Prompts(self.task.pipeline, dtype=self.task.precision, device=self.device)

    @cached_property
    def frames(self) -> Any:
        from distill.nets.diffusers import FirstFrames

        return FirstFrames(self.task.pipeline, dtype=self.task.precision, device=self.device)

    @cached_property
    def null(self) -> dict[str, Tensor] | None:
        """One row by name; None for a network that is not told text."""
        return self.text.null(**self.options) if self.geometry.text else None

    def rows(self, items: list[Item]) -> Iterator[Row]:
        """Samples as they are stored.

        Raises:
            BadInput: pixels of several shapes, or that the pipeline does not take; values that float16 cannot hold.
        """
        whole = [i for i in items if not i.bad]
        latents = self._latents(whole) if whole and whole[0].pixels is not None else [None] * len(whole)
        told, kept = self._told([i.caption for i in whole]) if self.geometry.text else {}, iter(range(len(whole)))
        told |= self._framed(whole, latents) if whole and self.geometry.framed else {}
        for item in items:
            if item.bad:
                yield Row(item.key, skipped=item.bad)
                continue
            n = next(kept)
            label = None if self.geometry.text else item.label
            cond = {k: self.stored(v[n], k, item.key) for k, v in told.items()}
            x = None if latents[n] is None else self.stored(latents[n], "x", item.key)
            yield Row(item.key, x, cond, label, item.caption)

    def _latents(self, items: list[Item]) -> Tensor:
        shapes = {tuple(i.pixels.shape): i.key for i in items}
        if len(shapes) > 1:
            (a, first), (b, other), *_ = shapes.items()
            raise BadInput(f"sample {first} is {a} and {other} is {b}: give --size (and --frames) to bring all to one.")
        shape, sound = tuple(items[0].pixels.shape), len(self.geometry.shape) == 2
        if len(shape) != len(self.geometry.shape):
            kinds = {2: "sound (C, L)", 3: "images", 4: "video (F, H, W, 3)"}
            raise BadInput(f"{self.task.src} holds {kinds[len(shape)]}, but {self.task.pipeline} makes "
                           f"{kinds[len(self.geometry.shape)]}: give data of that kind.")
        if not sound:
            self.geometry.size(shape[-2:])
        try:
            x = self.latent.encode(torch.stack([i.pixels for i in items])).float().cpu()
        except RuntimeError as error:  # such as another number of channels
            text = str(error).splitlines()[0]
            raise BadInput(f"the autoencoder of {self.task.pipeline} refuses samples of shape {shape}, {items[0].key} the "
                           f"first: {text}; give data of its kind, or a smaller --batch.") from error
        if not sound and tuple(x.shape[1:]) != self.geometry.latents(shape):
            raise BadInput(f"{self.task.pipeline}: its autoencoder makes {tuple(x.shape[1:])} of pixels {shape}, but its "
                           f"network takes {self.geometry.latents(shape)}: give a folder whose parts belong together.")
        return x

    def _told(self, captions: list[str]) -> dict[str, Tensor]:
        """Conditions of captions; an empty one is the null condition."""
        asked = [c for c in dict.fromkeys(captions) if c]
        made = self.text(asked, **self.options) if asked else {}
        rows = {k: torch.cat([v, made[k]]) if k in made else v for k, v in self.null.items()}
        place = {"": 0} | {c: n for n, c in enumerate(asked, 1)}
        return {k: v[[place[c] for c in captions]] for k, v in rows.items()}

    def _framed(self, items: list[Item], latents: Tensor) -> dict[str, Tensor]:
        """Conditions of first frames; where the stock pipeline draws one, the draw is of the sample's key."""
        rows = []
        for item, x in zip(items, latents):
            frame = ((item.pixels[:, 0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
            random = torch.Generator().manual_seed(crc32(item.key.encode()))
            rows.append(self.frames([Image.fromarray(frame.numpy())], tuple(x.shape[1:]), random))
        return {k: torch.cat([row[k] for row in rows]) for k in rows[0]}

    def stored(self, x: Tensor, what: str, key: str) -> np.ndarray:
        """Floats in the type to store; BadInput when they are not finite in it."""
        if not torch.is_floating_point(x):
            return x.numpy()
        kept = x.to(getattr(torch, self.task.dtype))
        if not torch.isfinite(kept).all():
            mend = "give --dtype float32" if torch.isfinite(x).all() else "look at this sample and the encoder's precision"
            raise BadInput(f"sample {key}: '{what}' is not finite as {self.task.dtype}; {mend}.")
        return kept.numpy()


# -- the verbs -------------------------------------------------------------------------------------------------------


def run(task: Task, workers: int = 1, say: Say = print) -> dict[str, Info] | None:
    """Encode: this process's share of the shards, by `workers` processes of its own.

    Under torchrun or srun each rank does its share. Returns what was written by folder, or None where other processes are
    still at it, or where OUT is whole already.

    Raises:
        BadInput: whatever is wrong with source, pipeline or OUT; a worker that ended.
    """
    coder, parts = _begin(task)
    if parts.whole:
        say(f"{task.out}: whole already.")
        return None
    rank, world = int(_env("RANK", "SLURM_PROCID", 0)), int(_env("WORLD_SIZE", "SLURM_NTASKS", 1))
    mine = [n for n, job in enumerate(parts.jobs) if n % world == rank and not parts.done(job)]
    say(f"{task.out}: {len(parts.jobs) - parts.left()} of {len(parts.jobs)} shards are there.")
    workers = min(workers, len(mine))
    if workers > 1:
        _spread(task, mine, workers, say)
    else:
        _work(task, mine, _local(), coder, parts, say)
    kept = parts.plan
    made = {**coder.prints, "pipeline": task.pipeline, "size": _words(task, coder), "framed": " ".join(coder.geometry.framed)}
    text = coder.geometry.text
    info = Info(_shape(task, coder), 0 if text else kept["classes"], names=() if text else tuple(kept["names"]),
                captions=kept["captions"], dtype="float32",
                source=f"{task.src.resolve().name}, encoded", encoder=made)  # fmt: skip
    return parts.finish(info)


def _begin(task: Task) -> tuple[Coder, Parts]:
    """What all processes begin with: the same plan, whoever made it."""
    if not task.src.exists():
        raise BadInput(f"{task.src} does not exist: give the folder of the data, or the file of the prompts.")
    coder = Coder(task, "cpu")
    if not task.prompts and "vae" not in coder.prints:
        raise BadInput(f"{task.pipeline} has no autoencoder (vae), so nothing is encoded by it: give the folder of a latent "
                       "model, or train on pixels (`distill data images`).")
    if task.prompts and not coder.geometry.text:
        raise BadInput(f"{task.pipeline}: its network is told no text, so prompts are of no use to it; give another pipeline.")
    if task.prompts and coder.geometry.framed:
        raise BadInput(f"{task.pipeline} is told a first frame beside the prompt: give a folder of videos with captions to "
                       "`distill data encode`, which stores both.")
    size = coder.geometry.size(task.how.size)
    task.how.multiple = coder.geometry.multiple
    task.how.size = size if task.how.size or task.how.buckets or not task.prompts else None
    if task.how.buckets and (size is None or len(coder.geometry.shape) != 3):
        raise BadInput(f"--buckets sorts images, and {task.pipeline} makes no images: leave it out.")
    about = {"source": str(task.src.resolve()), **coder.prints, **asdict(task.how),
             "dtype": task.dtype, "precision": task.precision, "length": task.length}
    parts = Parts(task.out, about)
    if not parts.whole and parts.plan is None:
        plan = _plan(task, coder)
        parts.begin(asdict(plan))
    return coder, parts


def _plan(task: Task, coder: Coder) -> Plan:
    if task.prompts:
        return sources.plan_prompts(sources.prompts(task.src), task.how)
    plan = sources.plan(task.src, task.how)
    if coder.geometry.text and not plan.captions:
        raise BadInput(f"{task.src} has no captions, which {task.pipeline} is told: write a .txt beside each file, or give "
                       "--caption 'a photo of {class}', or '' for the null condition.")
    return plan


def _spread(task: Task, mine: list[int], workers: int, say: Say) -> None:
    shares = [mine[w::workers] for w in range(workers)]
    try:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            done = [pool.submit(_worker, task, share, w, workers) for w, share in enumerate(shares)]
            for future in done:
                future.result()
    except BrokenProcessPool:
        raise BadInput(f"a worker was killed (by a full memory, perhaps); give the same command again with fewer --workers: "
                       f"the shards of {task.out} that are whole are kept.") from None
    say(f"{task.out}: {len(mine)} shards written by {workers} processes.")


def _worker(task: Task, jobs: list[int], number: int, workers: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    coder, parts = _begin(task)
    _work(task, jobs, _local() * workers + number, coder, parts, lambda text: None)


def _work(task: Task, jobs: list[int], number: int, coder: Coder, parts: Parts, say: Say) -> None:
    if torch.cuda.is_available():
        coder.device = f"cuda:{number % torch.cuda.device_count()}"
    if jobs and coder.null is not None:
        parts.keep_null({k: torch.from_numpy(coder.stored(v, k, "of the null condition")) for k, v in coder.null.items()})
    for n in jobs:
        job = parts.jobs[n]
        note = parts.write(job, _rows(task, job, coder, parts.plan["names"]))
        say(f"{job['at']}/{name(job)}: {note.count} samples" + (f", {len(note.skipped)} skipped" if note.skipped else ""))


def _rows(task: Task, job: dict[str, Any], coder: Coder, names: list[str]) -> Iterator[Row]:
    items = sources.read(job, names, task.how)
    while batch := list(islice(items, task.batch)):
        bad = next((i.bad for i in batch if i.bad), None)
        if bad and not task.skip_bad:
            raise BadInput(f"{bad}: repair or remove it, or give --skip-bad.")
        yield from coder.rows(batch)


def _words(task: Task, coder: Coder) -> str:
    """The size in pixels, in words."""
    size = task.how.size
    return "" if size is None else f"{'buckets of ' if task.how.buckets else ''}{size[0]}x{size[1]}"


def _shape(task: Task, coder: Coder) -> tuple[int, ...]:
    """Of the latents that the network will make from prompts of this size; samples tell their own."""
    shape, size, frames = coder.geometry.shape, task.how.size, task.how.frames
    if size is None:
        return shape
    frames = (frames,) if frames and len(shape) == 4 else ()
    made = coder.geometry.latents((3, *frames, *size))
    return made if frames or len(shape) == 3 else (*shape[:2], *made[1:])


def _local() -> int:
    """Which of this machine's ranks this is."""
    return int(_env("LOCAL_RANK", "SLURM_LOCALID", 0))


def _env(torchrun: str, slurm: str, default: int) -> str | int:
    return os.environ.get(torchrun) or os.environ.get(slurm) or default

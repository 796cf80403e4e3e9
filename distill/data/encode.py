"""`distill data encode` and `distill data prompts`: stores the outputs of a pipeline's autoencoder and text encoders.

OUT/SPLIT holds shards of latents `x`, conditions by the names of the network's arguments (`text`, `pooled`, ...), captions,
and the null condition beside each index. Latents are scaled as in the network's training. Several processes share the
shards. After an interruption the same command continues.
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

from distill.config import launcher, plugins
from distill.data.info import Info
from distill.data.shards.resume import STATE, ResumableFolder
from distill.data.shards.sample import Sample
from distill.data.shards.write import Skipped, shard_name
from distill.data.sources import text
from distill.data.sources.folder import state
from distill.data.sources.image import to_uint8
from distill.data.sources.plan import (
    Plan,
    ShardJob,
    SourceItem,
    SourceSettings,
    plan_folder,
    plan_prompts,
    read_items,
)
from distill.errors import BadInput, near_path

Progress = Callable[[str], Any]
_KINDS = {2: "sound (C, L)", 3: "images", 4: "video (F, H, W, 3)"}  # by number of axes of the pixels


@dataclass
class EncodeConfig:
    """The arguments of an encoding, equal on all processes.

    Attributes:
        src: folder of the data, or file of prompts.
        out: the folder to create.
        pipeline: a diffusers folder or hub id.
        source: how `src` is read.
        dtype: of stored floats, "float16" or "float32".
        precision: of the encoders' weights, "float32" or "bfloat16".
        batch: samples encoded at once.
        length: tokens of a prompt (`max_sequence_length`); None takes the pipeline's default.
        skip_bad: leave out what cannot be read and list it in OUT/skipped.txt; else it is an error.
        state: digest of the files of `src` at the start, see `sources.folder.state`; "" has it computed.
    """

    src: Path
    out: Path
    pipeline: str
    source: SourceSettings
    dtype: str = "float16"
    precision: str = "float32"
    batch: int = 8
    length: int | None = None
    skip_bad: bool = False
    state: str = ""

    @property
    def prompts(self) -> bool:
        """Whether `src` is a file of prompts."""
        return not self.src.is_dir()


class Encoder:
    """A pipeline's encoders on a device; each is loaded at its first use."""

    def __init__(self, config: EncodeConfig, device: str):
        from distill.models.diffusers import Geometry, fingerprints

        self.config, self.device = config, device
        self.geometry, self.fingerprints = Geometry.of(config.pipeline), fingerprints(config.pipeline)
        self.options = {} if config.length is None else {"max_sequence_length": config.length}

    @cached_property
    def latent(self) -> Any:
        from distill.models.diffusers import Latent

        return Latent(self.config.pipeline, dtype=self.config.precision, device=self.device)

    @cached_property
    def text(self) -> Any:
        from distill.models.diffusers import Prompts

        return Prompts(self.config.pipeline, dtype=self.config.precision, device=self.device)

    @cached_property
    def frames(self) -> Any:
        from distill.models.diffusers import FirstFrames

        return FirstFrames(self.config.pipeline, dtype=self.config.precision, device=self.device)

    @cached_property
    def null(self) -> dict[str, Tensor] | None:
        """The null condition by name, one row each; None for a network without text."""
        return self.text.null(**self.options) if self.geometry.text else None

    def encode(self, items: list[SourceItem]) -> Iterator[Sample | Skipped]:
        """Samples as they are stored.

        Raises:
            BadInput: pixels of several shapes, or that the pipeline does not take; values that float16 cannot hold.
        """
        readable = [item for item in items if not item.error]
        latents = None
        if readable and readable[0].pixels is not None:
            latents = self._encode_pixels(readable)
        conditions = self._encode_captions([item.caption for item in readable]) if self.geometry.text else {}
        if readable and self.geometry.frame_conditions:
            conditions |= self._encode_first_frames(readable, latents)
        rows = iter(range(len(readable)))
        for item in items:
            if item.error:
                yield Skipped(item.key, item.error)
                continue
            row = next(rows)
            label = None if self.geometry.text else item.label
            cond = {name: self.stored(value[row], name, item.key) for name, value in conditions.items()}
            x = None if latents is None else self.stored(latents[row], "x", item.key)
            yield Sample(x, label, item.caption, cond, item.key)

    def _encode_pixels(self, items: list[SourceItem]) -> Tensor:
        shape = self._common_shape(items)
        is_sound = len(shape) == 2
        if not is_sound:
            self.geometry.size(shape[-2:])
        try:
            x = self.latent.encode(torch.stack([item.pixels for item in items])).float().cpu()
        except RuntimeError as error:  # for example a wrong number of channels
            reason = str(error).splitlines()[0]
            raise BadInput(
                f"the autoencoder of {self.config.pipeline} refuses samples of shape {shape}, {items[0].key} the "
                f"first: {reason}; give data of its kind, or a smaller --batch."
            ) from error
        if not is_sound and tuple(x.shape[1:]) != self.geometry.latents(shape):
            raise BadInput(
                f"{self.config.pipeline}: its autoencoder makes {tuple(x.shape[1:])} of pixels {shape}, but its "
                f"network takes {self.geometry.latents(shape)}: give a folder whose parts belong together."
            )
        return x

    def _common_shape(self, items: list[SourceItem]) -> tuple[int, ...]:
        keys = {tuple(item.pixels.shape): item.key for item in items}
        if len(keys) > 1:
            (a, first), (b, second), *_ = keys.items()
            raise BadInput(
                f"sample {first} is {a} and {second} is {b}: give --size (and --frames) to bring all to one shape."
            )
        shape = tuple(items[0].pixels.shape)
        if len(shape) != len(self.geometry.shape):
            raise BadInput(
                f"{self.config.src} holds {_KINDS[len(shape)]}, but {self.config.pipeline} makes "
                f"{_KINDS[len(self.geometry.shape)]}: give data of that kind."
            )
        return shape

    def _encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Conditions of captions; an empty caption is the null condition."""
        distinct = [caption for caption in dict.fromkeys(captions) if caption]
        encoded = self.text(distinct, **self.options) if distinct else {}
        row = {"": 0} | {caption: i for i, caption in enumerate(distinct, 1)}
        rows = [row[caption] for caption in captions]
        conditions = {}
        for name, null in self.null.items():
            values = torch.cat([null, encoded[name]]) if name in encoded else null
            conditions[name] = values[rows]
        return conditions

    def _encode_first_frames(self, items: list[SourceItem], latents: Tensor) -> dict[str, Tensor]:
        """Conditions of first frames. Where the stock pipeline draws them at random, the sample's key is the seed."""
        rows = []
        for item, x in zip(items, latents):
            frame = to_uint8(item.pixels[:, 0]).transpose(1, 2, 0)
            random = torch.Generator().manual_seed(crc32(item.key.encode()))
            rows.append(self.frames([Image.fromarray(frame)], tuple(x.shape[1:]), random))
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def stored(self, x: Tensor, name: str, key: str) -> np.ndarray:
        """A tensor in the dtype to store.

        Raises:
            BadInput: its floats are not finite in that dtype; `name` and `key` are in the message.
        """
        if not torch.is_floating_point(x):
            return x.numpy()
        cast = x.to(getattr(torch, self.config.dtype))
        if not torch.isfinite(cast).all():
            finite = torch.isfinite(x).all()
            mend = "give --dtype float32" if finite else "look at this sample and the encoder's precision"
            raise BadInput(f"sample {key}: '{name}' is not finite as {self.config.dtype}; {mend}.")
        return cast.numpy()


# -- processes -------------------------------------------------------------------------------------------------------


def encode(config: EncodeConfig, workers: int = 1, progress: Progress = print) -> dict[str, Info] | None:
    """Encode this process's share of the shards, with `workers` processes. Under torchrun or srun each rank has a share.

    Returns:
        Info by folder; None if other processes are still writing, or if OUT was complete already.

    Raises:
        BadInput: source, pipeline or OUT cannot be used, or a worker was killed.
    """
    encoder, folder = _begin(config)
    if folder.complete:
        progress(f"{config.out}: complete already.")
        return None
    jobs = folder.plan.jobs
    rank, world = launcher.launcher_rank()
    share = [n for n, job in enumerate(jobs) if n % world == rank and not folder.done(job)]
    progress(f"{config.out}: {len(jobs) - folder.missing()} of {len(jobs)} shards exist.")
    workers = min(workers, len(share))
    if workers > 1:
        _run_workers(config, share, workers, progress)
    else:
        _write_shards(share, launcher.local_rank(), encoder, folder, progress)
    return folder.finish(_info(encoder, folder.plan))


def _begin(config: EncodeConfig) -> tuple[Encoder, ResumableFolder]:
    """The encoder, and the folder with the plan that all processes share."""
    if not config.src.exists():
        raise BadInput(
            f"{config.src} does not exist: give the folder of the data, or the file of the prompts.{near_path(config.src)}"
        )
    encoder = Encoder(config, "cpu")
    _check_pipeline(encoder)
    geometry, source = encoder.geometry, config.source
    size = geometry.size(source.size)
    source.multiple = geometry.multiple
    source.size = size if source.size or source.buckets or not config.prompts else None
    if source.buckets and (size is None or len(geometry.shape) != 3):
        raise BadInput(f"--buckets sorts images, and {config.pipeline} makes no images: leave it out.")
    config.state = config.state or state(config.src)
    settings = {
        "source": str(config.src.resolve()),
        STATE: config.state,
        **encoder.fingerprints,
        **asdict(source),
        "dtype": config.dtype,
        "precision": config.precision,
        "length": config.length,
    }
    folder = ResumableFolder(config.out, settings)
    if not folder.complete and folder.plan is None:
        folder.begin(_plan(encoder))
    return encoder, folder


def _check_pipeline(encoder: Encoder) -> None:
    """Refuse a pipeline that cannot encode the source."""
    config = encoder.config
    if not config.prompts and "vae" not in encoder.fingerprints:
        raise BadInput(
            f"{config.pipeline} has no autoencoder (vae), so nothing is encoded by it: give the folder of a latent "
            "model, or train on pixels (`distill data images`)."
        )
    if config.prompts and not encoder.geometry.text:
        raise BadInput(
            f"{config.pipeline}: its network takes no text, so it cannot use prompts; give another pipeline."
        )
    if config.prompts and encoder.geometry.frame_conditions:
        raise BadInput(
            f"{config.pipeline} needs a first frame besides the prompt: give a folder of videos with captions to "
            "`distill data encode`, which stores both."
        )


def _plan(encoder: Encoder) -> Plan:
    config = encoder.config
    if config.prompts:
        return plan_prompts(text.prompts(config.src), config.source)
    plan = plan_folder(config.src, config.source)
    if encoder.geometry.text and not plan.captions:
        raise BadInput(
            f"{config.src} has no captions, which {config.pipeline} needs: write a .txt beside each file, or give "
            "--caption 'a photo of {class}', or '' for the null condition."
        )
    return plan


def _run_workers(config: EncodeConfig, share: list[int], workers: int, progress: Progress) -> None:
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), plugins.import_allowed, (plugins.imported,)) as pool:
            futures = [pool.submit(_work, config, share[w::workers], w, workers) for w in range(workers)]
            for future in futures:
                future.result()
    except BrokenProcessPool:
        raise BadInput(
            "a worker was killed, perhaps because memory was full; give the same command again with fewer --workers: "
            f"the complete shards of {config.out} are kept."
        ) from None
    progress(f"{config.out}: {len(share)} shards written by {workers} processes.")


def _work(config: EncodeConfig, share: list[int], worker: int, workers: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    encoder, folder = _begin(config)
    _write_shards(share, launcher.local_rank() * workers + worker, encoder, folder, lambda line: None)


def _write_shards(share: list[int], number: int, encoder: Encoder, folder: ResumableFolder, progress: Progress) -> None:
    """Write the shards of the jobs in `share`, on GPU `number` modulo their count."""
    if torch.cuda.is_available():
        encoder.device = f"cuda:{number % torch.cuda.device_count()}"
    if share and encoder.null is not None:
        stored = {name: encoder.stored(value, name, "of the null condition") for name, value in encoder.null.items()}
        folder.save_null({name: torch.from_numpy(value) for name, value in stored.items()})
    for n in share:
        job = folder.plan.jobs[n]
        record = folder.write(job, _encoded(job, encoder, folder.plan.names))
        skipped = f", {len(record.skipped)} skipped" if record.skipped else ""
        progress(f"{job.folder}/{shard_name(job.number)}: {record.count} samples{skipped}")


def _encoded(job: ShardJob, encoder: Encoder, names: list[str]) -> Iterator[Sample | Skipped]:
    config = encoder.config
    items = read_items(job, names, config.source)
    while batch := list(islice(items, config.batch)):
        error = next((item.error for item in batch if item.error), None)
        if error and not config.skip_bad:
            raise BadInput(f"{error}: repair or remove it, or give --skip-bad.")
        yield from encoder.encode(batch)


def _info(encoder: Encoder, plan: Plan) -> Info:
    """What the index states besides what is measured."""
    config, geometry = encoder.config, encoder.geometry
    size = config.source.size
    made_by = {
        **encoder.fingerprints,
        "pipeline": config.pipeline,
        "size": "" if size is None else f"{'buckets of ' if config.source.buckets else ''}{size[0]}x{size[1]}",
        "framed": " ".join(geometry.frame_conditions),
    }
    return Info(
        _latent_shape(encoder),
        0 if geometry.text else plan.classes,
        names=() if geometry.text else tuple(plan.names),
        captions=plan.captions,
        dtype="float32",
        source=f"{config.src.resolve().name}, encoded",
        encoder=made_by,
    )


def _latent_shape(encoder: Encoder) -> tuple[int, ...]:
    """Shape of the latents that the network will generate from prompts; that of samples is measured."""
    shape, size, frames = encoder.geometry.shape, encoder.config.source.size, encoder.config.source.frames
    if size is None:
        return shape
    if len(shape) == 3:
        return encoder.geometry.latents((3, *size))
    if frames:
        return encoder.geometry.latents((3, frames, *size))
    return *shape[:2], *encoder.geometry.latents((3, *size))[1:]

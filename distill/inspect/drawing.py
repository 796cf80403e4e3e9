"""Draws samples of a run's student in batches, on a device and in a dtype, and writes them as images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distill.data.sources.image import to_uint8
from distill.denoise import Conditions, network_of
from distill.errors import BadInput, suggest
from distill.files import atomic_folder, write_text
from distill.metrics import pictures
from distill.metrics.rewards import decoder
from distill.models.diffusers.network import StockNetwork
from distill.training.experiment import Experiment

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_COUNT = 100
PIXEL_CHANNELS = (1, 3)  # of samples that are images themselves; others are latents, which their pipeline decodes


def choose_device(device: str | None) -> str:
    """The device of this name; without a name an accelerator if there is one, else "cpu".

    Raises:
        BadInput: torch has no such device, or this machine has none.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either where the device is absent
        reason = str(error).splitlines()[0].rstrip(".")
        raise BadInput(f"--device {device} cannot be used ({reason}); give cpu, cuda or cuda:N.") from error
    return device


@dataclass
class SampleRequest:
    """Which samples to draw, and how.

    Args:
        count: how many; by default one per prompt, or 100.
        seed: of the noise.
        prompts: of a student conditioned on text, repeated in turn; by default the conditions of the data's first rows.
        labels: of a class-conditional student, repeated in turn; by default all classes in turn.
        batch: samples of one call; by default the run's `data.batch_size` under conditions that are tensors, else 1000.

    Raises:
        BadInput: both prompts and labels.
    """

    count: int | None = None
    seed: int = 0
    prompts: Sequence[str] = ()
    labels: Sequence[int] = ()
    batch: int | None = None
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        if self.prompts and self.labels:
            raise BadInput("Give prompts or labels, not both: no student takes the two.")
        if self.batch is not None and self.batch < 1:
            raise BadInput(f"batch size {self.batch} must be at least 1.")
        self.rows = self.count or len(self.prompts) or DEFAULT_COUNT


def move_student(experiment: Experiment, device: str, dtype: str) -> None:
    """Move the averaged student of `experiment` to `device`, with its weights in `dtype`.

    Raises:
        BadInput: for another dtype.
    """
    if dtype not in DTYPES:
        raise BadInput(f"dtype '{dtype}' must be one of {', '.join(DTYPES)}.{suggest(dtype, DTYPES)}")
    wanted, ema = getattr(torch, dtype), experiment.method.ema
    base = network_of(ema).base
    if isinstance(base, StockNetwork):
        base.cast(wanted)
        base.to(device)
    if network_of(ema) is not base or not isinstance(base, StockNetwork):
        ema.to(wanted)
    experiment.method.to(device)


def draw(
    experiment: Experiment, request: SampleRequest, device: str = "cpu", dtype: str = "float32"
) -> Iterator[Tensor]:
    """Samples x (B, ...) on `device`, batch by batch, in the student's own number of steps.

    The noise of all samples is drawn at once on the CPU, so a sample of a deterministic student depends on the seed, its
    index and the number of samples, and not on the batch size.

    Raises:
        BadInput: prompts or labels that this student does not take.
    """
    method, n = experiment.method, request.rows
    z = torch.randn(n, *method.shape, generator=torch.Generator().manual_seed(request.seed))
    conditions = _conditions(experiment, request, device, dtype)
    generator = torch.Generator(device).manual_seed(request.seed)
    size = request.batch or experiment.batch_rows
    for start in range(0, n, size):
        rows = torch.arange(start, min(start + size, n))
        cond = {name: value.to(device) for name, value in conditions(rows).items()}
        yield method.sample(z[rows].to(device), cond, generator=generator).float()


def _conditions(
    experiment: Experiment, request: SampleRequest, device: str, dtype: str
) -> Callable[[Tensor], Conditions]:
    """The conditions of samples by their indices."""
    net, folder = network_of(experiment.method.student), experiment.cfg.name
    if request.labels:
        if not net.classes:
            raise BadInput(f"{folder}: its student takes no class labels; leave out the labels.")
        least = -1 if net.null_class else 0
        for label in request.labels:
            if not least <= label < net.classes:
                raise BadInput(f"label {label} must be from {least} to {net.classes - 1}.")
        labels = torch.tensor(list(request.labels))
        return lambda rows: {"label": labels[rows % len(labels)]}
    if not request.prompts:
        cond = experiment.noise(request.rows, request.seed)[1]
        return lambda rows: {name: value[rows] for name, value in cond.items()}
    if "text" not in net.conditions or net.source is None:
        mend = "give labels" if net.classes else "leave out the prompts"
        raise BadInput(f"{folder}: its student is not conditioned on text; {mend}.")
    from distill.models.diffusers import Prompts

    encode = Prompts(net.source[0], net.source[1], dtype=dtype, device=device)
    first = encode([request.prompts[0]])
    others: Conditions = {}
    if set(net.conditions) - first.keys():  # such as the first frame of image to video
        others = experiment.noise(request.rows, request.seed)[1]

    def encoded(rows: Tensor) -> Conditions:
        own_prompts = [request.prompts[i % len(request.prompts)] for i in rows.tolist()]
        own = {name: value[rows] for name, value in others.items() if name not in first}
        return own | encode(own_prompts)

    return encoded


def pixels_of(experiment: Experiment, device: str) -> Callable[[Tensor], Tensor]:
    """A function from samples to pixels (B, 1 or 3, H, W) or (B, 3, F, H, W) in [-1, 1], on the CPU.

    Raises:
        BadInput: the samples are no images and nothing decodes them to images.
    """
    method, name = experiment.method, experiment.cfg.name
    net, decode = network_of(method.student), experiment.cfg.eval.decode
    if len(method.shape) < 3:
        kind = "sound" if len(method.shape) == 2 else "points"
        raise BadInput(
            f"{name}: its samples are {kind}, not images; use their tensor from `distill.open_run(...).sample`."
        )
    path = decode or (str(net.source[0]) if net.source and (Path(net.folder) / "vae").is_dir() else None)
    if path is None and method.shape[0] not in PIXEL_CHANNELS:
        raise BadInput(
            f"{name}: its samples are latents, and nothing decodes them; name their pipeline by eval.decode."
        )
    to_pixels = decoder(path, device)

    def pixels(x: Tensor) -> Tensor:  # one at a time: a decoder takes much more memory than the network
        rows = [to_pixels(row) for row in x.split(1)] if path else [x]
        return torch.cat([row.cpu().float() for row in rows]).clamp(-1, 1)

    return pixels


def write_folder(experiment: Experiment, request: SampleRequest, out: Path, device: str, dtype: str) -> Path:
    """Write each sample as a PNG named by its index, seed and label, and its prompt beside it as .txt; of video a folder
    of frames. All of it, or nothing.

    Raises:
        BadInput: `out` exists, or the samples are no images.
    """
    to_pixels, index = pixels_of(experiment, device), 0
    classes = network_of(experiment.method.student).classes
    with atomic_folder(out) as staging:
        for x in draw(experiment, request, device, dtype):
            for image in to_pixels(x):
                label = _label(request, index, classes)
                name = f"{index:05d}-seed{request.seed}" + ("" if label is None else f"-label{label}")
                if image.ndim == 4:
                    (staging / name).mkdir()
                for k, frame in enumerate(image.transpose(0, 1) if image.ndim == 4 else [image]):
                    _image(frame).save(staging / (f"{name}/{k:04d}.png" if image.ndim == 4 else f"{name}.png"))
                if request.prompts:
                    write_text(staging / f"{name}.txt", request.prompts[index % len(request.prompts)] + "\n")
                index += 1
    return out


def write_picture(experiment: Experiment, request: SampleRequest, out: Path, device: str, dtype: str) -> Path:
    """Write one picture of all samples: points as a plot, images in a grid, of video the middle frame."""
    title = f"{experiment.method.grid.steps} evaluations"
    if len(experiment.method.shape) == 1:
        x = torch.cat([x.cpu() for x in draw(experiment, request, device, dtype)])
        experiment.suite().picture({title: x}, out)
        return out
    to_pixels = pixels_of(experiment, device)
    images = torch.cat([to_pixels(x) for x in draw(experiment, request, device, dtype)])
    images = images[:, :, images.shape[2] // 2] if images.ndim == 5 else images
    pictures.side_by_side({title: images}, out, columns=min(10, math.ceil(math.sqrt(len(images)))))
    return out


def _label(request: SampleRequest, index: int, classes: int) -> int | None:
    if request.labels:
        return request.labels[index % len(request.labels)]
    return index % classes if classes else None


def _image(x: Tensor) -> Image.Image:
    """A PIL image of pixels (1 or 3, H, W) in [-1, 1]."""
    values = to_uint8(x)
    return Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0))

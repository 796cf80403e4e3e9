r"""Linear interpolation of two students' effective weights, W = (1 - share) W_a + share W_b: exports or LoRA files.

An adapter changes its base by W - W_0 = B A, so products are interpolated. Interpolated factors would add
share (1 - share) (B_a A_b + B_b A_a - B_a A_a - B_b A_b). Concatenated factors are exact, of rank r_a + r_b:

    A = [sqrt(1 - share) A_a; sqrt(share) A_b],    B = [sqrt(1 - share) B_a, sqrt(share) B_b]
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.export.licence import UNKNOWN
from distill.export.write import export
from distill.files import atomic_write, read_json
from distill.models.lora import LoRAAdapter, SharedBase
from distill.noise import RectifiedFlow, Table
from distill.times import Grid

Pairs = dict[str, tuple[Tensor, Tensor]]  # layer -> (A, B), the change of its weight being B A
ENDINGS = ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight"))
KOHYA = 1  # of ENDINGS: the layout whose files state an alpha


def concatenate(a: Pairs, b: Pairs, share: float) -> Pairs:
    """The factors of (1 - share) B_a A_a + share B_b A_b; a layer that one adapter lacks counts as zero there."""
    mixture = {}
    for name in [*a, *(n for n in b if n not in a)]:
        parts = [(pairs[name], math.sqrt(w)) for pairs, w in ((a, 1 - share), (b, share)) if name in pairs]
        if len({(down.shape[1:], up.shape[:1]) for (down, up), _ in parts}) > 1:
            raise BadInput(f"The layer {name} has different sizes in the two LoRAs: merge LoRAs of one base.")
        mixture[name] = (
            torch.cat([w * down for (down, _), w in parts]),
            torch.cat([w * up for (_, up), w in parts], 1),
        )
    return mixture


def merge_adapters(into: LoRAAdapter, other: LoRAAdapter, share: float) -> None:
    """Set `into` to the interpolation of itself and another adapter of the same base.

    Raises:
        BadInput: for adapters of different bases, or on different layers.
    """
    ours, theirs = into.shared, other.shared
    weights = ours.net.state_dict(), theirs.net.state_dict()
    if (
        ours.targets != theirs.targets
        or weights[0].keys() != weights[1].keys()
        or not all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    ):
        raise BadInput(
            "The two adapters have different bases or layers: merge students of one teacher with the same targets."
        )
    factor = theirs.scale / ours.scale
    pairs = concatenate(
        {n: (d, u) for n, d, u in zip(ours.targets, into.down, into.up)},
        {n: (d, factor * u) for n, d, u in zip(theirs.targets, other.down, other.up)},
        share,
    )
    set_factors(into, pairs)


def set_factors(adapter: LoRAAdapter, pairs: Pairs) -> None:
    """Replace an adapter's factors; the new ones may have another rank."""
    for i, name in enumerate(adapter.shared.targets):
        adapter.down[i], adapter.up[i] = (nn.Parameter(w.detach().clone(), requires_grad=False) for w in pairs[name])


def read(file: Path) -> tuple[Pairs, int]:
    """The factors of a LoRA file with alpha / rank multiplied into B, and the index of its key layout in `ENDINGS`.

    Raises:
        BadInput: the file cannot be read, or holds tensors that are not LoRA factors.
    """
    from safetensors.torch import load_file

    try:
        weights = load_file(file)
    except Exception as error:  # safetensors' own, and the file system's
        raise BadInput(f"{file} cannot be read as safetensors: {error}") from error
    layout = next((i for i, (down, _) in enumerate(ENDINGS) if any(k.endswith(down) for k in weights)), None)
    if layout is None:
        raise BadInput(f"{file} holds no LoRA: no key ends in {ENDINGS[0][0]} or {ENDINGS[1][0]}.")
    pairs, (first, second) = {}, ENDINGS[layout]
    for name in [k.removesuffix(first) for k in weights if k.endswith(first)]:
        down, up = weights.pop(name + first).float(), weights.pop(name + second).float()
        alpha = weights.pop(f"{name}.alpha", None)
        pairs[name] = (down, up if alpha is None else up * (float(alpha) / len(down)))
    if weights:
        raise BadInput(f"{file}: {next(iter(weights))} is not a LoRA factor; merge files that hold nothing else.")
    return pairs, layout


def merge_files(a: Path, b: Path, out: Path, share: float) -> Path:
    """Merge two LoRA files of one key layout into a third.

    All layers get one rank, filled up with zeros, and alpha is that rank: stock `load_lora_weights` refuses `.alpha`
    beside `lora_A`, and reads one alpha for all layers of the other layout.

    Raises:
        BadInput: the files have different layouts, or layers of different sizes.
    """
    from safetensors.torch import save

    (ours, layout), (theirs, second_layout) = read(a), read(b)
    if layout != second_layout:
        raise BadInput(f"{a} and {b} name their layers in different layouts: use both from the same tool.")
    pairs = concatenate(ours, theirs, share)
    rank = max(len(down) for down, _ in pairs.values())
    weights = {}
    for name, (down, up) in pairs.items():
        missing = rank - len(down)
        weights[name + ENDINGS[layout][0]] = nn.functional.pad(
            down, (0, 0) * (down.ndim - 1) + (0, missing)
        ).contiguous()
        weights[name + ENDINGS[layout][1]] = nn.functional.pad(up, (0, 0) * (up.ndim - 2) + (0, missing)).contiguous()
        if layout == KOHYA:
            weights[f"{name}.alpha"] = torch.tensor(float(rank))
    with atomic_write(out, "wb") as file:
        file.write(save(weights, metadata={"format": "pt"}))
    return out


def merge_folders(a: Path, b: Path, out: Path, share: float) -> Path:
    """Merge two exports of one kind, number of steps and base into a third, with reference samples of its own.

    Raises:
        BadInput: the exports differ in more than their weights, or are ONNX graphs.
    """
    records = [read_json(folder / "distill.json") for folder in (a, b)]
    for key in ("kind", "network", "times", "sampler", "prediction", "shift", "part"):
        first, second = (record.get(key) for record in records)
        if first != second:
            raise BadInput(f"{a} has {key} {first} and {b} {second}: merge exports that differ in weights only.")
    record = records[0]
    kinds = {"pipeline": _pipelines, "lora": _loras}
    if record.get("kind", "pipeline") not in kinds:
        raise BadInput(f"Exports as {record['kind']} cannot be merged: merge the runs, their pipelines or their LoRAs.")
    student = kinds[record.get("kind", "pipeline")](a, b, record, share)
    about = {"merged": [a.name, b.name], "share": share, "recipes": [r.get("recipe_hash") for r in records]}
    return export(
        student,
        Grid.of(record["times"]),
        record["sampler"],
        out,
        kind=record.get("kind", "pipeline"),
        method=record["method"],
        recipe=about,
        w=record["guidance"],
        dtype=record.get("dtype", "float32"),
        licence=None if record["licence"] == UNKNOWN else record["licence"],
    )


def _pipelines(a: Path, b: Path, record: dict, share: float) -> Denoiser:
    ours, theirs = _load(a, record), _load(b, record)
    weights, others = ours.state_dict(), theirs.state_dict()
    if weights.keys() != others.keys() or any(weights[k].shape != others[k].shape for k in weights):
        raise BadInput(f"{a} and {b} have different networks: merge students of one teacher.")
    ours.load_state_dict(
        {k: torch.lerp(w, others[k], share) if w.is_floating_point() else w for k, w in weights.items()}
    )
    return ours


def _loras(a: Path, b: Path, record: dict, share: float) -> Denoiser:
    from distill.export.lora import PEFT

    file, student = record["files"][0], _load(record["base"], record)
    pairs = concatenate(read(a / file)[0], read(b / file)[0], share)
    if file == PEFT:
        pairs = {f"{record['part']}.{name.removeprefix('base_model.model.')}": pair for name, pair in pairs.items()}
    student.net = LoRAAdapter(SharedBase(student.net, rank=len(next(iter(pairs.values()))[0]), targets=list(pairs)))
    set_factors(student.net, pairs)
    return student


def _load(path: str | Path, record: dict) -> Denoiser:
    """A folder's Denoiser, with the time shift that its student was trained with."""
    from distill.models.diffusers import load

    conditions = "latent" in record
    student: Any = load(path, **{"size": tuple(record["latent"]["shape"][1:]), "null": None} if conditions else {})
    if not isinstance(student.schedule, Table):
        student.schedule = student.net.schedule = RectifiedFlow(record["shift"])
    return student

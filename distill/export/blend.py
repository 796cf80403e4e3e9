r"""Two students mixed as they act, W = (1 - share) W_a + share W_b: exports of one kind, or LoRA files of one base.

Of adapters W - W_0 = B A is what acts, so products are mixed and not factors, whose mix would add
share (1 - share) (B_a A_b + B_b A_a - B_a A_a - B_b A_b). Both stand side by side, exactly and of rank r_a + r_b:

    A = [sqrt(1 - share) A_a; sqrt(share) A_b],    B = [sqrt(1 - share) B_a, sqrt(share) B_b]
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.export.ship import export
from distill.grid import Grid
from distill.nets.diffusers.schedulers import read_json
from distill.nets.lora import Adapter, Shared
from distill.noise import RectifiedFlow, Table

Pairs = dict[str, tuple[Tensor, Tensor]]  # layer -> (A, B), the change of its weight being B A
ENDINGS = ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight"))


def beside(a: Pairs, b: Pairs, share: float) -> Pairs:
    """The factors of (1 - share) B_a A_a + share B_b A_b; a layer that one of them lacks is unchanged there."""
    found = {}
    for name in [*a, *(n for n in b if n not in a)]:
        parts = [(pairs[name], math.sqrt(w)) for pairs, w in ((a, 1 - share), (b, share)) if name in pairs]
        if len({(down.shape[1:], up.shape[:1]) for (down, up), _ in parts}) > 1:
            raise BadInput(f"The layer {name} has other sizes in the two: merge LoRAs of one base.")
        found[name] = (torch.cat([w * down for (down, _), w in parts]), torch.cat([w * up for (_, up), w in parts], 1))
    return found


def join(into: Adapter, other: Adapter, share: float) -> None:
    """Make `into` the mixture of itself and another adapter of the same base.

    Raises:
        BadInput: for adapters of different bases, or on different layers.
    """
    ours, theirs = into.shared, other.shared
    weights = ours.net.state_dict(), theirs.net.state_dict()
    if ours.targets != theirs.targets or weights[0].keys() != weights[1].keys() or not all(
            torch.equal(weights[0][k], weights[1][k]) for k in weights[0]):
        raise BadInput("The adapters stand on other bases or other layers: merge two students of one teacher and targets.")
    factor = theirs.scale / ours.scale
    pairs = beside({n: (d, u) for n, d, u in zip(ours.targets, into.down, into.up)},
                   {n: (d, factor * u) for n, d, u in zip(theirs.targets, other.down, other.up)}, share)
    put(into, pairs)


def put(adapter: Adapter, pairs: Pairs) -> None:
    """Give an adapter these factors, of whatever rank."""
    for i, name in enumerate(adapter.shared.targets):
        adapter.down[i], adapter.up[i] = (nn.Parameter(w.detach().clone(), requires_grad=False) for w in pairs[name])


def read(file: Path) -> tuple[Pairs, int]:
    """The factors of a LoRA file, alpha / rank inside B, and which of the two layouts of keys it has.

    Raises:
        BadInput: if it cannot be read, or holds other things than LoRA factors.
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
        raise BadInput(f"{file}: {next(iter(weights))} is no factor of a LoRA, and cannot be mixed.")
    return pairs, layout


def files(a: Path, b: Path, out: Path, share: float) -> Path:
    """Two LoRA files of one layout into a third, whose alpha is its rank."""
    from safetensors.torch import save_file

    (ours, layout), (theirs, other) = read(a), read(b)
    if layout != other:
        raise BadInput(f"{a} and {b} name their layers in different layouts: take both from the same tool.")
    first, second = ENDINGS[layout]
    weights = {}
    for name, (down, up) in beside(ours, theirs, share).items():
        weights |= {name + first: down.contiguous(), name + second: up.contiguous(),
                    f"{name}.alpha": torch.tensor(float(len(down)))}
    staging = out.with_name(f".{out.name}.partial-{os.getpid()}")
    save_file(weights, staging, metadata={"format": "pt"})
    staging.rename(out)
    return out


def folders(a: Path, b: Path, out: Path, share: float) -> Path:
    """Two exports of one kind, steps and base into a third, with references of its own.

    Raises:
        BadInput: for exports that differ in more than their weights, and for onnx.
    """
    records = [read_json(folder / "distill.json") for folder in (a, b)]
    for key in ("kind", "network", "times", "sampler", "prediction", "shift", "part"):
        here, there = (record.get(key) for record in records)
        if here != there:
            raise BadInput(f"{a} has {key} {here}, {b} {there}: merge two students that are served alike.")
    record = records[0]
    kinds = {"pipeline": _pipelines, "lora": _loras}
    if record.get("kind", "pipeline") not in kinds:
        raise BadInput(f"Exports as {record['kind']} cannot be merged: merge the runs, or their pipelines or LoRAs.")
    student = kinds[record.get("kind", "pipeline")](a, b, record, share)
    about = {"merged": [a.name, b.name], "share": share, "recipes": [r.get("recipe_hash") for r in records]}
    return export(student, Grid.of(record["times"]), record["sampler"], out, kind=record.get("kind", "pipeline"),
                  method=record["method"], recipe=about, w=record["guidance"], licence=record["licence"])


def _pipelines(a: Path, b: Path, record: dict, share: float) -> Denoiser:
    ours, theirs = _load(a, record), _load(b, record)
    weights, others = ours.state_dict(), theirs.state_dict()
    if weights.keys() != others.keys() or any(weights[k].shape != others[k].shape for k in weights):
        raise BadInput(f"{a} and {b} have other networks: merge two students of one teacher.")
    ours.load_state_dict({k: torch.lerp(w, others[k], share) if w.is_floating_point() else w for k, w in weights.items()})
    return ours


def _loras(a: Path, b: Path, record: dict, share: float) -> Denoiser:
    from distill.export.lora import PEFT

    file, student = record["files"][0], _load(record["base"], record)
    pairs = beside(read(a / file)[0], read(b / file)[0], share)
    if file == PEFT:
        pairs = {f"{record['part']}.{name.removeprefix('base_model.model.')}": pair for name, pair in pairs.items()}
    student.net = Adapter(Shared(student.net, rank=len(next(iter(pairs.values()))[0]), targets=list(pairs)))
    put(student.net, pairs)
    return student


def _load(path: str | Path, record: dict) -> Denoiser:
    """A folder's Denoiser under the shift that its student was trained with."""
    from distill.nets.diffusers import load

    told = "latent" in record
    student: Any = load(path, **{"size": tuple(record["latent"]["shape"][1:]), "null": None} if told else {})
    if not isinstance(student.schedule, Table):
        student.schedule = student.net.schedule = RectifiedFlow(record["shift"])
    return student

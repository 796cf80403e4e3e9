"""Checks that data and networks fit: shapes, classes, conditions, and the encoders that made the shards."""

from __future__ import annotations

import math
from typing import Any

from distill.denoise import network_of
from distill.errors import BadInput

AREA = 1.5  # largest ratio of a bucket's area to that of the network's size


def check_compatible(method: Any, data: Any) -> None:
    """Refuse data that a network of the method cannot take.

    Raises:
        BadInput: no samples for a method that needs them; another shape, number of classes or other conditions than a
            network takes; latents or text embeddings by another autoencoder or text encoder than the teacher's folder has.
    """
    info, where = data.info, f"data ({data.info.path or data.info.source})"
    if method.needs_data and not data.samples:
        raise BadInput(
            f"{where} holds no samples, and {type(method).__name__} trains on them: use a source with data, "
            "for example distill.data.shards.Shards."
        )
    folders = {}
    for role in (*method.trainable, *method.frozen):
        net = network_of(getattr(method, role))
        classes = net.classes
        _shape(where, role, net, data)
        if info.classes and classes not in (0, info.classes):
            raise BadInput(
                f"{where} holds {info.classes} classes, the network of {role} expects {classes}; "
                "set the network's classes to match."
            )
        if net.conditions:
            _check_conditions(where, role, net, info)
        if net.folder:
            folders[str(net.folder)] = role
    if info.encoder:
        for folder, role in folders.items():
            _encoders(where, role, folder, info.encoder)


def _shape(where: str, role: str, net: Any, data: Any) -> None:
    shape, found = tuple(net.shape or data.info.shape), tuple(data.info.shape)
    if data.shapes:  # buckets: of about the network's area
        for found in data.shapes:
            area = math.prod(found[1:]) / math.prod(shape[1:])
            if len(found) != len(shape) or found[0] != shape[0] or not 1 / AREA < area < AREA:
                break
        else:
            return
    if shape == found:
        return
    size = net.folder and net.conditions and len(shape) == len(found) and shape[0] == found[0]
    mend = (
        f"set roles.{role}.size to {list(found[1:])}, or encode the data at that size by `distill data encode --size`"
        if size
        else f"change roles.{role}.net or the data"
    )
    raise BadInput(f"{where} holds samples of shape {found}, the network of {role} expects {shape}; {mend}.")


def _check_conditions(where: str, role: str, net: Any, info: Any) -> None:
    """Check conditions by name: the data has all required ones, and none that the network does not take."""
    has = [*info.members, *(["label"] if info.classes else [])]
    lack = next((k for k in net.conditions if k not in has), None)
    if lack:
        raise BadInput(
            f"{where} has no '{lack}', a condition that the network of {role} needs: make shards with it by `distill "
            "data encode`, or `distill data prompts` for a method without data."
        )
    extra = next((k for k in has if k not in (*net.conditions, *net.optional_conditions)), None)
    if extra:
        mend = "leave labels out by data.labels=false" if extra == "label" else "use shards that were encoded for it"
        raise BadInput(
            f"{where} has '{extra}', but the network of {role} takes {', '.join(net.conditions)} only: {mend}."
        )


def _encoders(where: str, role: str, folder: str, stored: dict[str, str]) -> None:
    from distill.models.diffusers import fingerprints

    for part, own in fingerprints(folder).items():
        if stored.get(part, own) != own:
            what = {"vae": "another autoencoder", "text": "other text encoders", "image": "another image encoder"}[part]
            raise BadInput(
                f"{where} was encoded by {what} ({stored[part]}, of {stored.get('pipeline', 'an unnamed pipeline')}) than "
                f"roles.{role} has ({own}, of {folder}): encode it again by `distill data encode --pipeline {folder}`, or "
                "load the role from the pipeline that encoded it."
            )

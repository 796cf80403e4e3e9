"""What a live run holds, tensor by tensor: `python weigh.py FOLDER STRATEGY...` on every rank, or `held` in one process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from distill import config
from distill.methods.placement import tensors
from distill.training.experiment import build_experiment

NET = {
    "_target_": "distill.denoise.Denoiser",
    "prediction": "flow",
    "schedule": {"_target_": "distill.noise.RectifiedFlow"},
    "net": {"_target_": "distill.models.small.Transformer", "size": 8, "channels": 2, "width": 48, "depth": 3},
}
DATA = {
    "_target_": "distill.data.toy.Samples",
    "batch_size": 8,
    "classes": 0,
    "source": {
        "_target_": "distill.denoise.Gaussian",
        "mean": torch.zeros(2, 8, 8).tolist(),
        "std": 1.0,
        "schedule": {"_target_": "distill.noise.RectifiedFlow"},
    },
}
METHODS = {
    "consistency": {"_target_": "distill.methods.Consistency", "grid": 2, "intervals": 8},
    "tdm": {"_target_": "distill.methods.TDM", "grid": 4, "guidance": 2.0},
    "dmd2": {
        "_target_": "distill.methods.DMD2",
        "grid": 2,
        "student_every": 2,
        "adversarial": 0.1,
        "layers": "blocks.1",
    },
}


def recipe(name: str, layout: str = "full", **engine: Any):
    """A run of a transformer of 0.14 M parameters; `adapters` is TDM on one base."""
    layout, name = ("shared_base", "tdm") if name == "adapters" else (layout, name)
    roles = {"teacher": NET, "layout": layout}
    return config.checked(
        OmegaConf.create(
            {
                "name": name,
                "roles": roles,
                "method": METHODS[name],
                "data": DATA,
                "engine": engine,
            }
        )
    )


CASES = (*METHODS, "adapters")


def held(cfg: Any, placement: Any) -> dict[str, dict[str, int]]:
    """Bytes by kind and network, at the end of the last turn's backward pass, once every role has had its turn."""
    torch.manual_seed(0)
    experiment = build_experiment(cfg)
    method, found = experiment.method, {}
    method.placement, method.total_steps = placement, 10
    method.configure_optimizers()
    backward = placement.backward

    def watched(role, *args, **kw):
        backward(role, *args, **kw)
        found["gradients"] = {r: _gradients(placement, r) for r in method.trainable}

    placement.backward = watched
    batches = experiment.data.loader(placement.rank, placement.world, 0)
    for _ in range(4):
        method.train().training_step(next(batches))
    names = (*method.trainable, *method.frozen, *method._averages)
    found["weights"] = {n: count(tensors(getattr(method, n))) for n in names}
    found["moments"] = {r: _moments(placement, r) for r in method.trainable}
    found["masters"] = {r: _masters(placement, r) for r in method.trainable}
    return found


def count(some: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Bytes of their storages, each once."""
    seen, total = set() if seen is None else seen, 0
    for t in some:
        storage = getattr(t, "_local_tensor", t).untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _optimizer(placement: Any, role: str) -> Any:
    return placement.engines[role].optimizer if hasattr(placement, "engines") else None


def _gradients(placement: Any, role: str) -> int:
    seen, total = set(), count((p.grad for p in placement.parameters(role) if p.grad is not None), seen := set())
    if (engine := _optimizer(placement, role)) is not None:
        flat = getattr(engine, "grad_partitions_flat_buffer", None)
        lists = (engine.averaged_gradients or {}).values()
        total += count([flat] if flat is not None else [], seen)
        total += count([t for some in lists if some for t in (some if isinstance(some, list) else [some])], seen)
    return total


def _moments(placement: Any, role: str) -> int:
    engine = _optimizer(placement, role)
    states = (engine.optimizer if engine is not None else placement.optimizers[role]).state.values()
    return count(v for state in states for v in state.values() if isinstance(v, Tensor))


def _masters(placement: Any, role: str) -> int:
    engine = _optimizer(placement, role)
    if engine is None:
        return 0
    seen = {t.untyped_storage().data_ptr() for t in tensors(placement.module(role))}
    flat = getattr(engine, "fp32_partitioned_groups_flat", None)
    return count(engine.single_partition_of_fp32_groups if flat is None else flat, seen)


def main(folder: Path, strategies: list[str]) -> None:
    from distill.training.placement.choose import build_placement

    os.chdir(folder)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found: dict[str, Any] = {}
    for strategy in strategies:
        for name in CASES:
            engine = SimpleNamespace(
                strategy=strategy,
                accumulate=1,
                precision="32",
                deepspeed=None,
                offload_optimizer=False,
                offload_parameters=False,
            )
            torch.set_autocast_cache_enabled(True)
            found.setdefault(strategy, {})[name] = held(recipe(name), build_placement(engine, 2))
        found[strategy]["keeps_casts"] = torch.is_autocast_cache_enabled()
    Path(f"weighed-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])

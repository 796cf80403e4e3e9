"""From the config's `engine` section to a placement, and the lightning strategy that starts its processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy

from distill.errors import BadInput, suggest
from distill.methods.placement import Placement, Replicas
from distill.training.placement.deepspeed import Zero
from distill.training.placement.fsdp import Sharded

STRATEGIES = ("auto", "ddp", "fsdp", "zero1", "zero2", "zero3")


def build_placement(engine: Any, world: int) -> Placement:
    """The placement that the config's `engine` section names.

    Raises:
        BadInput: settings exclude each other.
    """
    kind, scale = engine.strategy, engine.precision == "16"
    if kind not in STRATEGIES:
        raise BadInput(f"engine.strategy: '{kind}' must be one of {', '.join(STRATEGIES)}.{suggest(kind, STRATEGIES)}")
    zero = kind.startswith("zero")
    if engine.deepspeed and not zero:
        raise BadInput(f"engine.deepspeed: strategy {kind} takes no DeepSpeed settings; leave it out, or use zero2.")
    if scale and zero:
        raise BadInput(f"engine.precision: 16 scales losses, which {kind} does not; use bf16, which needs no scaling.")
    if engine.offload_optimizer and not zero:
        raise BadInput("engine.offload_optimizer: only zero1, zero2 and zero3 have it; use one of them.")
    if engine.offload_parameters and kind not in ("zero3", "fsdp"):
        raise BadInput("engine.offload_parameters: only fsdp and zero3 have it; use one of them.")
    if zero:
        settings = _settings(engine.deepspeed, int(kind[-1]))
        return Zero(int(kind[-1]), engine.accumulate, settings, engine.offload_optimizer, engine.offload_parameters)
    if kind == "fsdp":
        return Sharded(engine.accumulate, scale, engine.offload_parameters)
    return (Replicas if world > 1 else Placement)(engine.accumulate, scale)


OURS = {
    "optimizer": "optim.ROLE",
    "scheduler": "optim.ROLE.decay",
    "gradient_clipping": "optim.ROLE.clip",
    "gradient_accumulation_steps": "engine.accumulate",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
}


def _settings(path: str | None, stage: int) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(
            f"engine.deepspeed: {path} cannot be read as JSON ({error}); correct the path or the file."
        ) from None
    for key, instead in OURS.items():
        if key in found:
            raise BadInput(f"engine.deepspeed: {path} sets {key}, which {instead} decides; remove it there.")
    given = found.get("zero_optimization", {}).get("stage", stage)
    if given != stage:
        raise BadInput(f"engine.deepspeed: {path} sets stage {given}; use engine.strategy=zero{given} or change it.")
    return {k: v for k, v in found.items() if v != "auto"}


class Processes(DDPStrategy):
    """Lightning's processes, ranks and devices; the placement averages gradients, so the method is not wrapped."""

    def __init__(self, placement: Replicas, **keywords):
        super().__init__(**keywords)
        self.placement = placement

    def configure_ddp(self) -> None:
        """No wrapper: the placement averages gradients."""

    def model_to_device(self) -> None:
        self.placement.device = self.root_device
        if not self.placement.sharded:  # sharded roles are moved one by one, so that no device holds all of them whole
            super().model_to_device()

    def teardown(self) -> None:
        ParallelStrategy.teardown(self) if not self.placement.sharded else self.cluster_environment.teardown()

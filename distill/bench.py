"""What a training step costs, where the time goes, and what the same networks cost alone.

    ratio = median(step) / median(floor)

The floor of a step is made of that step's own calls, repeated right after it in the same process: each network's
forward on the same inputs in the same grad mode, one backward a turn, one optimiser step a turn. A step costs more by
its noise levels, losses, clipping, averages, loader and log. Where roles are spread over ranks, their collectives
belong to both.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from distill.denoise import has_network
from distill.engine import launch
from distill.engine.trainer import fit
from distill.place import shared_copies
from distill.session import assemble

# Dense TFLOP a second in bf16 and fp16, from the makers' data sheets; what a card's name holds, the first that fits.
PEAKS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "H800": 989, "B200": 2250, "A100": 312, "A800": 312,
    "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A6000": 155, "MI300X": 1307,
    "MI250X": 383, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
PHASES = ("data", "draw", "forward", "backward", "optimiser", "average")


def bench(cfg: DictConfig, steps: int = 30, warm: int = 5, allow: tuple[str, ...] = (),
          peak: float | None = None) -> dict[str, Any]:
    """Train `warm` + 2 `steps` steps, the first `steps` against their floor, the others with a watch on each phase.

    Args:
        peak: TFLOP a second that the device could do; by default what its maker states for bf16 and fp16.

    Returns:
        milliseconds a step (`step`), of its floor (`floor`), their `ratio`, `samples_per_second` of this process,
        `peak_gib` of memory (of the accelerator, or resident in a process on CPUs), `tflop` of a step, `share` of the
        peak, none where that is not known, `resident`, network -> bytes of weights and of optimiser state that this
        process keeps, and `phases`, role -> phase -> milliseconds a step; what belongs to no role is under "all".

    Raises:
        BadInput: several processes are asked for and nothing started them.
    """
    ranks = launch.join(cfg.engine)
    with shared_copies() if cfg.engine.strategy in ("fsdp", "zero3") else nullcontext():  # they are cut to shards at once
        session = assemble(cfg, allow)
    method = session.method
    watch = Watch(method, warm, steps)
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in watch.networks.items()}
    session.data.loader = watch.wrap_loader(session.data.loader)
    fit(method, session.data, warm + 2 * steps, [watch], engine=cfg.engine)
    step, floor = statistics.median(watch.steps), statistics.median(watch.floors)
    phases = {role: {k: 1e3 * v / steps for k, v in row.items()} for role, row in watch.phases.items()}
    accounted = sum(v for row in phases.values() for v in row.values())
    phases["all"]["rest"] = max(1e3 * statistics.mean(watch.watched) - accounted, 0.0)
    peak = peak or known_peak(method.device, cfg.engine.precision)
    return {
        "step": 1e3 * step, "floor": 1e3 * floor, "ratio": step / floor, "phases": phases,
        "samples_per_second": watch.batch / step, "peak_gib": watch.peak(), "tflop": watch.tflop,
        "share": watch.tflop / step / peak if peak else None, "processes": ranks, "parameters": parameters,
        "resident": {name: method.place.resident(name) for name in watch.networks},
    }  # fmt: skip


def known_peak(device: torch.device, precision: str) -> float | None:
    """What the maker of this accelerator states, TFLOP a second; none on CPUs, for unknown ones and in float32."""
    if device.type != "cuda" or precision == "32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for part, peak in PEAKS.items() if part in name), None)


class Watch(lightning.Callback):
    """Times steps, repeats their bare work, then times their phases."""

    def __init__(self, method: Any, warm: int, steps: int):
        self.method, self.warm, self.count = method, warm, steps
        names = (*method.trainable, *method.frozen, *method._averages)
        self.networks = {name: role.net if has_network(role := getattr(method, name)) else role for name in names}
        self.calls: list[tuple[str | None, nn.Module, tuple, dict, bool]] = []
        self.turn: str | None = None
        self.steps, self.floors, self.watched = [], [], []
        self.phases: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.recording, self.timing, self.tflop, self.batch = False, False, 0.0, 0
        self.depth = 0  # an adapter calls its base: one call
        for net in self.networks.values():
            net.register_forward_pre_hook(self._record, with_kwargs=True)
            net.register_forward_hook(self._leave, always_call=True)
        self._wrap()

    # -- the run -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer, method):
        self.done, self.within = 0, trainer.precision_plugin.forward_context
        self.recording = True
        self.began = self.now()

    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        spent, self.done = self.now() - self.began, self.done + 1
        self.batch = len(next(v for v in batch.values() if isinstance(v, Tensor)))
        if self.done <= self.warm + self.count:
            floor = self.floor()
            if self.done > self.warm:
                self.steps.append(spent)
                self.floors.append(floor)
        else:
            self.watched.append(spent)
        if self.done == self.warm:
            with FlopCounterMode(display=False) as counter:
                self.floor()
            self.tflop = counter.get_total_flops() / 1e12
        self.calls.clear()
        self.recording = self.done < self.warm + self.count
        self.timing = not self.recording
        self.began = self.now()

    def floor(self) -> float:
        """Seconds of the last step's bare calls, backwards and optimiser steps."""
        calls, self.recording = list(self.calls), False
        turns = list(dict.fromkeys(role for role, *_ in calls))
        began = self.now()
        for turn in turns:
            if turn is not None:
                self.method._only(turn)
                self.method.place.zero_grad(turn)
            outputs = []
            for role, net, args, kwargs, grad in calls:
                if role == turn:
                    with torch.set_grad_enabled(grad), self.within():
                        out = net(*args, **kwargs)
                    outputs += [out.sum()] if isinstance(out, Tensor) and out.requires_grad else []
            if turn is not None and outputs:
                self.method.place.backward(turn, sum(outputs))
                self.method.place.bare_step(turn)
        return self.now() - began

    def now(self) -> float:
        if self.method.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self) -> float:
        """Most memory so far, GiB."""
        if self.method.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _record(self, net: nn.Module, args: tuple, kwargs: dict) -> None:
        self.depth += 1
        if not self.recording or self.depth > 1 or any(map(_inside_transform, (*args, *kwargs.values()))):
            return
        keep = lambda v: v.detach().requires_grad_(v.requires_grad and v.is_floating_point())  # noqa: E731
        self.calls.append((self.turn, net, tree_map_only(Tensor, keep, args), tree_map_only(Tensor, keep, kwargs),
                           torch.is_grad_enabled()))

    def _leave(self, net: nn.Module, args: tuple, out: Any) -> None:
        self.depth -= 1

    @contextmanager
    def phase(self, role: str, name: str):
        began = self.now() if self.timing else 0.0
        yield
        if self.timing:
            self.phases[role][name] += self.now() - began

    def wrap_loader(self, loader: Any) -> Any:
        """The same batches, with the wait for each under "data"."""
        def timed(*args, **kw):
            batches = iter(loader(*args, **kw))
            while True:
                with self.phase("all", "data"):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

        return timed

    def _wrap(self) -> None:
        """Know whose turn it is, and put a watch on draw, losses, backward, optimiser and averages."""
        method, turns, draw, average = self.method, self.method.turns, self.method.draw, self.method._average

        def watched_turns(step):
            for role, loss in turns(step):
                yield role, self._watched(role, loss)

        def watched_draw(*shared):
            self.turn = None
            with self.phase("all", "draw"):
                return draw(*shared)

        def watched_average(role, stepped):
            with self.phase(role, "average"):
                average(role, stepped)

        method.turns, method.draw, method._average = watched_turns, watched_draw, watched_average

    def _watched(self, role: str, loss: Any) -> Any:
        def call(*shared):
            self.turn = role
            with self.phase(role, "forward"):
                return loss(*shared)

        return call

    def setup(self, trainer, method, stage):
        place = method.place
        backward, step = place.backward, place.step

        def watched_backward(role, *args, **kw):
            with self.phase(role, "backward"):
                return backward(role, *args, **kw)

        def watched_step(role, *args, **kw):
            with self.phase(role, "optimiser"):
                return step(role, *args, **kw)

        place.backward, place.step = watched_backward, watched_step


def _inside_transform(value: Any) -> bool:
    """Whether a tensor belongs to torch.func, where its value cannot be kept."""
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def markdown(name: str, found: dict[str, Any]) -> str:
    """Three tables: the step beside its floor, what is kept of each network, and the phases by role."""
    share = "" if found["share"] is None else f", {found['share']:.1%} of the peak"
    lines = [
        f"| {name} | ms |", "|---|---|",
        f"| step | {found['step']:.2f} |", f"| floor: the same networks alone | {found['floor']:.2f} |",
        f"| **ratio** | **{found['ratio']:.3f}** |", f"| processes | {found['processes']} |",
        f"| samples a second, in each | {found['samples_per_second']:.1f} |", f"| peak memory, GiB | {found['peak_gib']:.2f} |",
        f"| TFLOP a step | {found['tflop']:.4g} |",
        f"| TFLOP a second | {1e3 * found['tflop'] / found['step']:.3g}{share} |", "",
        "| network | parameters, M | resident weights, MiB | optimiser, MiB |", "|---|---|---|---|",
    ]  # fmt: skip
    kept = found["resident"] | {"all": tuple(map(sum, zip(*found["resident"].values())))}
    for role, (weights, state) in kept.items():
        count = found["parameters"].get(role, sum(found["parameters"].values()))
        lines.append(f"| {role} | {count / 1e6:.4g} | {weights / 2**20:.4g} | {state / 2**20:.4g} |")
    lines += ["", f"| ms by role | {' | '.join((*PHASES, 'rest'))} |", "|---" * (len(PHASES) + 2) + "|"]
    for role, row in sorted(found["phases"].items()):
        cells = (f"{row[k]:.2f}" if k in row else "" for k in (*PHASES, "rest"))
        lines.append(f"| {role} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

"""Time of a training step by role and phase, compared with that of the same network calls alone.

    ratio = median(step) / median(floor)

The floor of a step repeats its network calls right after it in the same process: each network's forward pass on the same
inputs in the same grad mode, one backward pass per turn, one optimizer step per turn. The difference is the cost of
noise levels, losses, clipping, averages, data loading and logging. Collectives of sharded roles are in both.
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
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from distill.config import DictConfig
from distill.denoise import has_network
from distill.files import markdown_table
from distill.inspect.plan.cards import card_of_device
from distill.models.copies import share_weights
from distill.training import launch
from distill.training.experiment import build_experiment
from distill.training.trainer import fit

PHASES = ("data", "draw", "forward", "backward", "optimizer", "average")


def bench(
    cfg: DictConfig, steps: int = 30, warm: int = 5, allow: tuple[str, ...] = (), peak: float | None = None
) -> dict[str, Any]:
    """Train `warm` + 2 `steps` steps: the first `steps` are compared with their floor, the others timed by phase.

    Args:
        peak: peak TFLOP/s of the device; by default the maker's number for bf16 and fp16.

    Returns:
        `step` and `floor` in milliseconds, their `ratio`, `samples_per_second` of this process, `peak_gib` of memory (of
        the accelerator, or resident on CPUs), `tflop` per step, `share` of the peak (None if unknown), `resident`,
        network -> bytes of weights and of optimizer state on this process, and `phases`, role -> phase -> milliseconds
        per step; time of no role is under "all".

    Raises:
        BadInput: `engine.devices` is more than one and no launcher started the processes.
    """
    ranks = launch.join_processes(cfg.engine)
    sharded = cfg.engine.strategy in ("fsdp", "zero3")  # copies are cut to shards at once
    with share_weights() if sharded else nullcontext():
        experiment = build_experiment(cfg, allow)
    method = experiment.method
    profiler = StepProfiler(method, warm, steps)
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in profiler.networks.items()}
    experiment.data.loader = profiler.wrap_loader(experiment.data.loader)
    fit(method, experiment.data, warm + 2 * steps, [profiler], engine=cfg.engine)
    step, floor = statistics.median(profiler.steps), statistics.median(profiler.floors)
    phases = {role: {k: 1e3 * v / steps for k, v in row.items()} for role, row in profiler.phases.items()}
    accounted = sum(v for row in phases.values() for v in row.values())
    phases["all"]["rest"] = max(1e3 * statistics.mean(profiler.profiled) - accounted, 0.0)
    peak = peak or known_peak(method.device, cfg.engine.precision)
    return {
        "step": 1e3 * step,
        "floor": 1e3 * floor,
        "ratio": step / floor,
        "phases": phases,
        "samples_per_second": profiler.batch / step,
        "peak_gib": profiler.peak(),
        "tflop": profiler.tflop,
        "share": profiler.tflop / step / peak if peak else None,
        "processes": ranks,
        "parameters": parameters,
        "resident": {name: method.placement.resident(name) for name in profiler.networks},
    }


def known_peak(device: torch.device, precision: str) -> float | None:
    """Peak TFLOP/s of this accelerator according to its maker; None on CPUs, unknown devices and in float32."""
    if device.type != "cuda" or precision == "32":
        return None
    known = card_of_device(torch.cuda.get_device_name(device))
    return known.half / 1e12 if known else None


class StepProfiler(lightning.Callback):
    """Times steps, repeats their network calls alone, then times their phases."""

    def __init__(self, method: Any, warm: int, steps: int):
        self.method, self.warm, self.count = method, warm, steps
        names = (*method.trainable, *method.frozen, *method._averages)
        self.networks = {name: role.net if has_network(role := getattr(method, name)) else role for name in names}
        self.calls: list[tuple[str | None, nn.Module, tuple, dict, bool]] = []
        self.turn: str | None = None
        self.steps, self.floors, self.profiled = [], [], []
        self.phases: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.recording, self.timing, self.tflop, self.batch = False, False, 0.0, 0
        self.depth = 0  # an adapter calls its base: one call
        for net in self.networks.values():
            net.register_forward_pre_hook(self._record, with_kwargs=True)
            net.register_forward_hook(self._leave, always_call=True)
        self._wrap()

    # -- the run -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer, method):
        self._time_placement(method.placement)  # which the trainer may have replaced when it was set up
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
            self.profiled.append(spent)
        if self.done == self.warm:
            with FlopCounterMode(display=False) as counter:
                self.floor()
            self.tflop = counter.get_total_flops() / 1e12
        self.calls.clear()
        self.recording = self.done < self.warm + self.count
        self.timing = not self.recording
        self.began = self.now()

    def floor(self) -> float:
        """Seconds of the last step's forward calls, backward passes and optimizer steps alone."""
        calls, self.recording = list(self.calls), False
        turns = list(dict.fromkeys(role for role, *_ in calls))
        began = self.now()
        for turn in turns:
            if turn is not None:
                self.method._only(turn)
                self.method.placement.zero_grad(turn)
            outputs = []
            for role, net, args, kwargs, grad in calls:
                if role == turn:
                    with torch.set_grad_enabled(grad), self.within():
                        out = net(*args, **kwargs)
                    outputs += [out.sum()] if isinstance(out, Tensor) and out.requires_grad else []
            if turn is not None and outputs:
                self.method.placement.backward(turn, sum(outputs))
                self.method.placement.bare_step(turn)
        return self.now() - began

    def now(self) -> float:
        if self.method.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self) -> float:
        """Peak memory so far, GiB."""
        if self.method.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _record(self, net: nn.Module, args: tuple, kwargs: dict) -> None:
        self.depth += 1
        if not self.recording or self.depth > 1 or any(map(_inside_transform, (*args, *kwargs.values()))):
            return
        args, kwargs = (tree_map_only(Tensor, _detached, values) for values in (args, kwargs))
        self.calls.append((self.turn, net, args, kwargs, torch.is_grad_enabled()))

    def _leave(self, net: nn.Module, args: tuple, out: Any) -> None:
        self.depth -= 1

    @contextmanager
    def phase(self, role: str, name: str):
        began = self.now() if self.timing else 0.0
        yield
        if self.timing:
            self.phases[role][name] += self.now() - began

    def wrap_loader(self, loader: Any) -> Any:
        """The same batches; the time waiting for each counts as "data"."""

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
        """Record whose turn it is, and time draw, losses, backward, optimizer and averages."""
        method, turns, draw, average = self.method, self.method.turns, self.method.draw, self.method._average

        def timed_turns(step):
            for role, loss in turns(step):
                yield role, self._timed(role, loss)

        def timed_draw(*shared):
            self.turn = None
            with self.phase("all", "draw"):
                return draw(*shared)

        def timed_average(role, stepped):
            with self.phase(role, "average"):
                average(role, stepped)

        method.turns, method.draw, method._average = timed_turns, timed_draw, timed_average

    def _timed(self, role: str, loss: Any) -> Any:
        def call(*shared):
            self.turn = role
            with self.phase(role, "forward"):
                return loss(*shared)

        return call

    def _time_placement(self, placement: Any) -> None:
        backward, step = placement.backward, placement.step

        def timed_backward(role, *args, **kw):
            with self.phase(role, "backward"):
                return backward(role, *args, **kw)

        def timed_step(role, *args, **kw):
            with self.phase(role, "optimizer"):
                return step(role, *args, **kw)

        placement.backward, placement.step = timed_backward, timed_step


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad and tensor.is_floating_point())


def _inside_transform(value: Any) -> bool:
    """Whether a tensor is a torch.func wrapper, whose value cannot be stored."""
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def bench_tables(name: str, measured: dict[str, Any]) -> str:
    """Three tables: the step and its floor, bytes per network, and phases by role."""
    share = "" if measured["share"] is None else f", {measured['share']:.1%} of the peak"
    step = [
        ["step", f"{measured['step']:.2f}"],
        ["floor: the same networks alone", f"{measured['floor']:.2f}"],
        ["**ratio**", f"**{measured['ratio']:.3f}**"],
        ["processes", measured["processes"]],
        ["samples per second, in each", f"{measured['samples_per_second']:.1f}"],
        ["peak memory, GiB", f"{measured['peak_gib']:.2f}"],
        ["TFLOP a step", f"{measured['tflop']:.4g}"],
        ["TFLOP per second", f"{1e3 * measured['tflop'] / measured['step']:.3g}{share}"],
    ]
    networks = []
    for role, (weights, state) in (measured["resident"] | {"all": _sums(measured["resident"])}).items():
        count = measured["parameters"].get(role, sum(measured["parameters"].values()))
        networks.append([role, f"{count / 1e6:.4g}", f"{weights / 2**20:.4g}", f"{state / 2**20:.4g}"])
    columns, phases = (*PHASES, "rest"), []
    for role, row in sorted(measured["phases"].items()):
        phases.append([role, *(f"{row[k]:.2f}" if k in row else "" for k in columns)])
    tables = [
        markdown_table([name, "ms"], step),
        markdown_table(["network", "parameters, M", "resident weights, MiB", "optimizer, MiB"], networks),
        markdown_table(["ms by role", *columns], phases),
    ]
    return "\n".join(tables)


def _sums(resident: dict[str, tuple[int, int]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*resident.values())))

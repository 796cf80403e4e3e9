"""`distill plan`: estimates memory per rank, operations, hours and disk space of a run before it starts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distill.errors import BadInput
from distill.inspect.plan.cards import card
from distill.inspect.plan.skeleton import LARGE, experiment_of
from distill.inspect.plan.spread import KINDS, SPREAD, STRATEGIES, Load, StrategySettings, load, networks_of
from distill.inspect.plan.trace import Trace, trace

__all__ = ["Machine", "Layout", "machine_of", "plan"]

GB = 1e9
RESERVE = 0.08  # of the memory, for the context, the libraries' own buffers and what the allocator cannot use
PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """`gpus` accelerators with `memory` bytes and a peak of `flops` operations per second, used to `utilisation`."""

    gpus: int
    memory: float
    flops: float
    utilisation: float = 0.4
    name: str = ""
    assumed: str = ""  # a sentence on what was not given

    @property
    def room(self) -> float:
        return self.memory * (1 - RESERVE)


def machine_of(
    precision: str,
    gpus: int,
    gpu: str | None = None,
    memory: float | None = None,
    flops: float | None = None,
    utilisation: float = 0.4,
) -> Machine:
    """A machine of named cards, or of `memory` GB and `flops` a second; by default of h100."""
    known = card(gpu or "h100")
    peak = known.single if precision == "32" else known.half
    name = gpu or ("h100" if flops is None and memory is None else "")
    missing = [*([] if memory else [f"{known.memory:g} GB"]), *([] if flops else [f"{peak / 1e12:.4g} TFLOP/s"])]
    assumed = "" if gpu or not missing else f"An H100 is assumed ({', '.join(missing)}); name the card by --gpu."
    return Machine(gpus, (memory or known.memory) * GB, flops or peak, utilisation, name, assumed)


@dataclass
class Layout:
    """The cost of one layout of the roles: its networks, and steps traced with and without autocast's cache."""

    name: str
    experiment: Any
    settings: StrategySettings
    brief: bool = False  # traced for memory only

    def __post_init__(self):
        self.networks, self.traces = networks_of(self.experiment.method), {}

    def seen(self, spread: bool = False, twice: bool = False) -> Trace:
        """Steps at the batch size or at twice that; sharded weights are cast again each time (`engine.ranks`)."""
        dtype = PRECISIONS[self.experiment.cfg.engine.precision]
        key = spread and dtype is not None, twice
        if key not in self.traces:
            batch = 2 * self.seen(spread).batch if twice else None
            self.traces[key] = trace(
                self.experiment, batch, dtype, cache=not key[0], brief=self.brief or twice or key[0]
            )
        return self.traces[key]

    def load(self, strategy: str, gpus: int, batch: int | None = None) -> Load:
        spread = strategy in SPREAD
        seen = self.seen(spread)
        if batch not in (None, seen.batch):
            seen = between(seen, self.seen(spread, twice=True), batch)
        return load(self.networks, seen, strategy, gpus, self.settings)

    def fits(self, strategy: str, machine: Machine, batch: int | None = None) -> bool:
        return self.load(strategy, machine.gpus, batch).total <= machine.room

    def largest(self, strategy: str, machine: Machine) -> int:
        """Largest batch per rank that fits, 0 if none does."""
        if not self.fits(strategy, machine, 1):
            return 0
        low, high = 1, 2
        while high < 2**20 and self.fits(strategy, machine, high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(strategy, machine, middle) else (low, middle)
        return low


def between(one: Trace, two: Trace, batch: int) -> Trace:
    """The cost of steps at another batch size, linear through two."""
    share = (batch - one.batch) / (two.batch - one.batch)
    line = lambda a, b: max(round(a + share * (b - a)), 0)
    peaks = {
        role: {where: tuple(map(line, peak, two.peaks[role].get(where, peak))) for where, peak in places.items()}
        for role, places in one.peaks.items()
    }
    flops = one.flops + share * (two.flops - one.flops)
    return replace(one, batch=batch, peaks=peaks, flops=flops)


def plan(cfg: Any, machine: Machine, allow: tuple[str, ...] = (), largest: bool = False) -> dict[str, Any]:
    """The cost of the run that `cfg` describes on `machine`.

    Returns:
        `rows`, one a strategy and layout, the recommended one first: bytes by kind, `total`, `fits`, `batch` (the largest
        that fits, if `largest`); `advice`, a sentence; `notes`; `flops` per rank and step; `hours` of `train.steps`; `disk`;
        `parameters` by network.

    Raises:
        BadInput: the config's, or a network that can neither run on shapes nor be held.
    """
    layouts, notes = _layouts(cfg, allow)
    notes += [machine.assumed] if machine.assumed else []
    main = layouts[0]
    seen = main.seen()
    rows = [
        _row(layout, strategy, machine, largest) for layout in layouts for strategy in strategies(cfg.engine, machine)
    ]
    rows.sort(key=lambda row: not row["fits"])  # stable: least communication first, the config's own layout first
    if machine.gpus > 1:  # with one device, plan for one
        rows.sort(key=lambda row: (not row["fits"], row["strategy"] == "single"))
    steps, warm = cfg.train.steps, min(seen.warm_steps, cfg.train.steps)
    flops = (warm * seen.warm_flops + (steps - warm) * seen.flops) / steps
    return {
        "name": cfg.name,
        "method": cfg.method["_target_"].split(".")[-1],
        "machine": vars(machine),
        "batch": seen.batch,
        "rows": rows,
        "advice": _advice(cfg, machine, rows, layouts, allow),
        "notes": notes,
        "flops": flops,
        "steps": steps,
        "hours": steps * flops / (machine.flops * machine.utilisation) / 3600,
        "disk": _disk(cfg, main, notes),
        "parameters": {x.name: x.numbers for x in main.networks},
    }


def _layouts(cfg: Any, allow: tuple[str, ...]) -> tuple[list[Layout], list[str]]:
    own = cfg.roles.get("layout") or "full"
    main, notes = _layout(cfg, allow)
    found = [main]
    other = (
        _with(cfg, {"roles": {"layout": "shared_base"}}) if own == "full" else _with(cfg, {"roles": {"layout": "full"}})
    )
    if own != "full":
        other.roles.pop("adapter", None)
    try:
        second, _ = _layout(other, allow, brief=True)
    except BadInput as error:
        notes.append(f"No plan for roles.layout={other.roles.layout}: {error}")
        return found, notes
    if sum(x.weights for x in second.networks) != sum(x.weights for x in main.networks):
        found.append(second)
    return found, notes


def _with(cfg: Any, more: dict[str, Any]) -> Any:
    from distill import config

    return config.checked(config.merge(cfg, more))


def _layout(cfg: Any, allow: tuple[str, ...], brief: bool = False) -> tuple[Layout, list[str]]:
    experiment, notes = experiment_of(cfg, allow)
    name, settings = cfg.roles.get("layout") or "full", _settings(cfg)
    found = Layout(name, experiment, settings, brief)
    try:
        found.seen()
    except BadInput as error:
        if error.__cause__ is None or sum(p.nbytes for p in experiment.method.parameters()) > LARGE:
            raise
        notes.append(f"The networks are run as they are, for {error}")
        found = Layout(name, experiment_of(cfg, allow, real=True)[0], settings, brief)
    return found, notes


def _settings(cfg: Any) -> StrategySettings:
    path = cfg.engine.deepspeed
    try:
        return StrategySettings.of(json.loads(Path(path).read_text()) if path else {})
    except (OSError, ValueError) as error:
        raise BadInput(
            f"engine.deepspeed: {path} cannot be read as JSON ({error}); correct the path or the file."
        ) from None


def _row(layout: Layout, strategy: str, machine: Machine, largest: bool) -> dict[str, Any]:
    found = layout.load(strategy, machine.gpus)
    row = {"strategy": strategy, "layout": layout.name} | {k: getattr(found, k) for k in KINDS}
    row |= {"total": found.total, "host": found.host, "moment": found.moment, "fits": found.total <= machine.room}
    return row | ({"batch": layout.largest(strategy, machine)} if largest else {})


# -- text --------------------------------------------------------------------------------------------------------


def unit_of(rows: list[dict]) -> tuple[float, str]:
    """The unit of a plan's sizes, in bytes, and its name."""
    return (GB, "GB") if max(row["total"] for row in rows) >= 10 * GB else (1e6, "MB")


def settings_for(strategy: str, gpus: int) -> str:
    """The overrides that select a strategy."""
    if strategy == "single":
        return "engine.devices=1"
    base, _, offload = strategy.partition("+")
    more = " engine.offload_parameters=true engine.offload_optimizer=true" if offload else ""
    return f"engine.strategy={base} engine.devices={gpus}{more}"


def configured(engine: Any, gpus: int) -> str:
    """The name of the planned strategy that the config's `engine` selects."""
    if engine.strategy == "auto":
        return "ddp" if gpus > 1 else "single"
    return "zero3+offload" if engine.strategy == "zero3" and engine.offload_parameters else engine.strategy


def strategies(engine: Any, machine: Machine) -> tuple[str, ...]:
    """The strategies that differ on this machine: one GPU shards nothing."""
    alone = ("single", "zero3+offload", configured(engine, 1))
    return STRATEGIES if machine.gpus > 1 else tuple(s for s in STRATEGIES if s in alone)


def _advice(cfg: Any, machine: Machine, rows: list[dict], layouts: list[Layout], allow: tuple[str, ...]) -> str:
    own, best = configured(cfg.engine, machine.gpus), rows[0]
    mine = next(r for r in rows if r["strategy"] == own and r["layout"] == layouts[0].name)
    size = f"{machine.gpus} x {machine.memory / GB:g} GB"
    unit, name = unit_of(rows)
    shown = lambda value: f"{value / unit:.1f} {name}"  # noqa: E731
    if mine["fits"]:
        same = best is mine or machine.gpus == 1
        better = "" if same else f"; {best['strategy']} fits too, with less communication" * (_rank(best) < _rank(mine))
        return f"fits: {own} takes {shown(mine['total'])} of {size} per rank{better}."
    conditions = f"does not fit: {own} takes {shown(mine['total'])} per rank"
    if best["fits"]:
        layout = "" if best["layout"] == layouts[0].name else f"roles.layout={best['layout']} "
        words = f"{layout}{settings_for(best['strategy'], machine.gpus)}"
        host = f", and {shown(best['host'])} per rank of the machine's memory" if best["host"] else ""
        return f"{conditions}; use {words} ({shown(best['total'])}{host})."
    return f"{conditions}, and no strategy fits on {size}; use {_way_out(cfg, machine, layouts, allow)}."


def _rank(row: dict) -> int:
    return STRATEGIES.index(row["strategy"])


def _way_out(cfg: Any, machine: Machine, layouts: list[Layout], allow: tuple[str, ...]) -> str:
    """Settings under which a run fits, if no strategy fits it as configured."""
    tried = strategies(cfg.engine, machine)
    for layout in layouts:
        most = {s: layout.largest(s, machine) for s in tried}
        s = max(most, key=lambda s: (most[s], -STRATEGIES.index(s)))
        if most[s]:
            return f"data.batch_size={most[s]} with {_words(layout, layouts, s, machine.gpus)}"
    if not cfg.engine.checkpoint_activations:
        lean, _ = _layout(_with(cfg, {"engine": {"checkpoint_activations": True}}), allow, brief=True)
        fits = next((s for s in tried if lean.fits(s, machine)), None)
        if fits:
            return f"engine.checkpoint_activations=true {settings_for(fits, machine.gpus)}"
    for gpus in (2**i for i in range(1, 13)):
        for layout in layouts if gpus > machine.gpus else ():
            if layout.fits("fsdp", replace(machine, gpus=gpus)):
                return f"{gpus} such GPUs with {_words(layout, layouts, 'fsdp', gpus)}"
    smallest = min(layout.load(s, machine.gpus).total for layout in layouts for s in tried)
    return f"GPUs of more than {math.ceil(smallest / (1 - RESERVE) / GB)} GB"


def _words(layout: Layout, layouts: list[Layout], strategy: str, gpus: int) -> str:
    return ("" if layout is layouts[0] else f"roles.layout={layout.name} ") + settings_for(strategy, gpus)


# -- disk --------------------------------------------------------------------------------------------------------


def _disk(cfg: Any, layout: Layout, notes: list[str]) -> dict[str, float]:
    """Bytes of the kept checkpoints and the one being written, and of the data if it exists."""
    train = cfg.train
    saved = [x for x in layout.networks if x.kind != "frozen"]
    one = sum(x.weights + x.buffers + 4 * sum(x.moments) for x in saved)
    count = (train.keep or math.ceil(train.steps / (train.save_every or train.steps))) + train.keep_best + 1
    path = cfg.data.get("path")
    data = 0
    if isinstance(path, str) and Path(path).expanduser().exists():
        at = Path(path).expanduser()
        data = sum(f.stat().st_size for f in ([at] if at.is_file() else at.rglob("*")) if f.is_file())
    return {"checkpoint": one, "checkpoints": count * one, "count": count, "data": data}

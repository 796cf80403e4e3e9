"""From a config to a run: build, train, sample, evaluate, export. Each function is one verb of the command line."""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from distill import config
from distill.denoise import Guided
from distill.engine import callbacks as see
from distill.engine import checkpoint, code, dashboards, home, launch, lines, sinks
from distill.engine.cost import Cost
from distill.engine.home import CHECKPOINTS, CONFIG, METRICS
from distill.engine.preempt import Signals
from distill.engine.rollback import Rollback
from distill.engine.trainer import fit
from distill.engine.validation import STOPPED, Validation, batched, best, plateau, shown
from distill.engine.watch import Watch
from distill.errors import BadInput
from distill.eval import baselines, table
from distill.eval.ranks import here
from distill.grid import Grid
from distill.place import let_go, shared_copies
from distill.session import Session, assemble
from distill.solvers import DDIM, solve

# -- train -------------------------------------------------------------------------------------------------------


def train(
    cfg: DictConfig, folder: Path, resume: bool = False, allow: tuple[str, ...] = (), look: Any = None
) -> Session:
    """Train into `folder`; an existing run is resumed if asked, refused otherwise. `look(session, folder)` may refuse a
    new one.

    `session.method.step` tells how many steps are done, `session.preempted` whether it wants to be started again.
    Nothing is written before everything is built, and a new run that fails before its first step leaves no folder.
    """
    folder = Path(folder)
    launch.join(cfg.engine)
    see.console.quiet = not home.leads()
    with Signals() as signals:
        state, before = home.enter(folder, resume)
        trial = look and state is None  # it trains a step, so every network needs weights of its own
        with nullcontext() if trial or cfg.engine.strategy not in ("fsdp", "zero3") else shared_copies():
            session = assemble(cfg, allow)
        if resume:
            home.same_recipe(cfg, home.config_of(folder))
        if state and state["step"] >= cfg.train.steps:
            _restore(session, state, folder)
            see.console.print(f"{folder} has its {state['step']} steps already; raise train.steps to go on.")
            return session
        tests = session.suite(folder)
        if trial:
            look(session, folder)
        if state and (why := plateau(sinks.history(folder, state["step"]), best(cfg, tests), cfg.train)):
            _restore(session, state, folder)
            session.stopped = why
            see.console.print(f"{folder} has stopped at step {state['step']}: {why}", highlight=False)
            return session
        with home.written(folder, cfg, session.method) as opened:
            if home.leads():
                _open(opened, cfg, folder, state["step"] if state else -1)
            called = [signals, *_callbacks(session, folder, opened, tests, before)]
            fit(session.method, session.data, cfg.train.steps, called, engine=cfg.engine, resume=state)
    session.preempted, session.stopped = signals.preempted, session.validation.stopped
    return session


def _open(opened: list[Any], cfg: DictConfig, folder: Path, until: int) -> None:
    (folder / STOPPED).unlink(missing_ok=True)
    about, files = code.note(folder, max(until, 0))
    told = OmegaConf.to_container(cfg) | {"code": about}
    dashboards.open_sinks(opened, folder, cfg.log, cfg.name, told, until, files)


def _restore(session: Session, state: dict[str, Any], folder: Path) -> None:
    try:
        session.method.restore(state, weights_only=True)
    except (KeyError, RuntimeError, AttributeError) as error:
        text = str(error).splitlines()[0].strip()
        raise BadInput(
            f"{folder / CHECKPOINTS}: the weights do not fit the networks of {folder / CONFIG} ({text}); "
            "use the version of distill that wrote them."
        ) from error


def _callbacks(session: Session, folder: Path, opened: list[Any], tests: Any, before: dict[str, Any]) -> list[Any]:
    cfg, train, facts = session.cfg, session.cfg.train, lambda: home.facts(session.cfg, session.data, folder)
    record = see.Record(opened, train.log_every)
    writer = checkpoint.Writer(folder / CHECKPOINTS, train.keep, train.keep_best, home.mark) if home.leads() else None
    fixed = session.noise(cfg.eval.validation_samples, cfg.eval.seed)
    validation = Validation(cfg, folder, tests, fixed, record, writer, _teacher_name(session, fixed, tests), session.rows)
    beats = (train.save_every, train.validate_every if train.keep_best else 0)

    def undone(step):
        record.back(step)
        validation.recall()

    session.method.skips.limit, session.validation = train.skips, validation
    saves = see.Saves(beats, writer, facts)
    return [
        Watch(train.log_every, validation.alarm),
        see.Bar(train.steps, train.log_every),
        record,
        home.Exactness(facts, before),
        Cost(folder / "cost.json"),
        Rollback(folder / CHECKPOINTS, saves, undone),
        validation,
        saves,  # last: a process killed after it has lost no row of the step
    ]


def _teacher_name(session: Session, fixed: tuple[Tensor, dict[str, Tensor]], tests: Any) -> str:
    """What the teacher's lines on the charts are kept under."""
    cfg, method = session.cfg, session.method
    teacher = cfg.roles.get("teacher")
    recipe = OmegaConf.to_container(OmegaConf.create({"eval": cfg.eval, "teacher": teacher}))
    about = [recipe, method.guidance, method.grid.steps, cfg.engine.precision]
    return lines.fingerprint(getattr(method, "teacher", torch.nn.Identity()), *fixed, tests, about)


# -- after training ----------------------------------------------------------------------------------------------


def open_run(folder: Path, allow: tuple[str, ...] = (), alone: bool = False) -> Session:
    """A run's objects with the weights of its newest checkpoint, read where they lie: for reading, not for training.

    `alone`: only the averaged student keeps its weights, with the base that it is an adapter on; at no time are there
    more weights in memory than one network's.
    """
    folder = Path(folder)
    cfg, state = home.config_of(folder), home.newest(folder)
    with shared_copies():
        session = assemble(cfg, allow)
    if alone:
        state["networks"] = {"ema": state["networks"]["ema"]}
    _restore(session, state, folder)
    session.method.eval()
    if alone:
        let_go(session.method, session.method.ema)
    return session


def sample(folder: Path, out: Path, n: int = 100, seed: int = 0, allow: tuple[str, ...] = ()) -> Path:
    """A picture of n few-step samples."""
    out = Path(out)
    if out.exists():
        raise BadInput(f"{out} exists; name another file so nothing is overwritten.")
    if out.suffix != ".png":
        raise BadInput(f"{out} must end in .png, the kind of picture that is written.")
    if not out.parent.is_dir():
        raise BadInput(f"{out.parent} is no folder; make it, or write the picture elsewhere.")
    session = open_run(folder, allow)
    z, cond = session.noise(n, seed)
    generator = torch.Generator().manual_seed(seed)
    x = session.method.sample(z, cond, generator=generator)
    session.suite().picture({f"{session.method.grid.steps} evaluations": x}, out)
    return out


def pairs(cfg: DictConfig, out: Path, count: int, seed: int = 0, allow: tuple[str, ...] = ()) -> None:
    """Shards of noise and where the teacher's ODE takes it, solved as the config's method would in its loop.

    The ranks that a launcher started share the work.
    """
    from distill.data import pairs as stored

    world = launch.join(cfg.engine)
    method = (session := assemble(cfg, allow)).method
    if not hasattr(method, "path"):
        raise BadInput(f"{type(method).__name__} does not train on pairs: give a recipe of distill.methods.Reflow "
                       "or distill.methods.Knowledge.")
    method.to("cuda" if torch.cuda.is_available() else "cpu")
    about = f"{type(method.solver).__name__} in {len(method.times) - 1} steps, w = {method.guidance:g}"
    shared = {"rank": torch.distributed.get_rank(), "world": world, "meet": torch.distributed.barrier} if world > 1 else {}
    stored.write(out, method.path, method.teacher, count, method.shape, times=method.path_times,
                 classes=session.data.info.classes, about=about, seed=seed, **shared)


def evaluate(folder: Path, samples: int | None = None, allow: tuple[str, ...] = ()) -> dict[str, Any]:
    """Teacher, training-free solvers and student at each NFE from the same noise: metrics.json and samples.png."""
    folder = Path(folder)
    if launch.given():  # by torchrun or srun: each rank draws and looks at its share of the samples
        launch.join(home.config_of(folder).engine)
    session = open_run(folder, allow)
    session.method.to("cuda" if torch.cuda.is_available() else "cpu")
    result, panels = measure(session, samples, folder=folder)
    if home.leads():
        table.write(result, folder / METRICS)
        session.suite(folder).picture(panels, folder / "samples.png")
    return result


def measure(
    session: Session,
    samples: int | None = None,
    evaluations: tuple[int, ...] | None = None,
    training_free: tuple[int, ...] | None = None,
    folder: Path | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The nested metrics and the panels (teacher at K and at the most evaluations, student at K), all from one noise.

    Args:
        evaluations: NFEs of teacher and student; the config's `eval.evaluations` and K by default.
        training_free: NFEs at which every training-free solver is tried on the teacher; all up to 16 by default.
        folder: the run's, for what is kept there.
    """
    method, cfg, tests = session.method, session.cfg, session.suite(folder)
    z, cond = session.noise(samples or cfg.eval.samples, cfg.eval.seed)
    ranks, count = here(), len(z)
    z, cond = z[ranks.share(count)], {k: v[ranks.share(count)] for k, v in cond.items()}
    steps = method.grid.steps
    nfes = sorted({*(evaluations or cfg.eval.evaluations), steps})
    tried = [n for n in nfes if n <= 16] if training_free is None else training_free
    teacher, free, student, panels = {}, {}, {}, {}
    for nfe in nfes if session.teacher else ():
        all_of_them = {} if nfe in tried else {"solvers": ("ddim",), "grids": ("uniform",)}
        made = _on(session, lambda z, c: baselines.baseline(session.teacher, z, c, (nfe,), batch=session.rows, **all_of_them), z, cond)  # noqa: B023, E501
        if PLAIN not in made[nfe]:
            continue  # a guided teacher cannot be asked once
        scores = {name: tests.score(x.cpu(), cond, quick=name != PLAIN, ranks=ranks) for name, x in made[nfe].items()}
        teacher[nfe] = scores[PLAIN]
        if nfe in tried:
            shared = set.intersection(*map(set, scores.values()))  # a best of all solvers needs the scores of all
            free[nfe] = {name: {k: v for k, v in found.items() if k in shared} for name, found in scores.items()}
        if nfe in (steps, nfes[-1]):
            panels[f"teacher, {nfe} evaluations"] = shown(made[nfe][PLAIN].cpu())
    if session.teacher is not method.ema:
        for nfe in nfes:
            grid = method.grid if nfe == steps else nfe
            generator = torch.Generator().manual_seed(cfg.eval.seed + 1_000_003 * ranks.rank)
            x = batched(lambda z, c: method.sample(z, c, generator=generator, grid=grid), z, cond, method, session.rows)  # noqa: B023, E501
            student[nfe] = tests.score(x, cond, ranks=ranks)
            if nfe == steps:
                panels[f"student, {steps} evaluations"] = shown(x)
    result = table.build(teacher, free, student)
    result["floor"], result["about"] = tests.floor(ranks), _about(session, count)
    return result, dict(sorted(panels.items(), key=lambda item: item[0].startswith("student")))


PLAIN = "ddim/uniform"  # the teacher's own row


def _on(session: Session, call: Any, z: Tensor, cond: dict[str, Tensor]) -> Any:
    """`call` on the method's device."""
    device = next(session.method.student.parameters()).device
    with torch.no_grad():
        return call(z.to(device), {k: v.to(device) for k, v in cond.items()})


def toy_scores(session: Session) -> dict[str, float]:
    """The numbers that a toy recipe promises under `expect`.

    `energy` of the student at its own K, `energy_ratio` to the teacher at K by DDIM from the same noise; for
    one-dimensional data `map_error` of the deterministic student against the exact flow map, and `solver_error`, the
    same for the teacher's N-step solver that a consistency student has as its optimum. `teacher_error`, where there is
    a teacher: root mean square distance to where the guided teacher gets from the same noise in 64 DDIM steps, over
    the data's standard deviation. `reward_gap`, where a method has a `metric`: the data's mean score minus the
    student's, negative when the student scores better.
    """
    method, tests = session.method, session.suite()
    z, cond = session.noise(session.cfg.eval.samples, session.cfg.eval.seed)
    x = method.sample(z, cond, generator=torch.Generator().manual_seed(0))
    teacher = solve(tests.oracle, tests.oracle.schedule.start(z), method.grid.times, DDIM())
    out = tests.score(x, cond)
    out["energy_ratio"] = out["energy"] / tests.score(teacher, cond, quick=True)["energy"]
    if method.shape == (1,):
        out["map_error"] = tests.map_error(z, x)
    if getattr(method, "metric", None) is not None:
        out["reward_gap"] = float(method.metric(tests.x).mean() - method.metric(x).mean())
    if getattr(method, "teacher", None) is not None:
        exact = solve(Guided(method.teacher, method.guidance), method.teacher.schedule.start(z), Grid.uniform(64), DDIM(), **cond)
        out["teacher_error"] = float((x - exact).square().mean().sqrt() / tests.x.std())
    return out


def _about(session: Session, samples: int) -> dict[str, Any]:
    return {
        "config": config.fingerprint(session.cfg),
        "step": session.method.step,
        "samples": samples,
        "seed": session.cfg.eval.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def export(folder: Path, out: Path, allow: tuple[str, ...] = (), kind: str = "pipeline") -> Path:
    """The averaged student in a form that others load: pipeline, lora, single-file or onnx."""
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise BadInput(f"{out} exists; name another folder so nothing is overwritten.")
    session, metrics = open_run(folder, allow, alone=True), folder / METRICS
    try:
        return write_export(session, out, json.loads(metrics.read_text()) if metrics.exists() else None, kind)
    except json.JSONDecodeError:
        raise BadInput(f"{metrics} is not JSON; write it again by `distill eval {folder}`, or remove it.") from None


def write_export(session: Session, out: Path, metrics: dict[str, Any] | None, kind: str = "pipeline") -> Path:
    """`session`'s averaged student under `out`."""
    from distill.export import export as write

    method, x = session.method, None
    if len(method.shape) == 3 and method.shape[0] in (1, 3):  # pixels; latents are decoded by the pipeline they came from
        x = batched(method.sample, *session.noise(64, session.cfg.eval.seed), method)
    return write(
        method.ema, method.grid, method.serving, out, kind=kind, samples=x,
        method=type(method).__name__, recipe=OmegaConf.to_yaml(session.cfg), metrics=metrics, w=method.guidance,
    )  # fmt: skip

"""The teacher's lines, the stop on a plateau and scripted faults, in whole runs of toy recipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

from distill.errors import BadInput
from distill.metrics.suite import Suite
from distill.solvers import DDIM, solve
from distill.times import Grid
from distill.training import baseline, checkpoints
from distill.training.experiment import build_experiment
from distill.training.records import history
from distill.training.run import _baseline_name
from distill.training.validation import Validation, plateau

SMALL = ("train.steps=6", "train.validate_every=2", "method.warm_start=0", "eval.validation_samples=60")


# -- the teacher's lines -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, tiny.train(folder, *SMALL, name="tdm")


def test_the_teacher_stands_beside_the_student_at_every_validation(done):
    folder, experiment = done
    rows = [r for r in tiny.rows(folder) if r["validation/energy"]]
    assert [r["step"] for r in rows] == ["0", "2", "4", "6"]
    for name in ("energy", "diversity", "beyond", "contrast", "coverage"):
        for who in (f"teacher@{experiment.method.grid.steps}", "teacher@50"):
            line = {r[f"validation/{who}/{name}"] for r in rows}
            assert len(line) == 1 and line != {""}, "a horizontal line"


def test_the_baseline_is_the_teachers_own_from_the_students_noise(done):
    folder, experiment = done
    z, cond = experiment.noise(60, experiment.cfg.eval.seed)
    teacher, tests = experiment.method.teacher, experiment.suite()
    x = solve(teacher, teacher.schedule.start(z), Grid.uniform(50).times, DDIM(), **cond)
    row = tiny.rows(folder)[0]
    assert float(row["validation/teacher@50/energy"]) == pytest.approx(tests.score(x, cond)["energy"], rel=1e-5)


def test_sister_runs_and_resumed_ones_do_not_measure_the_teacher_again(done, monkeypatch):
    folder, experiment = done
    kept = list((folder.parent / ".cache").iterdir())
    assert len(kept) == 1 and json.loads(kept[0].read_text()) == experiment.validation.baseline
    monkeypatch.setattr(baseline, "measure_baseline", lambda *a, **k: pytest.fail("measured again"))
    sister = tiny.train(folder.parent / "sister", *SMALL, "optim.student.lr=1e-4", name="tdm")
    assert sister.validation.baseline == experiment.validation.baseline
    tiny.train(folder, *SMALL, "train.steps=8", name="tdm", resume=True)
    assert list((folder.parent / ".cache").iterdir()) == kept


@pytest.mark.parametrize(
    "change",
    [
        "method.guidance=2",
        "method.grid=3",
        "eval.seed=9",
        "eval.validation_samples=50",
        "roles.teacher.std=0.2",
        "eval.evaluations=[1,8]",
        "engine.precision=bf16",
    ],
)
def test_another_teacher_noise_count_or_grid_is_another_line(change):
    names = []
    for keys in (SMALL, (*SMALL, change)):
        experiment = build_experiment(tiny.recipe(*keys, name="tdm"))
        fixed = experiment.noise(experiment.cfg.eval.validation_samples, experiment.cfg.eval.seed)
        names.append(_baseline_name(experiment, fixed, experiment.suite()))
    assert names[0] != names[1]


def test_other_weights_are_another_teacher():
    net, tests = torch.nn.Linear(50, 50), Suite()
    name = lambda: baseline.baseline_fingerprint(net, torch.zeros(2), {}, tests, None)
    before = name()
    assert name() == before
    with torch.no_grad():
        net.weight.mul_(1.001)
    assert name() != before


def test_lines_that_are_damaged_are_measured_anew(tmp_path):
    path = tmp_path / "baseline.json"
    for text in ("{", "[]", '{"teacher@4": 3}', '{"teacher@4": {"fd": "x"}}'):
        path.write_text(text)
        assert baseline.read_baseline(path) is None
    baseline.save_baseline(path, {"teacher@4": {"fd": 1.5}})
    assert baseline.read_baseline(path) == {"teacher@4": {"fd": 1.5}}
    (tmp_path / "file").write_text("")
    baseline.save_baseline(tmp_path / "file" / "baseline.json", {})  # no place to write is not a reason to stop


def test_without_a_teacher_the_data_are_the_line(tmp_path):
    tiny.train(tmp_path / "run", "eval.validation_samples=60")
    row = tiny.rows(tmp_path / "run")[0]
    assert (
        float(row["validation/data/coverage"]) == pytest.approx(0.969, abs=0.001) and row["validation/data/diversity"]
    )


# -- the stop --------------------------------------------------------------------------------------------------------


def train_of(patience, delta=0.0):
    return SimpleNamespace(patience=patience, min_delta=delta)


@pytest.mark.parametrize(
    "scores, best, patience, delta, stops",
    [
        ([5, 4, 3, 2], "min fd", 2, 0, False),
        ([5, 4, 4, 4], "min fd", 2, 0, True),
        ([5, 4, 4, 3.9], "min fd", 2, 0, False),
        ([5, 4, 3.9, 3.8], "min fd", 2, 0.5, True),
        ([5, 4, 3.7, 3.4], "min fd", 2, 0.5, False),
        ([0.1, 0.9, 0.8, 0.9], "max fd", 2, 0, True),
        ([0.1, 0.2, 0.3], "max fd", 1, 0, False),
        ([5, 6, 7], "min fd", 0, 0, False),
        ([5, 6, 7], "min fd", 3, 0, False),
        ([5], "min fd", 1, 0, False),
        ([5, 5], "min fd", 1, 0, True),
    ],
)
def test_a_plateau_is_so_many_validations_without_improvement(scores, best, patience, delta, stops):
    past = [{"step": 10 * i, "fd": float(v)} for i, v in enumerate(scores)]
    assert bool(plateau(past, best, train_of(patience, delta))) == stops


def flat(monkeypatch, *values):
    """Validation's headline as scripted, the last one for ever."""
    inner, seen = Validation.write, []

    def write(self, method, x, row):
        row["energy"] = values[min(len(seen), len(values) - 1)]
        seen.append(method.step)
        inner(self, method, x, row)

    monkeypatch.setattr(Validation, "write", write)
    return seen


STOP = (*SMALL, "train.steps=20", "train.patience=2")


def test_a_run_on_a_plateau_stops_and_says_so_and_a_resume_stays_stopped(tmp_path, monkeypatch, capsys):
    seen = flat(monkeypatch, 3.0, 2.0, 2.0)
    experiment = tiny.train(tmp_path / "run", *STOP)
    assert seen == [0, 2, 4, 6] and experiment.method.step == 6 and not experiment.preempted
    assert "energy has not improved on 2 of step 2" in experiment.stopped
    assert "step 6: energy has not improved" in (tmp_path / "run" / "stopped.txt").read_text()
    assert checkpoints.latest(tmp_path / "run" / "checkpoints").name == "step-00000006"
    again = tiny.train(tmp_path / "run", *STOP, resume=True)
    assert again.method.step == 6 and again.stopped and seen == [0, 2, 4, 6]
    assert "has stopped at step 6" in " ".join(capsys.readouterr().out.split())
    more = tiny.train(tmp_path / "run", *STOP, "train.patience=4", resume=True)
    assert more.method.step == 10 and seen[4:] == [8, 10] and more.stopped


def test_a_restarted_run_stops_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        flat(m, 3.0, 2.0, 2.0)
        whole = tiny.train(tmp_path / "whole", *STOP)
    seen = flat(monkeypatch, 3.0, 2.0, 2.0)
    with monkeypatch.context() as m:
        tiny.after(m, 5, tiny.interrupt)
        assert tiny.train(tmp_path / "run", *STOP).method.step == 5
    experiment = tiny.train(tmp_path / "run", *STOP, resume=True)
    assert experiment.method.step == whole.method.step == 6 and seen == [0, 2, 4, 6]
    assert tiny.rows(tmp_path / "run") == tiny.rows(tmp_path / "whole")


def test_a_metric_that_is_not_measured_is_refused_at_the_first_validation(tmp_path):
    with pytest.raises(BadInput, match="train.best: 'min fid' must be min or max and one of energy"):
        tiny.train(tmp_path / "run", *SMALL, "train.best=min fid")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(tmp_path):
    """The first decides; were the other not told, it would wait in the next step's collective for ever."""
    words = (
        "train",
        str(tiny.TOY / "dmd2.yaml"),
        *STOP,
        "train.min_delta=100",
        "data.batch_size=16",
        "engine.devices=2",
        "log.wandb=disabled",
        "engine.accelerator=cpu",
    )
    env = os.environ | {"PYTHONPATH": str(tiny.TOY.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "distill.cli", *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 0, said
    assert said.count("Stopping at step 4: energy has not improved") == 1 and said.count("4 of 20 steps done") == 1


# -- scripted faults -------------------------------------------------------------------------------------------------
# A student whose sampling is exact until step 4, so that nothing but the script can be the fault.


def scripted(monkeypatch, fault):
    def sample(self, z, cond, generator=None, grid=None):
        x = solve(self.teacher, self.teacher.schedule.start(z), Grid.uniform(32).times, DDIM(), **cond)
        return fault(x) if self.step >= 4 else x

    monkeypatch.setattr("distill.methods.tdm.TDM.sample", sample)


def two_modes(x):
    """All mass on two opposite ones of the ring's six: the spread remains, the coverage does not."""
    return x.sign() * 0.0 + torch.where(x[:, :1] > 0, 1.0, -1.0) * torch.tensor([1.5, 0.0]) + 0.15 * torch.randn_like(x)


@pytest.mark.parametrize(
    "fault, kinds",
    [
        (lambda x: 0.05 * x, {"collapse", "contrast", "mode loss"}),
        (lambda x: 1.8 * x, {"saturation", "contrast", "mode loss"}),
        (two_modes, {"mode loss"}),
        (lambda x: x, set()),
    ],
    ids=["collapse", "saturation", "mode-loss", "healthy"],
)
def test_a_scripted_fault_is_flagged_at_the_next_validation(tmp_path, monkeypatch, capsys, fault, kinds):
    torch.manual_seed(0)
    scripted(monkeypatch, fault)
    experiment = tiny.train(tmp_path / "run", *SMALL, "eval.validation_samples=600", name="tdm")
    found = experiment.validation.alarms
    assert {a.kind for a in found} - {"critic lag"} == kinds  # the live student is not scripted
    assert {a.step for a in found} <= {4}
    said = capsys.readouterr().out.replace("\n", " ")
    assert all(f"ALARM at step 4, {kind}:" in said for kind in kinds)
    path = tmp_path / "run" / "alarms.jsonl"
    assert (
        [json.loads(line)["kind"] for line in path.read_text().splitlines()] == [a.kind for a in found]
        if found
        else (not path.exists())
    )


def test_a_resumed_run_remembers_what_was_healthy(tmp_path, monkeypatch):
    scripted(monkeypatch, lambda x: 0.05 * x)
    keys = (*SMALL, "eval.validation_samples=600", "train.steps=100")
    with monkeypatch.context() as m:
        tiny.after(m, 3, tiny.interrupt)
        tiny.train(tmp_path / "run", *keys, name="tdm")
    with monkeypatch.context() as m:
        tiny.after(m, 7, tiny.interrupt)
        experiment = tiny.train(tmp_path / "run", *keys, name="tdm", resume=True)
    assert "collapse" in {a.kind for a in experiment.validation.alarms}, "step 4 is far from half of the run"
    assert [r["step"] for r in history(tmp_path / "run")] == [0, 2, 4, 6]

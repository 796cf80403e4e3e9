"""Callbacks: the progress bar without and with a terminal, metric logging, periodic actions."""

from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from click.testing import CliRunner
from rich.console import Console

from distill.cli import main
from distill.training import callbacks


def method(step: int = 0, total: int = 100, **logs):
    return SimpleNamespace(step=step, total_steps=total, logs={k: torch.tensor(v) for k, v in logs.items()})


# -- bar -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True])
def test_the_bar_renders_with_and_without_a_terminal(monkeypatch, terminal):
    out, seconds = io.StringIO(), itertools.count(1000)
    monkeypatch.setattr(callbacks, "console", Console(file=out, force_terminal=terminal, width=120))
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(seconds))
    bar, m = (
        callbacks.ProgressBar(40, every=1),
        method(0, 40, **{"student/loss": 0.25, "critic/loss": 2.0, "student/grad_norm": 9.0}),
    )
    trainer = SimpleNamespace(callbacks=[bar])
    bar.on_train_start(trainer, m)
    bar.on_train_batch_start(trainer, m, None, 0)
    for m.step in range(1, 41):
        bar.on_train_batch_end(trainer, m, None, None, 0)
    bar.teardown(None, m, "fit")
    text = out.getvalue()
    assert "40/40" in text and "student 0.25" in text and "critic 2" in text and "steps/s" in text
    assert "grad_norm" not in text and ("\x1b" in text) == terminal
    shown = [int(step) for step in re.findall(r"step (\d+)/40", text)]
    assert terminal or shown[-1] == 40 and 3 <= len(shown) <= 12 and max(map(int.__sub__, shown[1:], shown)) <= 20


def test_the_rate_is_that_of_recent_training_steps(monkeypatch):
    """Not of the measurement before the first step, of validations, or of a slow beginning; a resumed run counts its own."""
    now = 0.0
    monkeypatch.setattr(callbacks, "console", Console(file=(out := io.StringIO()), width=120))
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now)

    def validates(method):
        nonlocal now
        now += 500.0

    bar, m = callbacks.ProgressBar(1000), method(300, 1000, **{"student/loss": 1.0})
    validation = callbacks.PeriodicCallback(50, validates)
    trainer = SimpleNamespace(callbacks=[bar, validation])
    bar.on_train_start(trainer, m)
    now += 400.0  # the teacher is measured
    for step in range(301, 701):
        bar.on_train_batch_start(trainer, m, None, 0)
        now += 11.0 if step < 321 else 0.5
        m.step = step
        bar.on_train_batch_end(trainer, m, None, None, 0)
        validation.on_train_batch_end(trainer, m, None, None, 0)
    assert bar.rate() == pytest.approx(2.0)
    m.step = 600
    bar.on_train_batch_start(trainer, m, None, 0)
    assert list(bar.ends) == [(600, bar.clock(trainer))], "a rollback begins anew"
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step 301/1000") and lines[0].endswith("0.1 steps/s  7689 s left"), lines[0]
    assert lines[-1].endswith("2.0 steps/s  154 s left"), lines[-1]


def test_an_error_gives_the_terminal_back(monkeypatch):
    monkeypatch.setattr(callbacks, "console", Console(file=io.StringIO(), force_terminal=True))
    bar = callbacks.ProgressBar(40)
    bar.on_train_start(None, method())
    live = bar.bar.live
    bar.on_exception(None, method(), ValueError())
    assert bar.bar is None and not live.is_started


# -- periodic actions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "every, start, finished, stops, expected",
    [
        (0, False, False, 7, [7]),
        (3, False, False, 7, [3, 6, 7]),
        (3, False, False, 6, [3, 6]),
        (3, True, True, 7, [0, 3, 6, 7]),
        (0, True, True, 7, [0, 7]),
        (0, True, True, 5, [0]),
        (3, True, True, 5, [0, 3]),
    ],
)
def test_actions_come_at_their_interval_and_at_the_end_once(every, start, finished, stops, expected):
    seen, m = [], method(total=6 if stops == 6 else 7)
    call = callbacks.PeriodicCallback(every, lambda m: seen.append(m.step), start, finished)
    call.on_train_start(None, m)
    for m.step in range(1, stops + 1):
        call.on_train_batch_end(None, m, None, None, 0)
    call.on_train_end(None, m)
    assert seen == expected


def test_several_intervals_call_once_where_they_meet():
    seen, m = [], method(total=12)
    call = callbacks.PeriodicCallback((4, 0, 6), lambda m: seen.append(m.step))
    for m.step in range(1, 13):
        call.on_train_batch_end(None, m, None, None, 0)
    call.on_train_end(None, m)
    assert seen == [4, 6, 8, 12]


def test_a_resumed_run_does_not_start_anew():
    seen, m = [], method(step=4)
    callbacks.PeriodicCallback(0, lambda m: seen.append(m.step), start=True).on_train_start(None, m)
    assert seen == []


def test_records_are_written_at_their_interval():
    rows = []
    sink = SimpleNamespace(write=lambda row, step: rows.append((step, row["loss"])))
    record, m = callbacks.MetricLogger([sink, sink], every=2), method(loss=0.5)
    record.on_train_start(None, m)
    for m.step in range(1, 6):
        record.on_train_batch_end(None, m, None, None, 0)
    assert rows == [(2, 0.5), (2, 0.5), (4, 0.5), (4, 0.5)]


# -- lines without a terminal ----------------------------------------------------------------------------------------


def test_a_long_line_is_one_line_without_a_terminal():
    """For log files and for `grep`. The console is made when the module is imported, so a process of its own prints."""
    code = "from distill.training import callbacks; callbacks.PRINT_EVERY = 0; callbacks.TimedPrint('measuring ')('x' * 300)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"}
    )
    assert done.stdout == f"measuring {'x' * 300}\n", done.stderr


def test_an_evaluation_says_what_it_measures_before_its_table(tmp_path, monkeypatch):
    run = CliRunner().invoke(
        main,
        [
            "train",
            str(tiny.TOY / "tdm.yaml"),
            *tiny.SMALL,
            "train.steps=2",
            "name=run",
            "--runs",
            str(tmp_path),
            "--no-check",
        ],
    )
    assert run.exit_code == 0, run.output
    lines: list[str] = []
    monkeypatch.setattr(callbacks, "PRINT_EVERY", 0)
    monkeypatch.setattr(callbacks.console, "print", lambda text, **kw: lines.append(text))
    done = CliRunner().invoke(main, ["eval", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert len([line for line in lines if line.startswith("measuring ")]) >= 2, lines

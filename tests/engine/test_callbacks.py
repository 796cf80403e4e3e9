"""What one sees of a run: the bar without and with a terminal, CSV that widens, wandb without a key, beats."""

from __future__ import annotations

import csv
import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from distill.engine import callbacks as see
from distill.errors import BadInput


def method(step: int = 0, total: int = 100, **logs):
    return SimpleNamespace(step=step, total_steps=total, logs={k: torch.tensor(v) for k, v in logs.items()})


def read(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -- csv -----------------------------------------------------------------------------------------------------------


def test_new_columns_widen_the_file_and_keep_the_rows(tmp_path):
    out = see.CSV(tmp_path / "m.csv")
    out.write({"a": 1.5}, 1)
    out.write({"b": 2.5}, 2)
    out.write({"a": 3.5, "b": 4.5}, 3)
    assert read(tmp_path / "m.csv") == [
        {"step": "1", "a": "1.5", "b": ""}, {"step": "2", "a": "", "b": "2.5"}, {"step": "3", "a": "3.5", "b": "4.5"},
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["m.csv"]


def test_a_resumed_file_goes_on_and_drops_what_was_done_in_vain(tmp_path):
    path = tmp_path / "m.csv"
    out = see.CSV(path)
    for step in range(5):
        out.write({"a": step}, step)
    with open(path, "a") as file:
        file.write("7")  # the process died while it wrote this row
    again = see.CSV(path, until=3)
    again.write({"a": 40, "b": 1}, 4)
    assert [(r["step"], r["a"]) for r in read(path)] == [("0", "0"), ("1", "1"), ("2", "2"), ("3", "3"), ("4", "40")]
    assert see.CSV(path).columns == ["step", "a", "b"] and read(path) == []  # started anew: from before step 0


# -- bar -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True])
def test_the_bar_renders_with_and_without_a_terminal(monkeypatch, terminal):
    out = io.StringIO()
    monkeypatch.setattr(see, "console", Console(file=out, force_terminal=terminal, width=120))
    bar, m = see.Bar(40, every=1), method(0, 40, **{"student/loss": 0.25, "critic/loss": 2.0, "student/grad_norm": 9.0})
    bar.on_train_start(None, m)
    for m.step in range(1, 41):
        bar.on_train_batch_end(None, m, None, None, 0)
    bar.teardown(None, m, "fit")
    text = out.getvalue()
    assert "40/40" in text and "student 0.25" in text and "critic 2" in text and "steps/s" in text
    assert "grad_norm" not in text and ("\x1b" in text) == terminal
    assert terminal or text.count("\n") == 2  # steps 20 and 40


def test_an_error_gives_the_terminal_back(monkeypatch):
    monkeypatch.setattr(see, "console", Console(file=io.StringIO(), force_terminal=True))
    bar = see.Bar(40)
    bar.on_train_start(None, method())
    live = bar.bar.live
    bar.on_exception(None, method(), ValueError())
    assert bar.bar is None and not live.is_started


# -- beats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every, start, finished, stops, expected", [
    (0, False, False, 7, [7]), (3, False, False, 7, [3, 6, 7]), (3, False, False, 6, [3, 6]),
    (3, True, True, 7, [0, 3, 6, 7]), (0, True, True, 7, [0, 7]), (0, True, True, 5, [0]), (3, True, True, 5, [0, 3]),
])  # fmt: skip
def test_actions_come_on_their_beat_and_at_the_end_once(every, start, finished, stops, expected):
    seen, m = [], method(total=6 if stops == 6 else 7)
    call = see.Every(every, lambda m: seen.append(m.step), start, finished)
    call.on_train_start(None, m)
    for m.step in range(1, stops + 1):
        call.on_train_batch_end(None, m, None, None, 0)
    call.on_train_end(None, m)
    assert seen == expected


def test_several_beats_call_once_where_they_meet():
    seen, m = [], method(total=12)
    call = see.Every((4, 0, 6), lambda m: seen.append(m.step))
    for m.step in range(1, 13):
        call.on_train_batch_end(None, m, None, None, 0)
    call.on_train_end(None, m)
    assert seen == [4, 6, 8, 12]


def test_a_resumed_run_does_not_start_anew():
    seen, m = [], method(step=4)
    see.Every(0, lambda m: seen.append(m.step), start=True).on_train_start(None, m)
    assert seen == []


def test_records_are_written_on_their_beat():
    rows = []
    sink = SimpleNamespace(write=lambda row, step: rows.append((step, row["loss"])))
    record, m = see.Record([sink, sink], every=2), method(loss=0.5)
    record.on_train_start(None, m)
    for m.step in range(1, 6):
        record.on_train_batch_end(None, m, None, None, 0)
    assert rows == [(2, 0.5), (2, 0.5), (4, 0.5), (4, 0.5)]


# -- wandb -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def keyless(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path / "netrc"


def test_a_key_is_found_in_the_environment_and_in_netrc_for_the_right_host(keyless, monkeypatch):
    assert not see.key_at_hand()
    keyless.write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    keyless.chmod(0o600)
    assert see.key_at_hand()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not see.key_at_hand()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert see.key_at_hand()
    keyless.write_text("nonsense {")
    monkeypatch.delenv("WANDB_API_KEY")
    assert not see.key_at_hand()


def test_online_without_a_key_is_refused_not_asked(keyless, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a prompt"))
    with pytest.raises(BadInput, match=r"log\.wandb=online needs a key: set WANDB_API_KEY"):
        see.Wandb(tmp_path, "online", "p", "n", {})
    assert not (tmp_path / "wandb").exists()


def test_without_a_key_runs_are_offline_and_keep_their_identity(keyless, tmp_path, monkeypatch):
    """The real wandb: no key, no prompt, no network."""
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a prompt"))
    (tmp_path / "run").mkdir()
    ids = []
    for step in range(2):
        sink = see.Wandb(tmp_path / "run", "auto", "p", "n", {"lr": 1e-3})
        sink.write({"student/loss": 0.5}, step)
        ids.append(sink.run.id)
        assert sink.run.offline
        sink.close()
    assert ids[0] == ids[1] == (tmp_path / "run" / "wandb_id").read_text()
    found = [p for p in (tmp_path / "run" / "wandb").iterdir() if p.name.startswith("offline-run")]
    assert found and all(p.name.endswith(ids[0]) and list(p.glob("run-*.wandb")) for p in found)

"""Weights & Biases offline, read back from its own file: complete, and one run across restarts; TensorBoard the same."""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path

import pytest
import tiny

from distill.config.schema import Log
from distill.errors import BadInput
from distill.training import loggers

KEYS = ("train.steps=4", "train.validate_every=2", "train.save_every=2", "eval.validation_samples=60")


@pytest.fixture
def keyless(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path / "netrc"


def test_a_key_is_found_in_the_environment_and_in_netrc_for_the_right_host(keyless, monkeypatch):
    assert not loggers.has_api_key()
    keyless.write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    keyless.chmod(0o600)
    assert loggers.has_api_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not loggers.has_api_key()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert loggers.has_api_key()
    keyless.write_text("nonsense {")
    monkeypatch.delenv("WANDB_API_KEY")
    assert not loggers.has_api_key()


def test_online_without_a_key_is_refused_without_a_prompt(keyless, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a prompt"))
    with pytest.raises(BadInput, match=r"log\.wandb=online needs a key: set WANDB_API_KEY"):
        loggers.WandbLogger(tmp_path, Log(wandb="online"), "n", {})
    assert not (tmp_path / "wandb").exists()


def records(path: Path):
    """The records of a .wandb file: a LevelDB log (blocks of 32 kB, each piece after CRC, length and kind) of protobuf."""
    from wandb.proto import wandb_internal_pb2 as proto

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole one, or the last piece
            record = proto.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def rows(found) -> list[dict]:
    """History rows; what wandb writes of a picture or a table piece by piece is one mapping."""
    out = []
    for items in (r.history.item for r in found if r.HasField("history")):
        out.append({})
        for item in items:
            *outer, last = item.nested_key or [item.key]
            into = out[-1]
            for name in outer:
                into = into.setdefault(name, {})
            into[last] = json.loads(item.value_json)
    return out


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A run of four steps under the real wandb, then two more: (folder, one list of records a process)."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_RUN_ID"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(folder.parent / "netrc"))
        patch.setattr("builtins.input", lambda *a: pytest.fail("a prompt"))
        wandb = (
            "log.wandb=auto",
            "log.to=[wandb,tensorboard]",
            "log.entity=ours",
            "log.group=seeds",
            "log.tags=[a,b]",
            "log.artifacts=true",
        )
        tiny.train(folder, *KEYS, *wandb)
        time.sleep(1.1)  # wandb names the folder of an offline run by the second that it starts in
        tiny.train(folder, *KEYS, *wandb, "train.steps=6", resume=True)
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    return folder, [list(records(f)) for f in files]


def test_offline_entity_group_tags_and_the_checkpoint_artifact_are_there(offline):
    folder, parts = offline
    for part in parts:
        run = next(r.run for r in part if r.HasField("run"))
        assert (run.entity, run.run_group, list(run.tags)) == ("ours", "seeds", ["a", "b"])
    names = [r.request.log_artifact.artifact for r in parts[-1] if r.request.HasField("log_artifact")]
    names += [r.artifact for r in parts[-1] if r.HasField("artifact")]
    artifact = next(a for a in names if a.type == "checkpoint")
    assert {e.path for e in artifact.manifest.contents} >= {
        "state.pt",
        "manifest.json",
    }


def test_offline_the_export_becomes_an_artifact_of_the_run(offline, tmp_path):
    folder, _ = offline
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model_index.json").write_text("{}")
    before = set((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    time.sleep(1.1)
    log = Log(wandb="offline", artifacts=True, to=["wandb"])
    assert loggers.log_export(folder, log, "n", tmp_path / "student")
    (new,) = set((folder / "wandb").glob("offline-run-*/run-*.wandb")) - before
    for _ in range(100):  # wandb's own process writes the file
        found = list(records(new))
        names = [r.request.log_artifact.artifact for r in found if r.request.HasField("log_artifact")]
        names += [r.artifact for r in found if r.HasField("artifact")]
        if names:
            break
        time.sleep(0.1)
    artifact = next(a for a in names if a.type == "export")
    assert [e.path for e in artifact.manifest.contents] == ["model_index.json"]
    assert next(r.run for r in found if r.HasField("run")).run_id == (folder / "wandb_id").read_text().strip()


def test_an_export_becomes_an_artifact_only_with_log_artifacts(tmp_path):
    assert not loggers.log_export(tmp_path, Log(), "n", tmp_path)
    assert not loggers.log_export(tmp_path, Log(artifacts=True, to=["csv"]), "n", tmp_path)


def test_offline_the_curves_are_complete_and_in_step(offline):
    folder, parts = offline
    found = [row for part in parts for row in rows(part)]
    ours = [r["step"] for r in tiny.rows(folder) if r["student/loss"]]
    assert [str(r["_step"]) for r in found if "student/loss" in r] == ours == ["1", "2", "3", "4", "5", "6"]
    validated = [r for r in found if "validation/energy" in r]
    assert [r["_step"] for r in validated] == [0, 2, 4, 6]
    assert all("validation/data/coverage" in r for r in validated)  # the line beside it
    written = {r["step"]: r for r in tiny.rows(folder)}
    assert float(written["0"]["validation/energy"]) == validated[0]["validation/energy"]


def test_offline_the_pictures_scrub_under_one_name(offline):
    folder, parts = offline
    shown = [r["samples"] for part in parts for r in rows(part) if "samples" in r]
    assert [s["caption"] for s in shown] == [f"step {n}, 50 evaluations" for n in (0, 2, 4, 6)]
    for media in shown:
        copies = list((folder / "wandb").glob(f"offline-run-*/files/{media['path']}"))
        assert len(copies) == 1 and copies[0].read_bytes() in [p.read_bytes() for p in (folder / "samples").iterdir()]


def test_offline_the_final_table_and_the_charts_are_there(offline):
    folder, parts = offline
    path = next(r["final"] for r in rows(parts[-1]) if "final" in r)["path"]
    table = json.loads(next((folder / "wandb").glob(f"offline-run-*/files/{path}")).read_text())
    names = table["columns"]
    assert [line[0] for line in table["data"]][1] == "student, step 6" and "energy" in names
    last = next(r for r in tiny.rows(folder) if r["step"] == "6" and r["validation/energy"])
    assert table["data"][1][names.index("energy")] == pytest.approx(float(last["validation/energy"]))
    assert any(key.startswith("charts/energy") for row in rows(parts[-1]) for key in row)


def test_offline_the_configuration_and_the_code_are_there(offline):
    folder, parts = offline
    for part in parts:
        config = {i.key: json.loads(i.value_json) for r in part if r.HasField("run") for i in r.run.config.update}
        assert config["train"]["log_every"] == 1 and config["method"]["_target_"] == "distill.methods.Diffusion"
        assert len(config["code"]["sha256"]) == 64
        kept = [f.path for r in part if r.HasField("files") for f in r.files.files]
        assert "code.json" in kept
    assert [entry["step"] for entry in json.loads((folder / "code.json").read_text())] == [0]  # the same code went on


def test_an_offline_run_says_where_it_is_and_wandb_prints_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "code.json").write_text("{}")
    logger = loggers.WandbLogger(tmp_path, Log(), "n", {}, [tmp_path / "code.json"])
    logger.close()
    out, err = capfd.readouterr()
    (copy,) = (tmp_path / "wandb").glob("offline-run-*/files/code.json")
    assert not copy.is_symlink() and copy.read_text() == "{}"
    said = " ".join(out.split())
    assert said.startswith(
        f"wandb logs offline to {tmp_path}/wandb; `wandb sync {tmp_path}/wandb/offline-run-*` uploads"
    )
    assert len(out.splitlines()) == 1 and err == ""


def test_offline_a_restarted_run_is_one_run(offline):
    """`resume` in the record is what makes `wandb sync` add a part to the run instead of writing over it."""
    folder, parts = offline
    runs = [next(r.run for r in part if r.HasField("run")) for part in parts]
    assert len(runs) == 2 and {r.run_id for r in runs} == {(folder / "wandb_id").read_text()}
    assert all(r.resume for r in runs)


def test_offline_rows_that_a_killed_process_lost_are_logged_again(offline, tmp_path):
    """Its file ends within a block: here it is taken away whole, with the mark that it was closed."""
    folder = tmp_path / "run"
    shutil.copytree(offline[0], folder, ignore=shutil.ignore_patterns("wandb"), symlinks=True)
    assert (folder / "wandb_step").read_text() == "6"
    (folder / "wandb_step").write_text("2")  # of an earlier part, which was closed
    tiny.train(folder, *KEYS, "log.wandb=offline", "train.steps=8", resume=True)
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    found = {r["_step"]: r for r in rows(records(file))}
    assert [step for step in sorted(found) if "student/loss" in found[step]] == [3, 4, 5, 6, 7, 8]
    csv = {int(r["step"]): float(r["student/loss"]) for r in tiny.rows(folder) if r["student/loss"]}
    assert {step: found[step]["student/loss"] for step in (3, 4, 5, 6)} == {step: csv[step] for step in (3, 4, 5, 6)}


def test_tensorboard_has_the_same_curves_pictures_and_layout(offline):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    events = EventAccumulator(str(offline[0] / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [e.step for e in events.Scalars("student/loss")] == [1, 2, 3, 4, 5, 6]
    ours = [float(r["validation/energy"]) for r in tiny.rows(offline[0]) if r["validation/energy"]]
    assert [e.value for e in events.Scalars("validation/energy")] == pytest.approx(ours)
    assert [e.step for e in events.Images("samples")] == [0, 2, 4, 6]
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    charts = {c.title: list(c.multiline.tag) for c in layout.category[0].chart}
    assert charts["coverage"] == ["^validation/coverage$", "^validation/data/coverage$"]
    assert "final/text_summary" in events.Tags()["tensors"]


def test_one_key_says_where_to(tmp_path):
    tiny.train(tmp_path / "run", *KEYS, "log.wandb=auto", "log.to=[csv]")
    assert not (tmp_path / "run" / "wandb").exists() and not (tmp_path / "run" / "tensorboard").exists()
    assert tiny.rows(tmp_path / "run")
    with pytest.raises(BadInput, match="log.to: 'tensorbord' must be one of wandb, tensorboard, csv. Did you mean"):
        tiny.recipe("log.to=[tensorbord]")


def test_without_tensorboards_package_the_mend_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        BadInput, match=r"log.to: tensorboard needs its package: pip install 'distill-diffusion\[tensorboard\]'"
    ):
        loggers.TensorBoardLogger(tmp_path, {})

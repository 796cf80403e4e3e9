"""`distill VERB`: bad input is one sentence and exit code 2, nothing is lost, Ctrl-C ends cleanly, help helps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from distill.cli import main
from distill.training import checkpoints

TEACHER = str(tiny.TOY / "teacher.yaml")
SHARDS = "data={_target_: distill.data.shards.Shards, path: PATH, batch_size: 4}"
STOCK = "roles={teacher: {_target_: distill.models.diffusers.load, path: PATH}}"


@pytest.fixture(autouse=True, scope="module")
def cheap():
    """No test waits for a busy disk; test_checkpoint.py sees to it that runs do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every command runs in an empty folder, on the threads that the tests were given."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def distill(*arguments: str):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def train(*keys: str, recipe: str = TEACHER):
    return distill("train", recipe, *tiny.SMALL, *keys)


def refuses(result, *says: str) -> None:
    """Exit code 2 and one sentence that says this, without a traceback."""
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("distill: ") and "Traceback" not in result.output, result.stderr
    for text in says:
        assert text in lines[0], lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """runs/toy-teacher of four steps, saved at each second."""
    folder = tmp_path_factory.mktemp("trained")
    result = train("train.steps=4", "train.save_every=2", "--runs", folder / "runs")
    assert result.exit_code == 0, result.output
    assert "4 of 4 steps done" in result.stdout and result.stderr == ""
    return folder / "runs" / "toy-teacher"


# -- help ----------------------------------------------------------------------------------------------------------


def verbs(group=main, path=()):
    for name, command in group.commands.items():
        yield (*path, name)
        if hasattr(command, "commands"):
            yield from verbs(command, (*path, name))


@pytest.mark.parametrize("verb", [(), *verbs()], ids=" ".join)
def test_every_verb_explains_itself_with_an_example(verb):
    result = distill(*verb, "--help")
    assert result.exit_code == 0 and f"Example:\n    distill {' '.join(verb)}".rstrip() in result.output


@pytest.mark.parametrize("verb", [(), *verbs()], ids=" ".join)
def test_help_fits_80_columns(verb):
    """No line is longer, and no short description in a list of commands is cut."""
    output = CliRunner(env={"COLUMNS": "80"}).invoke(main, [*verb, "--help"], prog_name="distill").output
    assert [line for line in output.splitlines() if len(line) > 80] == []
    assert [line for line in output.partition("\nCommands:\n")[2].splitlines() if line.endswith("...")] == []


def test_the_version_is_printed():
    assert distill("--version").output.startswith("distill, version ")


# -- train ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, says",
    [
        (["train.stepps=3"], ["Unknown key 'train.stepps'", "Did you mean 'steps'"]),
        (["roles.student.net.witdh=3"], ["Unknown key 'roles.student.net.witdh'", "Did you mean 'width'"]),
        (["method.gird=3"], ["Unknown key 'method.gird'", "Did you mean 'grid'"]),
        (["train.steps=many"], ["train.steps: Value 'many'"]),
        (["roles.student.net.dim=two"], ["roles.student.net.dim: expected int, got 'two'"]),
        (["roles.student.prediction=flwo"], ["roles.student: prediction 'flwo'", "Did you mean 'flow'"]),
        (["roles.studnet=${roles.student}"], ["roles.studnet: Diffusion has no such role", "Did you mean 'student'"]),
        (["optim.critic.lr=1"], ["optim.critic: not a trainable role"]),
        (["optim.student.name=AdamWW"], ["optim.student.name: torch.optim has no 'AdamWW'", "Did you mean 'AdamW'"]),
        (["method.grid=[0.9, 0]"], ["method: grid starts at 0.9", "make the first time 1"]),
        (["method._target_=distill.methods.Difusion"], ["method._target_", "Did you mean 'Diffusion'"]),
        (["method._target_=os.system"], ["method._target_: 'os.system' is outside distill", "--allow os"]),
        (
            [SHARDS.replace("PATH", "data/digits/train")],
            ["data.path: data/digits/train", "`distill data digits data/digits`"],
        ),
        (
            ["data={_target_: distill.data.toy.Conditions, shape: [2], classes: 0, batch_size: 4}"],
            ["data (conditions alone) holds no samples, and Diffusion trains on them"],
        ),
        ([STOCK.replace("PATH", "/nowhere/teacher")], ["roles.teacher: /nowhere/teacher is not a diffusers folder"]),
        (["log.wandb=onlin"], ["log.wandb: 'onlin' must be one of", "Did you mean 'online'"]),
        (
            ["optim.student.lr=1e30", "optim.student.clip=0", "train.steps=20", "name=x", "--no-check"],
            ["student's loss or gradient was not finite", "lr"],
        ),
        (["name=taken"], ["taken exists and is not a run", "nothing is overwritten"]),
        (["--resume"], ["toy-teacher holds no run to resume", "leave out --resume"]),
    ],
)
def test_train_refuses_bad_input_in_one_sentence(here, keys, says):
    (here / "runs" / "taken").mkdir(parents=True)
    (here / "runs" / "taken" / "notes").write_text("mine")
    before = tiny.files(here)
    result = train(*keys)
    refuses(result, *says)
    assert "--no-check" in keys or "training for" not in result.output
    left = tiny.files(here)
    assert {k: v for k, v in left.items() if not k.startswith(("runs/x", "runs/.cache"))} == before


@pytest.mark.parametrize(
    "recipe, says",
    [
        ("configs/toy/nope.yaml", "configs/toy/nope.yaml does not exist"),
        ("broken.yaml", "broken.yaml is not valid YAML"),
    ],
)
def test_train_refuses_a_missing_or_broken_config(here, recipe, says):
    (here / "broken.yaml").write_text("roles: {a: [")
    refuses(train(recipe=recipe), says)
    refuses(distill("train", "train.steps=3"), "The config has no 'method'; start from one in configs/")
    assert [p.name for p in here.iterdir()] == ["broken.yaml"]


def test_patterns_name_shipped_recipes_where_the_folder_is_not_here(here, monkeypatch):
    """The shell leaves such a pattern as it is; a local folder of that name goes first."""
    from distill.cli.training import _split
    from distill.config import recipes

    toys = sorted(name for name in recipes.names() if name.startswith("toy/tdm"))
    assert len(toys) > 1
    for pattern in ("configs/toy/tdm*.yaml", "toy/tdm*"):
        assert _split((pattern, "seed=1", "digits/pcm")) == ([*toys, "digits/pcm"], ["seed=1"])
    for verb in ("train", "check", "plan", "bench", "compare"):
        result = distill(verb, "configs/dgits/*.yaml")
        refuses(result, "configs/dgits/*.yaml matches no file and no recipe. Did you mean 'digits'")
    (here / "configs" / "toy").mkdir(parents=True)
    (here / "configs" / "toy" / "tdm-mine.yaml").write_text("name: mine")
    assert _split(("configs/toy/tdm*.yaml",))[0] == ["configs/toy/tdm-mine.yaml"]


def test_messages_name_recipes_and_no_folder_of_the_package(here, trained):
    from distill.config import recipes

    result = distill("compare", trained, "toy/tdm")
    assert str(recipes.RECIPES) not in result.output + result.stderr and "toy/" in result.output + result.stderr
    assert recipes.shown(recipes.find("toy/tdm")) == "toy/tdm" and recipes.shown("configs/a.yaml") == "configs/a.yaml"


def test_a_wrong_option_or_a_bare_key_is_answered_by_what_is_near(here):
    def says(*words):
        result = distill(*words)
        assert result.exit_code == 2, result.output
        return result.stderr.splitlines()[-1]

    assert says("demo", "--step", "3").endswith("No such option '--step'. Did you mean '--steps'?")
    assert says("train", "toy/tdm", "--step", "3").endswith("Did you mean train.steps=VALUE?")
    assert says("train", "toy/tdm", "--max-speed", "3").endswith("No such option '--max-speed'.")
    assert says("demo", "--seps-of-all", "3").endswith("No such option '--seps-of-all'.")
    for words in (("train.steps", "3"), ("train.steps", "3", "name=x")):
        assert says("train", "toy/tdm", *words).endswith("'train.steps' is a key, not a config: write train.steps=3.")
    assert says("train", "toy/tdm", "seed", "name=x").endswith("write seed=VALUE.")
    assert "Config file data.yaml does not exist" in says("train", "data.yaml")


@pytest.mark.parametrize(
    "words", [("images", "photo", "out"), ("encode", "photo", "out", "--pipeline", "tiny:sd15"), ("audit", "photo")]
)
def test_a_missing_folder_is_answered_by_a_near_one(here, words):
    refuses_ = distill("data", *words)
    assert refuses_.exit_code == 2 and "Did you mean" not in refuses_.stderr
    (here / "photos").mkdir()
    refuses(distill("data", *words), "Did you mean 'photos'?")


def test_a_missing_run_is_answered_by_a_near_one(trained):
    refuses(distill("eval", trained.with_name("toy-techer")), f"Did you mean '{trained}'?")


def test_train_refuses_a_teacher_without_weights(here):
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    for name, content in (
        ("model_index.json", {"_class_name": "DDIMPipeline", **parts}),
        ("unet/config.json", {}),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}),
    ):
        (here / "teacher" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "teacher" / name).write_text(json.dumps(content))
    result = train(STOCK.replace("PATH", str(here / "teacher")))
    refuses(result, "roles.teacher: ", "teacher/unet: the network's weights (*.safetensors) are missing")
    assert not (here / "runs").exists()


def test_train_refuses_shards_that_the_network_cannot_take(here):
    np.savez("a.npz", x=np.zeros((60, 1, 4, 4), np.uint8), y=np.arange(60) % 5)
    refuses(distill("data", "npz", "a.npz", "shards"), "a.npz", "--channels first, last or none")
    made = distill("data", "npz", "a.npz", "shards", "--channels", "first", "--range", "0", "255")
    assert made.exit_code == 0, made.output
    shards = SHARDS.replace("PATH", "shards/train")
    refuses(train(shards), "shards/train", "samples of shape (1, 4, 4), the network of student expects (2,)")
    net = (
        "{_target_: distill.models.small.Transformer, size: 4, channels: 1, patch: 2, width: 16, depth: 1, classes: 3}"
    )
    keys = [k for k in tiny.SMALL if not k.startswith(("roles", "data"))]
    result = distill("train", TEACHER, *keys, shards, f"roles.student.net={net}")
    refuses(result, "shards/train", "holds 5 classes, the network of student expects 3")
    assert not (here / "runs").exists()
    refuses(distill("data", "npz", "a.npz", "shards", "--channels", "first"), "shards")
    refuses(distill("data", "npz", "b.npz", "more"), "b.npz")


def test_debug_shows_the_traceback(here):
    result = distill("--debug", "train", TEACHER, "train.stepps=3")
    assert result.exit_code == 1 and type(result.exception).__name__ == "BadInput"


def test_a_failed_start_does_not_block_the_next_one(here):
    refuses(train("optim.student.name=AdamWW"))
    assert not (here / "runs").exists()
    assert train("train.steps=1").exit_code == 0


def test_a_folder_without_rights_is_one_sentence(here):
    (here / "runs").write_text("a file")
    refuses(train(), "runs/toy-teacher")


# -- an existing run -------------------------------------------------------------------------------------------------


def test_an_existing_run_is_never_overwritten(trained):
    before = tiny.files(trained)
    runs = ("--runs", trained.parent)
    refuses(train(*runs), "already holds a run", "--resume")
    refuses(train("method.grid=7", "--resume", *runs), "--resume: method.grid is 7 but was 50")
    refuses(train("optim.student.name=Nope", "--resume", *runs), "torch.optim has no 'Nope'")
    assert tiny.files(trained) == before


def test_a_damaged_checkpoint_is_refused_with_the_mend(trained, here):
    import shutil

    shutil.copytree(trained, here / "run")
    state = here / "run" / "checkpoints" / "step-00000004" / "state.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 0xFF
    state.write_bytes(bytes(data))
    before = tiny.files(here)
    for verb in (("sample", "run", "a.png"), ("eval", "run"), ("export", "run", "student")):
        refuses(distill(*verb), "step-00000004 cannot be read", "remove it to continue from step-00000002")
    assert tiny.files(here) == before


def test_sample_writes_a_picture_and_overwrites_nothing(trained, here):
    result = distill("sample", trained, "a.png", "-n", "5")
    assert result.exit_code == 0 and "5 samples" in result.stdout and result.stderr == ""
    before = tiny.files(here)
    assert before["a.png"][:4] == b"\x89PNG"
    refuses(distill("sample", trained, "a.png"), "a.png exists; name another")
    refuses(distill("sample", trained, "a.xyz"), "a.xyz must end in .png")
    refuses(distill("sample", trained, "no/a.png"), "no is not a folder")
    assert tiny.files(here) == before


def test_export_refuses_an_existing_folder_and_a_network_without_a_stock_class(trained, here):
    (here / "student").mkdir()
    refuses(distill("export", trained, "student"), "student exists")
    says = "distill: MLP has no stock class in diffusers", "or export as onnx; and a student", "has no stock scheduler"
    refuses(distill("export", trained, "other"), *says)
    for kind in ("lora", "single-file"):
        refuses(distill("export", trained, "other", "--as", kind), "MLP ", ": export it as onnx.")
    assert [p.name for p in here.iterdir()] == ["student"]


@pytest.mark.parametrize("verb", [("sample", "RUN", "a.png"), ("eval", "RUN"), ("export", "RUN", "out")])
def test_a_folder_that_is_no_run_is_refused(here, verb):
    (here / "some").mkdir()
    for folder in ("some", "absent"):
        refuses(distill(*[folder if v == "RUN" else v for v in verb]), f"{folder} is not a run folder", "config.yaml")
    assert [p.name for p in here.iterdir()] == ["some"]


@pytest.mark.parametrize(
    "arguments",
    [("sample", "r", "a.png", "-n", "0"), ("eval", "r", "-n", "1"), ("trian",), ("train",), ("demo", "--steps", "0")],
)
def test_wrong_use_exits_2_with_a_hint(here, arguments):
    result = distill(*arguments)
    assert result.exit_code == 2 and "Error: " in result.stderr and "Traceback" not in result.output


# -- a real process -----------------------------------------------------------------------------------------------


def test_ctrl_c_ends_with_a_checkpoint_and_the_run_goes_on_as_if_it_had_not(here):
    keys = (*tiny.SMALL, "train.steps=1000000", "optim.student.decay=constant")
    command = [sys.executable, "-m", "distill.cli", "train", TEACHER, *keys]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    table, end = here / "runs" / "toy-teacher" / "metrics.csv", time.monotonic() + 120
    while not (table.exists() and table.read_text().count("\n") > 4):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "", err
    assert "Interrupted: ending after this step" in out and "--resume" in out
    found = checkpoints.complete(here / "runs" / "toy-teacher" / "checkpoints")
    assert len(found) == 1
    steps = int(found[0].name.removeprefix("step-"))
    more = ("optim.student.decay=constant", f"train.steps={steps + 3}")
    assert train(*more, "--resume").exit_code == 0
    assert train(*more, "--runs", "whole").exit_code == 0
    ends = [checkpoints.load(checkpoints.latest(Path(r) / "toy-teacher" / "checkpoints")) for r in ("runs", "whole")]
    assert ends[0]["step"] == steps + 3
    for part in ("networks", "optimizers", "random"):
        assert tiny.same(ends[0][part], ends[1][part]), part
    assert tiny.rows(here / "runs" / "toy-teacher") == tiny.rows(here / "whole" / "toy-teacher")


def test_a_closed_pipe_is_no_error():
    tree = str(Path(__file__).parents[1])
    command = f"{sys.executable} -m distill.cli recipes | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": tree}
    )
    assert done.returncode == 0 and "Errno" not in done.stderr

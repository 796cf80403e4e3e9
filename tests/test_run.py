"""The run layer with the real trainer: resume bit for bit, validation that disturbs nothing, failures without loss."""

from __future__ import annotations

import math
import os
import re
import signal
from pathlib import Path

import pytest
import tiny
import torch

from distill import config
from distill.config.schema import Optim
from distill.data.toy import Samples
from distill.errors import BadInput
from distill.inspect.measure import measure
from distill.methods.optim import learning_rate
from distill.training import checkpoints, records
from distill.training.experiment import build_experiment
from distill.training.load import load_experiment

# Two roles, a cosine, warm-up, a decay that looks at the last step, validation, and checkpoints on their own beat.
FULL = (
    "train.steps=10",
    "train.validate_every=4",
    "train.save_every=3",
    "method.warm_start=2",
    "optim.student.decay=cosine",
    "optim.critic.warmup=4",
)


@pytest.fixture(autouse=True, scope="module")
def cheap():
    """No test waits for a busy disk (test_checkpoint.py sees to that), and the threads are given back."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield
    torch.set_num_threads(before)


def newest(folder):
    return checkpoints.load(checkpoints.latest(folder / "checkpoints"))


def full(folder, *more, resume=False):
    return tiny.train(folder, *FULL, *more, name="tdm", resume=resume)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Ten steps at once."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    full(folder)
    return folder


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [5, 8])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(whole, tmp_path, monkeypatch, step):
    with monkeypatch.context() as m:
        tiny.after(m, step, tiny.interrupt)
        experiment = full(tmp_path / "run")
    assert experiment.method.step == step and newest(tmp_path / "run")["step"] == step
    torch.manual_seed(999)
    resumed = full(tmp_path / "run", resume=True)
    assert resumed.method.step == 10
    ours, theirs = newest(tmp_path / "run"), newest(whole)
    assert set(ours["networks"]) == {"student", "critic", "ema"}
    for part in ("step", "networks", "optimizers", "random"):
        assert tiny.same(ours[part], theirs[part]), part
    assert tiny.rows(tmp_path / "run") == tiny.rows(whole)


def test_a_crash_costs_the_steps_since_the_checkpoint_and_no_row_twice(whole, tmp_path, monkeypatch):
    def crash():
        raise RuntimeError("the machine is gone")

    with monkeypatch.context() as m:
        tiny.after(m, 8, crash)
        with pytest.raises(RuntimeError, match="machine is gone"):
            full(tmp_path / "run")
    assert newest(tmp_path / "run")["step"] == 6 and tiny.rows(tmp_path / "run")[-1]["step"] == "7"
    full(tmp_path / "run", resume=True)
    assert tiny.same(newest(tmp_path / "run")["networks"], newest(whole)["networks"])
    assert tiny.rows(tmp_path / "run") == tiny.rows(whole)


def test_rows_are_complete(whole):
    rows = tiny.rows(whole)
    trained = [r["step"] for r in rows if r["student/loss"]]
    validated = [r["step"] for r in rows if r["validation/energy"]]
    assert trained == [str(s) for s in range(1, 11)] and validated == ["0", "4", "8", "10"]


def test_a_run_stopped_before_its_first_checkpoint_resumes_from_the_start(whole, tmp_path, monkeypatch):
    def crash():
        raise RuntimeError("gone")

    with monkeypatch.context() as m:
        tiny.after(m, 2, crash)
        with pytest.raises(RuntimeError, match="gone"):
            full(tmp_path / "run")
    with pytest.raises(BadInput, match="already holds a run; add --resume"):
        full(tmp_path / "run")
    full(tmp_path / "run", resume=True)
    assert tiny.same(newest(tmp_path / "run")["networks"], newest(whole)["networks"])
    assert tiny.rows(tmp_path / "run") == tiny.rows(whole)


def test_more_steps_go_on_and_no_more_steps_change_nothing(tmp_path, capsys):
    tiny.train(tmp_path / "run", "train.steps=2", "optim.student.decay=constant")
    before = tiny.files(tmp_path / "run")
    experiment = tiny.train(tmp_path / "run", "train.steps=2", "optim.student.decay=constant", resume=True)
    assert experiment.method.step == 2 and tiny.files(tmp_path / "run") == before
    assert "raise train.steps to continue" in " ".join(capsys.readouterr().out.split())
    tiny.train(tmp_path / "run", "train.steps=4", "optim.student.decay=constant", resume=True)
    tiny.train(tmp_path / "four", "train.steps=4", "optim.student.decay=constant")
    assert tiny.same(newest(tmp_path / "run")["networks"], newest(tmp_path / "four")["networks"])


def test_another_recipe_is_refused_by_the_key_that_differs(whole):
    before = tiny.files(whole)
    for change, says in (
        ("method.grid=3", "method.grid is 3 but was 2"),
        ("seed=1", "seed is 1 but was 0"),
        ("roles.student.net.width=16", "roles.student.net.width is 16 but was 8"),
        ("data.seed=4", "data.seed is 4 but was None"),
    ):
        with pytest.raises(BadInput, match=says):
            full(whole, change, resume=True)
    assert tiny.files(whole) == before


def test_a_damaged_newest_checkpoint_stops_a_resume_with_the_mend(tmp_path):
    folder = tmp_path / "run"
    tiny.train(folder, "train.save_every=2", "train.steps=4")
    state = folder / "checkpoints" / "step-00000004" / "state.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 0xFF
    state.write_bytes(bytes(data))
    with pytest.raises(BadInput, match="step-00000004 cannot be read .* remove it to continue from step-00000002"):
        tiny.train(folder, "train.save_every=2", "train.steps=4", resume=True)
    state.write_bytes(bytes(data[:-1]))  # torn: passed over
    assert load_experiment(folder).method.step == 2


def test_checkpoints_of_other_networks_are_refused(tmp_path):
    tiny.train(tmp_path / "run", "train.steps=1")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("width: 8", "width: 16"))
    with pytest.raises(BadInput, match="the weights do not fit the networks of .*config.yaml"):
        load_experiment(tmp_path / "run")


# -- validation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "tdm", "consistency"])
def test_validation_does_not_disturb_the_run(tmp_path, name):
    ends = []
    for every in (0, 2):
        folder = tmp_path / str(every)
        tiny.train(folder, "method.warm_start=0", f"train.validate_every={every}", name=name)
        ends.append(newest(folder))
    assert tiny.same(ends[0]["networks"], ends[1]["networks"]) and tiny.same(ends[0]["random"], ends[1]["random"])


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(tmp_path):
    ends = [
        newest(tiny.train(tmp_path / n, s, "train.steps=2") and tmp_path / n)["networks"]
        for n, s in (("a", "seed=0"), ("b", "seed=0"), ("c", "seed=1"))
    ]
    assert tiny.same(ends[0], ends[1]) and not tiny.same(ends[0], ends[2])


# -- failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, says",
    [
        (("engine.accelerator=cuda",), "engine.accelerator"),
        (("optim.student.name=AdamWW",), "optim.student.name: torch.optim has no 'AdamWW'. Did you mean 'AdamW'"),
        (("optim.student.name=LBFGS",), "optim.student.name: LBFGS evaluates the loss several times"),
        (("optim.student.betas=[0.9, 2]",), "optim.student: torch.optim.AdamW refuses"),
        (
            (
                "eval.reference={_target_: distill.data.shards.Shards, path: nowhere, batch_size: 4}",
                "data={_target_: distill.data.toy.Conditions, shape: [2], classes: 0, batch_size: 4}",
            ),
            "holds no samples",
        ),
    ],
)
def test_a_failure_before_the_first_step_leaves_no_folder(tmp_path, monkeypatch, keys, says):
    if says == "engine.accelerator" and torch.cuda.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(BadInput, match=says):
        tiny.train(tmp_path / "run", *keys)
    assert list(tmp_path.iterdir()) == []


def test_a_second_interrupt_within_the_first_step_leaves_no_folder_and_no_handler(tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits "ignore"
    old = signal.getsignal(signal.SIGINT)
    inner = Samples.loader

    def loader(self, *args, **kw):
        tiny.interrupt(), tiny.interrupt()
        return inner(self, *args, **kw)

    monkeypatch.setattr(Samples, "loader", loader)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tmp_path / "run")
    now = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, old)
    assert now is old and list(tmp_path.iterdir()) == []


def test_the_loggers_are_closed_whatever_happens(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(records.MetricsFile, "close", lambda self: closed.append(1), raising=False)
    tiny.poison(monkeypatch, 2)
    with pytest.raises(BadInput):
        tiny.train(tmp_path / "run", "train.nonfinite_limit=1")
    assert closed == [1]


# -- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, says",
    [
        (("method._target_=null",), "^method._target_ is missing"),
        (("data._target_=null",), "^data._target_ is missing"),
        (("roles.student.net=5",), "^roles.student has no weights to train"),
        (("roles.student=5",), "^roles.student is not a network"),
        (("roles.student._target_=null",), "^roles.student._target_: None is not a dotted path"),
        (
            ("data={_target_: distill.noise.RectifiedFlow}",),
            "^data._target_: distill.noise.RectifiedFlow is not a Dataset",
        ),
        (("roles.student.net.dim=3",), r"holds samples of shape \(2,\), the network of student expects \(3,\)"),
        (("roles.student.net.classes=4", "data.classes=6"), "6 classes, the network of student expects 4"),
        (("method.grid=[0.9, 0.5, 0]",), r"^method: grid starts at 0\.9 but the student starts from noise"),
        (("roles.teacherr=${roles.student}",), "^roles.teacherr: Diffusion has no such role"),
        (("optim.critic.lr=1",), "^optim.critic: not a trainable role"),
        (
            ("data={_target_: distill.data.shards.Shards, path: data/dgits/train, batch_size: 4}",),
            "^data.path: data/dgits/train does not exist; make it by `distill data digits data/dgits`",
        ),
        (
            ("data={_target_: distill.data.shards.Shards, path: no/digits/train, batch_size: 4}",),
            "`distill data digits no/digits`",
        ),
        (
            ("data={_target_: distill.data.shards.Shards, path: no/cats/train, batch_size: 4}",),
            "`distill data images PHOTOS no/cats`",
        ),
        (
            ("data={_target_: distill.data.pairs.Pairs, path: no/pairs, batch_size: 4}",),
            "`distill data pairs CONFIG no/pairs`",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(keys, says):
    with pytest.raises(BadInput, match=says):
        build_experiment(tiny.recipe(*keys))


MISSING = "data={_target_: distill.data.shards.Shards, path: data/digits/train, batch_size: 4}"


@pytest.mark.parametrize(
    "key, says",
    [
        ("method.grd=4", "^Unknown key 'method.grd' .* Did you mean 'grid'"),
        ("method.ema=much", "^method.ema: expected float, got 'much'"),
        ("roles.student.net.widht=3", "^Unknown key 'roles.student.net.widht' .* Did you mean 'width'"),
        ("roles.studnt=${roles.student}", "^roles.studnt: Diffusion has no such role. Did you mean 'student'"),
        ("optim.studnt.lr=1", "^optim.studnt: not a trainable role. Did you mean 'student'"),
        ("data.batchsize=4", "^Unknown key 'data.batchsize' .* Did you mean 'batch_size'"),
        (
            "eval.reference={_target_: distill.data.shards.Shards, path: a, batch: 1}",
            "^Unknown key 'eval.reference.batch' .* Did you mean 'batch_size'",
        ),
    ],
)
def test_a_misspelt_key_is_named_before_missing_data_and_before_a_taken_folder(key, says, tmp_path):
    with pytest.raises(BadInput, match="^data.path: data/digits/train does not exist"):
        build_experiment(tiny.recipe(MISSING))
    with pytest.raises(BadInput, match=says):
        build_experiment(tiny.recipe(MISSING, key))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: run")
    with pytest.raises(BadInput, match="already holds a run"):
        tiny.train(tmp_path / "run", MISSING)
    with pytest.raises(BadInput, match=says):
        tiny.train(tmp_path / "run", MISSING, key)


def test_missing_data_are_answered_by_the_folder_that_was_meant_or_by_what_makes_their_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = ["data.batch_size=4", "eval.reference=null"]
    load = lambda *keys: build_experiment(config.load(["digits/consistency"], [*recipe, *keys]))  # noqa: E731
    for path, command in {
        "data/digit/train": "digits data/digit`",  # pixels of the digits' teacher: never encoded by a pipeline
        "data/cats/train": "images PHOTOS data/cats`",
    }.items():
        with pytest.raises(BadInput, match=f"^data.path: {path} does not exist; make it by `distill data {command}"):
            load(f"data.path={path}")
    text = "roles.teacher={_target_: distill.models.diffusers.load, path: some/body}"
    with pytest.raises(BadInput, match="`distill data encode SOURCE data/cats --pipeline some/body`"):
        load("data.path=data/cats/train", text)
    (tmp_path / "data" / "digits" / "train").mkdir(parents=True)
    with pytest.raises(BadInput, match="^data.path: data/digit/trian does not exist. Did you mean 'data/digits/train'"):
        load("data.path=data/digit/trian")


def test_a_misspelt_checkpoint_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    """Of the package, of the user, and one that is near to nothing, which the hub may have."""
    from distill.models.diffusers import folder

    asked = []
    monkeypatch.setattr(folder, "_download", lambda name, *_: asked.append(name))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="checkpoints/digit-teacher .* Did you mean 'checkpoints/digits-teacher'"):
        folder.folder_of("checkpoints/digit-teacher")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    with pytest.raises(BadInput, match="models/mien is not a diffusers folder.* Did you mean 'models/mine'"):
        folder.folder_of("models/mien")
    assert asked == []
    folder.folder_of("checkpoints/flux")
    assert asked == ["checkpoints/flux"]


@pytest.mark.parametrize("key", ["roles", "method", "data"])
def test_an_empty_part_points_to_a_recipe(key):
    cfg = tiny.recipe()
    cfg[key] = {}
    with pytest.raises(BadInput, match=f"no '{key}'; start from one in configs/"):
        build_experiment(cfg)


def test_the_folder_must_be_the_runs_own(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("also")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(BadInput, match=f"{name} exists and is not a run"):
            tiny.train(tmp_path / name)
    with pytest.raises(BadInput, match="absent holds no run to resume; leave out --resume"):
        tiny.train(tmp_path / "absent", resume=True)
    with pytest.raises(BadInput, match="full is not a run folder: it has no config.yaml"):
        load_experiment(tmp_path / "full")
    assert sorted(tiny.files(tmp_path)) == ["empty", "file", "full", "full/thesis.tex"]
    tiny.train(tmp_path / "empty", "train.steps=1")


def test_a_toy_is_measured_against_its_law_and_conditions_need_data():
    experiment = build_experiment(tiny.recipe())
    assert experiment.suite().headline == "energy" and experiment.teacher is experiment.method.ema
    z, cond = experiment.noise(4, 1)
    assert z.shape == (4, 2) and cond == {}
    conditions = "{_target_: distill.data.toy.Conditions, shape: [2], classes: 0, batch_size: 4}"
    with pytest.raises(BadInput, match="Diffusion trains on them"):
        build_experiment(tiny.recipe(f"data={conditions}"))
    alone = build_experiment(tiny.recipe(f"data={conditions}", name="tdm"))
    with pytest.raises(BadInput, match="conditions but no samples"):
        alone.suite()


def test_noise_is_fixed_and_labels_are_balanced():
    experiment = build_experiment(tiny.recipe(name="guidance"))
    (a, cond), (b, _), (c, _) = experiment.noise(12, 1), experiment.noise(12, 1), experiment.noise(12, 2)
    assert torch.equal(a, b) and not torch.equal(a, c) and cond["label"].bincount().tolist() == [2] * 6


# -- learning rate ----------------------------------------------------------------------------------------------------


def test_warm_up_and_cosine_have_their_values():
    flat, warm, cosine = Optim(), Optim(warmup=4), Optim(decay="cosine")
    assert [learning_rate(flat, s, 10) for s in (0, 5, 99)] == [1, 1, 1]
    assert [learning_rate(warm, s, 10) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    expected = [1, 0.5 * (1 + math.cos(math.pi * 0.3)), 0.5, 0, 0]
    assert [learning_rate(cosine, s, 10) for s in (0, 3, 5, 10, 99)] == pytest.approx(expected, abs=1e-12)
    both = Optim(warmup=4, decay="cosine")
    assert learning_rate(both, 1, 4) == pytest.approx(0.5 * 0.5 * (1 + math.sqrt(0.5)))
    assert learning_rate(cosine, 3, 0) == 1  # no end known


def test_the_factor_reaches_the_optimizer(tmp_path):
    keys = ("train.steps=4", "optim.student.lr=1e-3", "optim.student.warmup=2", "optim.student.decay=cosine")
    tiny.train(tmp_path / "run", *keys)
    last = 1e-3 * 0.5 * (1 + math.cos(math.pi * 3 / 4))
    assert newest(tmp_path / "run")["optimizers"]["student"]["param_groups"][0]["lr"] == pytest.approx(last)


def test_the_saved_config_is_the_resolved_one_and_its_hash_is_in_the_checkpoint(whole):
    cfg = config.read(whole / "config.yaml")
    assert "${" not in (whole / "config.yaml").read_text() and cfg.train.steps == 10
    manifest = (checkpoints.latest(whole / "checkpoints") / "manifest.json").read_text()
    assert config.fingerprint(config.checked(cfg)) in manifest


def test_the_best_training_free_row_holds_only_what_every_solver_was_measured_on(tmp_path):
    result, _ = measure(tiny.train(tmp_path / "run"), samples=200, evaluations=(2,), every_solver=(2,))
    names = {frozenset(scores) for scores in result["every_solver"]["2"].values()}
    assert len(names) == 1 and len(result["every_solver"]["2"]) > 1
    assert set(result["training_free"]["2"]) == set(next(iter(names))) < set(result["teacher"]["2"])


def test_the_readmes_program_is_fifteen_lines_of_a_stock_trainer():
    """tests/test_docs.py runs it."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    program = re.search(r"```python\nimport lightning\n(.*?)```", text, re.S).group(1)
    code = [line for line in program.splitlines() if line.strip()]
    assert len(code) + 1 <= 16 and "lightning.Trainer(max_steps=" in program and ".fit(method, data)" in program

"""YAML and overrides to objects: strict at every level, and a sentence for each mistake."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
import types
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from distill import config
from distill.config import schema
from distill.errors import BadInput, suggest

HERE = __name__  # the package that the tests allow


class Part:
    def __init__(self, size: int, ratio: float = 0.5, name: str | None = None, on: bool = False, anything=None):
        self.size, self.ratio, self.name, self.on, self.anything = size, ratio, name, on, anything


class Special(Part):
    def __init__(self, extra: int = 0, **kw):
        super().__init__(**kw)
        self.extra = extra


class Owner:
    def __init__(self, parts: list, roles: dict | None = None):
        self.parts, self.roles = parts, roles


class Picky:
    def __init__(self, sizes):
        if sizes == "refuse":
            raise BadInput("sizes are refused: give others.")
        self.sizes = [s + 1 for s in sizes]


def stock(kind: str, **settings):
    if "bad" in settings:
        raise TypeError("stock has no 'bad'")
    return kind, settings


def make(cls: str, where: str = "top", **keys):
    return config.build({"_target_": f"{HERE}.{cls}", **keys}, (HERE.split(".")[0],), where)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path):
    write(tmp_path / "tdm.yaml", "")
    with pytest.raises(BadInput, match=r"tdn\.yaml does not exist\. Did you mean 'tdm\.yaml'"):
        config.load([tmp_path / "tdn.yaml"])


@pytest.mark.parametrize(
    "text, says",
    [
        ("a: {null: 1}", 'Write a key called null in quotes, "null"'),
        ("a: [1", "not valid YAML"),
        ("- 1", "mapping of keys"),
        ("5", "not valid YAML"),
        ("a: 1\na: 2", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_in_one_line(tmp_path, text, says):
    with pytest.raises(BadInput, match=says) as caught:
        config.load([write(tmp_path / "a.yaml", text)])
    assert "a.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_file_gives_the_defaults(tmp_path):
    cfg = config.load([write(tmp_path / "a.yaml", "")])
    assert cfg.name == "run" and cfg.train.steps == 1000 and cfg.optim == {}


def test_bases_chain_and_later_ones_win_and_the_file_wins_over_all(tmp_path):
    write(tmp_path / "root.yaml", "name: root\nseed: 1\ntrain: {steps: 1, keep: 1, threads: 1, log_every: 1}")
    write(tmp_path / "deep" / "left.yaml", "base: ../root.yaml\ntrain: {keep: 2, threads: 2, log_every: 2}")
    write(tmp_path / "right.yaml", "train: {threads: 3, log_every: 3}")
    top = write(tmp_path / "top.yaml", "base: [deep/left.yaml, right.yaml]\ntrain: {log_every: 4}")
    last = write(tmp_path / "last.yaml", "seed: 5\ntrain: {save_every: 5}")
    cfg = config.load([top, last], ["train.validate_every=6"])
    train = cfg.train
    assert (train.steps, train.keep, train.threads, train.log_every, train.save_every) == (1, 2, 3, 4, 5)
    assert train.validate_every == 6 and cfg.name == "root" and cfg.seed == 5 and "base" not in cfg


def test_a_base_that_is_missing_or_its_own_or_no_path_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"nope\.yaml does not exist"):
        config.load([write(tmp_path / "a.yaml", "base: nope.yaml")])
    write(tmp_path / "b.yaml", "base: c.yaml")
    with pytest.raises(BadInput, match=r"c\.yaml is its own base, by way of .*b\.yaml"):
        config.load([write(tmp_path / "c.yaml", "base: b.yaml")])
    with pytest.raises(BadInput, match=r"base in .*d\.yaml must be a path"):
        config.load([write(tmp_path / "d.yaml", "base: 5")])


def test_a_new_target_drops_the_old_ones_keys_and_the_same_target_keeps_them():
    below = OmegaConf.create({"m": {"_target_": "distill.A", "x": 1, "deep": {"y": 2}}})
    merged = config.merge(below, OmegaConf.create({"m": {"_target_": "distill.B", "z": 3}}))
    assert merged == {"m": {"_target_": "distill.B", "z": 3}}
    kept = config.merge(below, OmegaConf.create({"m": {"_target_": "distill.A", "deep": {"w": 4}}}))
    assert kept == {"m": {"_target_": "distill.A", "x": 1, "deep": {"y": 2, "w": 4}}}
    silent = config.merge(below, OmegaConf.create({"m": {"x": 5}}))
    assert silent.m == {"_target_": "distill.A", "x": 5, "deep": {"y": 2}}


def test_an_override_of_a_target_alone_names_the_keys_that_it_drops(recwarn):
    from click.testing import CliRunner

    from distill.cli import main

    config.load(["toy/tdm"], ["method._target_=distill.methods.TDM"])  # the same class
    config.load(["toy/tdm"], ["method={_target_: distill.methods.PCM, grid: 2}"])  # a mapping of the user's own
    config.load(["toy/pcm"], ["method._target_=distill.methods.TDM", *kept(config.load(["toy/pcm"]).method)])
    assert not recwarn.list
    old = config.load(["toy/tdm"]).method
    names = [name for name in old if name not in ("_target_", "grid")]
    cfg = config.load(["toy/tdm"], ["method._target_=distill.methods.PCM", "method.grid=2"])
    assert cfg.method == {"_target_": "distill.methods.PCM", "grid": 2} and names
    says = (
        f"method._target_=distill.methods.PCM drops the keys of distill.methods.TDM: {', '.join(names)}; write "
        "method.KEY=VALUE for those to keep."
    )
    assert [str(w.message) for w in recwarn.list] == [says]
    run = lambda *keys: CliRunner().invoke(main, ["plan", "toy/tdm", *keys]).stderr.splitlines()  # noqa: E731
    found = run("method._target_=distill.methods.PCM", "method.grid=2", "method.gird=2")
    assert found[0] == f"distill: {says}" and "Unknown key 'method.gird'" in found[1]
    assert len(run("method._target_=distill.methods.Nope")) == 1  # refused


def kept(method) -> list[str]:
    return [f"method.{name}=1" for name in method if name != "_target_"]


def test_overrides_take_numbers_lists_mappings_null_and_equals_signs(tmp_path):
    keys = [
        "seed=3",
        "optim.student.lr=1e-4",
        "eval.evaluations=[1, 4]",
        "method={a: 1, b: {c: x}}",
        "data.url=a=b",
        "eval.reference=null",
        "roles.t.list=[[1.0, 2], 3]",
        "name=true",
    ]
    cfg = config.load([], keys)
    assert cfg.seed == 3 and cfg.optim.student.lr == 1e-4 and cfg.eval.evaluations == [1, 4]
    assert cfg.method == {"a": 1, "b": {"c": "x"}} and cfg.data.url == "a=b" and cfg.eval.reference is None
    assert cfg.roles.t.list == [[1.0, 2], 3] and cfg.optim.student.name == "AdamW"


def test_interpolations_are_resolved_in_what_is_loaded():
    cfg = config.load([], ["roles.a={x: 1}", "roles.b=${roles.a}"])
    assert cfg.roles.b == {"x": 1} and "${" not in OmegaConf.to_yaml(cfg)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:SECRET}",
        "pre-${oc.env:SECRET}-fix",
        "${oc.env:SECRET,none}",
        "${ oc.env:SECRET }",
        "${${name}:SECRET}",
        "${oc.decode:${oc.env:SECRET}}",
        "${oc.decode:'${roles.b}'}",
        "${oc.create:'a'}",
    ],
)
def test_resolvers_that_read_the_environment_are_refused(value, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    file = write(tmp_path / "a.yaml", f'name: oc.env\nroles: {{a: "{value}"}}')
    with pytest.raises(BadInput, match=r"a\.yaml: roles\.a uses '\$\{.*:\.\.\.\}', which configs may not") as caught:
        config.load([file])
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="which configs may not"):
        config.checked(OmegaConf.create({"roles": {"a": [value]}}))


def test_an_override_reads_the_environment_as_a_shell_would(monkeypatch):
    monkeypatch.setenv("TRIAL", "a7")
    assert config.load([], ["name=sweep-${oc.env:TRIAL}"]).name == "sweep-a7"
    with pytest.raises(BadInput, match="^name: the environment variable UNSET is not set"):
        config.load([], ["name=${oc.env:UNSET}"])
    for value in ("${${name}:TRIAL}", "${oc.decode:${oc.env:TRIAL}}", "${oc.env:TRIAL,none}"):
        with pytest.raises(BadInput, match="which configs may not") as caught:
            config.load([], [f"roles.a={value}"])
        assert "a7" not in str(caught.value)


def test_a_base_may_not_read_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    with pytest.raises(BadInput, match="which configs may not"):
        config.load([write(tmp_path / "a.yaml", "base: ${oc.env:SECRET}")])


def test_select_with_a_default_and_colons_beside_references_stay():
    cfg = config.load([], ["name=a", "roles.x=${oc.select:roles.none,3}", "roles.y=${name}:${name}"])
    assert cfg.roles.x == 3 and cfg.roles.y == "a:a"


# -- keys and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, says",
    [
        ("trian.steps=3", "Unknown key 'trian'. Did you mean 'train'"),
        ("train.step=3", "Unknown key 'train.step'. Did you mean 'steps'"),
        ("optim.student.lrr=3", "Unknown key 'optim.student.lrr'. Did you mean 'lr'"),
        ("eval={samplse: 3}", "Unknown key 'eval.samplse'. Did you mean 'samples'"),
        ("log.wandbb=x", "Unknown key 'log.wandbb'. Did you mean 'wandb'"),
        ("train.steps=abc", "train.steps: Value 'abc'"),
        ("train.steps=1.5", "train.steps: Value '1.5'"),
        ("train.steps=", "train.steps: Incompatible value 'None'"),
        ("optim.student.lr=fast", "optim.student.lr: Value 'fast'"),
        ("optim.student.betas=[a]", "optim.student.betas"),
        ("train=5", "train: expected keys of its own, got 5"),
        ("optim=5", "optim: expected keys of its own"),
        ("optim.student=5", "optim.student: expected keys of its own"),
        ("roles=[1]", "roles: expected keys of its own"),
        ("eval.evaluations=3", "eval.evaluations: expected a list, got 3; write [3]"),
        ("optim.student.betas=0.9", "optim.student.betas: expected a list, got 0.9; write [0.9, 0.99]"),
        ("eval.evaluations=[]", "eval.evaluations"),
        ("eval.evaluations=[0]", "eval.evaluations"),
        ("train.steps=0", "train.steps: 0 must be 1 or more"),
        ("train.log_every=0", "train.log_every: 0 must be 1 or more"),
        ("optim.student.lr=.nan", "optim.student.lr: nan"),
        ("optim.student.lr=-1", "optim.student.lr: -1"),
        ("optim.student.decay=cosin", "decay: 'cosin' must be one of constant, cosine. Did you mean 'cosine'"),
        ("log.wandb=onlin", "log.wandb: 'onlin' must be one of auto, online, offline, disabled"),
        ("engine.precision=fp16", "engine.precision: 'fp16'"),
        ("name=''", "name: give the run a name"),
        ("name=../x", "name: '../x' is outside the folder of runs"),
        ("name=/x", "name: '/x' is outside the folder of runs"),
        ("roles.x=${nope.y}", "roles.x: Interpolation key 'nope.y' not found"),
        ("train.steps", "must have the form key=value"),
        ("=3", "must have the form key=value"),
        ("train..steps=3", "must have the form key=value"),
        ("train.steps=[1", "has a value that is not YAML"),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence_with_its_full_key(override, says):
    with pytest.raises(BadInput) as caught:
        config.load([], [override])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_saved_configs_read_back_equal_and_the_fingerprint_is_of_the_content(tmp_path):
    cfg = config.load([], ["optim.student.lr=1e-5", "method.a=[1, 2.5e-7]", "seed=3"])
    config.save(cfg, tmp_path / "config.yaml")
    again = config.checked(config.read(tmp_path / "config.yaml"))
    assert again == cfg and config.fingerprint(again) == config.fingerprint(cfg)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert config.fingerprint(config.load([], ["seed=4"])) != config.fingerprint(config.load([], ["seed=5"]))


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, says",
    [
        ("os.remove", "'os.remove' is outside distill; allow its package by name with --allow os"),
        ("distill.noise.torch.load", "comes from outside distill.*--allow torch"),
        ("distill.data.toy.Path", "no 'Path'|comes from outside distill"),
        ("distill.times.math.sqrt", "neither a class nor a function"),
        ("distill.methods.TDMM", "'distill.methods' has no 'TDMM'. Did you mean 'TDM'"),
        ("distill.methodz.TDM", "'distill.methodz.TDM' cannot be used in a config.*Did you mean 'methods'"),
        ("distill.noise", "neither a class nor a function"),
        ("distill", "not a dotted path"),
        ("distill..noise", "not a dotted path"),
        ("distill.solvers.SOLVERS", "neither a class nor a function"),
    ],
)
def test_only_our_own_classes_and_functions_resolve(name, says):
    with pytest.raises(BadInput, match=f"^method._target_: .*({says})"):
        config.build({"_target_": name}, (), "method")


HOSTILE = [  # each wrote, deleted or executed something, or would allow a config to
    "distill.config.build",
    "distill.config.objects._call",
    "distill.config.importlib.import_module",
    "distill.config.save",
    "distill.cli.__main__.main",
    "distill.cli.main",
    "distill.training.records.Alarms",
    "distill.training.run.train",
    "distill.training.run.os.remove",
    "distill.inspect.plan.skeleton.build",
    "distill.inspect.results.export_run",
    "distill.export.export",
    "distill.files.write_text",
    "distill.errors.suggest",
    "distill.noise.BadInput",
    "distill.metrics.features.network",
    "distill.metrics.features.config.build",
    "distill.metrics.features._save",
    "distill.metrics.named.Measures",
    "distill.metrics.suite.ImageSuite",
    "distill.metrics.latents.LatentSuite",
    "distill.metrics.table.write",
    "distill.data.prepare.digits",
    "distill.data.pairs.write",
    "distill.methods.TDM.load_from_checkpoint",
    "distill.methods.TDM.__init__.__globals__",
    "distill.models.small.MLP.__class__",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_only_parts_of_a_run_may_be_named(name, tmp_path):
    """A config is text from strangers: it may build networks, data and methods, and do nothing else."""
    victim = write(tmp_path / "victim", "mine")
    file = write(tmp_path / "hostile.yaml", f"data: {{_target_: {name}, path: {victim}}}")
    with pytest.raises(
        BadInput, match="^data._target_: .*(cannot be used in a config|is private|outside distill|is not a )"
    ):
        config.build(config.load([file]).data, (), "data")
    assert victim.read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == ["hostile.yaml", "victim"]


def defined(room: str):
    """(module, name, object) of every class and function that the modules of a package define."""
    package = importlib.import_module(f"distill.{room}")
    for found in pkgutil.walk_packages(package.__path__, f"distill.{room}."):
        for name, value in vars(importlib.import_module(found.name)).items():
            if isinstance(value, (type, types.FunctionType)) and value.__module__ == found.name:
                yield found.name, name, value


@pytest.mark.parametrize("room", ["data", "metrics", "models", "methods"])
def test_what_reads_and_writes_files_may_not_be_named(room):
    """Every function but the loader of teachers, and of distill.data every class that is not a source of batches."""
    refused = 0
    for module, name, value in defined(room):
        if f"{module}.{name}" == "distill.models.diffusers.loading.load":
            continue
        if isinstance(value, types.FunctionType) or (room == "data" and not hasattr(value, "loader")):
            with pytest.raises(BadInput, match="cannot be used in a config|is private|is not a "):
                config.resolve(f"{module}.{name}")
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "name",
    [
        "distill.data.toy.Samples",
        "distill.data.shards.Shards",
        "distill.data.pairs.Pairs",
        "distill.denoise.GaussianMixture.ring",
        "distill.methods.TDM",
        "distill.metrics.rewards.Ink",
        "distill.metrics.networks.vision.InceptionFeatures",
        "distill.models.diffusers.load",
        "distill.noise.Table.of",
    ],
)
def test_parts_of_a_run_resolve(name):
    assert callable(config.resolve(name))


def test_an_allowed_package_does_not_pass_on_what_it_imported(tmp_path, monkeypatch):
    write(tmp_path / "lending" / "__init__.py", "import os\nfrom distill.config import build\nclass Mine:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert type(config.build({"_target_": "lending.Mine"}, ("lending",))).__name__ == "Mine"
    for name, says in (("os.system", "--allow"), ("build", "cannot be used in a config"), ("__loader__", "is private")):
        with pytest.raises(BadInput, match=says):
            config.build({"_target_": f"lending.{name}"}, ("lending",))


def test_a_target_that_is_no_text_is_refused():
    with pytest.raises(BadInput, match="a._target_: 5 is not a dotted path"):
        config.build({"a": {"_target_": 5}})


def test_an_allowed_package_resolves():
    assert config.build({"_target_": "string.Template", "template": "a"}, ("string",)).template == "a"
    with pytest.raises(BadInput, match="--allow string"):
        config.build({"_target_": "string.Template", "template": "a"}, ("stringprep",))


# -- objects ---------------------------------------------------------------------------------------------------------


def test_objects_nest_in_lists_and_mappings():
    part = {"_target_": f"{HERE}.Part", "size": 2}
    owner = make("Owner", parts=[part, {"plain": part}], roles={"a": part})
    assert owner.parts[0].size == owner.parts[1]["plain"].size == owner.roles["a"].size == 2


@pytest.mark.parametrize(
    "broken, says",
    [
        ({"sise": 2}, "Unknown key 'top.parts[1].deep.sise' for .*Did you mean 'size'"),
        ({}, "Missing key 'top.parts[1].deep.size' for"),
        ({"size": "a"}, "top.parts[1].deep.size: expected int, got 'a' of type str"),
    ],
)
def test_an_error_deep_inside_carries_its_full_key(broken, says):
    deep = {"_target_": f"{HERE}.Part", **broken}
    with pytest.raises(BadInput, match=says.replace("[", r"\[").replace("]", r"\]")):
        make("Owner", parts=[1, {"deep": deep}])


@pytest.mark.parametrize(
    "key, value, holds",
    [
        ("size", 3, True),
        ("size", 3.0, False),
        ("size", True, False),
        ("size", None, False),
        ("size", [3], False),
        ("ratio", 1, True),
        ("ratio", "1", False),
        ("ratio", True, False),
        ("name", None, True),
        ("name", "a", True),
        ("name", 5, False),
        ("on", True, True),
        ("on", 1, False),
        ("anything", {"a": [1]}, True),
    ],
)
def test_plain_annotations_are_checked(key, value, holds):
    keys = {"size": 1} | {key: value}
    if holds:
        assert getattr(make("Part", **keys), key) == value
    else:
        with pytest.raises(BadInput, match=rf"^top\.{key}: expected .*got {value!r}".replace("[", r"\[")):
            make("Part", **keys)


def test_whole_numbers_become_floats_where_a_float_is_expected():
    assert isinstance(make("Part", size=1, ratio=2).ratio, float)


def test_a_class_with_keywords_takes_those_of_its_base_and_no_others():
    assert make("Special", size=3, extra=1).size == 3
    with pytest.raises(BadInput, match="Unknown key 'top.sizee'.*Did you mean 'size'"):
        make("Special", size=3, sizee=1)


def test_a_function_with_keywords_checks_them_itself():
    assert make("stock", kind="a", beta=1) == ("a", {"beta": 1})
    with pytest.raises(BadInput, match="^top: stock refuses kind, bad: stock has no 'bad'"):
        make("stock", kind="a", bad=1)
    with pytest.raises(BadInput, match="top.kind: expected str"):
        make("stock", kind=5)


def test_what_an_object_refuses_carries_the_key():
    with pytest.raises(BadInput, match="^top.inner: sizes are refused"):
        config.build({"inner": {"_target_": f"{HERE}.Picky", "sizes": "refuse"}}, (HERE,), "top")
    with pytest.raises(BadInput, match="^top: Picky refuses sizes: 'int' object is not iterable"):
        make("Picky", sizes=5)


def test_given_arguments_are_not_the_configs_to_set():
    with pytest.raises(BadInput, match="Unknown key 'top.size'"):
        config.build({"_target_": f"{HERE}.Part", "size": 1}, (HERE,), "top", size=2)
    assert config.build({"_target_": f"{HERE}.Part"}, (HERE,), "top", size=2).size == 2


@pytest.mark.parametrize(
    "old, new",
    [
        ("distill.nets.diffusers.load", "distill.models.diffusers.load"),
        ("distill.nets.diffusers.backbones.DiT", "distill.models.diffusers.DiT"),
        ("distill.models.families.label.UNet2D", "distill.models.diffusers.UNet2D"),
        ("distill.nets.rewards.Ink", "distill.metrics.rewards.Ink"),
        ("distill.grid.Uniform", "distill.times.Uniform"),
    ],
)
def test_a_path_of_an_older_config_is_refused_with_the_new_one(old, new):
    with pytest.raises(BadInput, match=rf"'{old}' is now {new};"):
        config.resolve(old)
    assert config.resolve(new)


def test_a_package_in_this_folder_is_named(tmp_path, monkeypatch):
    """Which `python -m` would find, but the command `distill` does not."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="'nearby' is not installed; install it, or correct"):
        config.resolve("nearby.Thing", ("nearby",))
    (tmp_path / "nearby.py").write_text("")
    with pytest.raises(BadInput, match="'nearby' is not installed; put PYTHONPATH=. before the command, or install it"):
        config.resolve("nearby.Thing", ("nearby",))


def test_every_moved_module_exists():
    for new in schema.MOVED_MODULES.values():
        assert importlib.util.find_spec(new), new


def test_every_moved_object_is_found_under_its_new_name():
    for old, new in schema.MOVED_OBJECTS.items():
        message = new if " " in new else f"is now {new}; write it so." if new else "was removed; leave it out."
        with pytest.raises(BadInput, match=re.escape(f"'{old}' {message}")):
            config.resolve(old)
        assert " " in new or not new or config.resolve(new)
    for old in ("distill.nets.rewards.Truth", "distill.metrics.rewards.Truth"):
        with pytest.raises(BadInput, match=r"was removed; name a callable metric\(x, data=, \*\*cond\) of your own"):
            config.resolve(old)


def test_arguments_of_an_older_config_are_refused_with_the_new_ones():
    tensors = {"_target_": "distill.data.toy.Tensors", "shape": [2], "told": {"text": [4]}}
    with pytest.raises(BadInput, match="'data.told' of distill.data.toy.Tensors is now conditions; write it so"):
        config.build(tensors, (), "data")
    with pytest.raises(BadInput, match="'method.same_noise' of distill.methods.LADD was removed; leave it out"):
        config.build({"_target_": "distill.methods.LADD", "same_noise": True}, (), "method")
    for method, weight in {"Guidance": "max(SNR, 1)", "Reflow": "that of the error in z - x"}.items():
        message = f"'method.weight' of distill.methods.{method} was removed; leave it out, the weight is {weight}."
        with pytest.raises(BadInput, match=re.escape(message)):
            config.build({"_target_": f"distill.methods.{method}", "weight": "x"}, (), "method")
    with pytest.raises(
        BadInput, match="'method.clamp' of distill.methods.MMD was removed; clip the samples in the forw"
    ):
        config.build({"_target_": "distill.methods.MMD", "clamp": True}, (), "method")
    for (target, _), new in schema.MOVED_ARGUMENTS.items():
        assert not new or " " in new or new in config.signature(config.resolve(target))


@pytest.mark.parametrize("value", ["off", "False", "'off'", "disabled"])
def test_wandb_is_off(value):
    """Also as YAML's false, which `off` is without quotes."""
    assert config.load(["toy/tdm"], [f"log.wandb={value}"]).log.wandb == "disabled"


@pytest.mark.parametrize("name", ["digits/tdm", "sd15/lcm_lora"])
def test_a_printed_recipe_is_a_config_in_any_folder(name, tmp_path, monkeypatch):
    from distill.config import recipes

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(recipes.text(name))
    assert config.load(["mine.yaml"]) == config.load([name])


@pytest.mark.parametrize(
    "name, near",
    [("weak", ""), ("ahead", ""), ("wraps", ""), ("emma", "ema"), ("gird", "grid"), ("guidence", "guidance")],
)
def test_a_name_is_suggested_only_where_most_letters_agree(name, near):
    known = ["roles", "grid", "guidance", "optim", "ema", "averages", "warm_start"]
    assert suggest(name, known) == (f" Did you mean '{near}'?" if near else "")

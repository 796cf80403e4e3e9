"""Runs the code blocks of README.md, CONTRIBUTING.md and docs/, page by page, as a reader would.

The blocks of a page run in order in one temporary folder, which starts with the files that `reader.PAGES` lists:

    ```bash    `distill ...` runs in this process, other lines in bash; those that install or need an account (TOOLS) do not
    ```python  runs; the blocks of a page share their names
    ```toml    names the entry point of plugins
    ```yaml    with keys of a run: keys, types and the arguments of every `_target_` are checked

So that a page takes seconds, `small` lowers numbers of steps and samples after the config was read and checked, FEWER
adds options to some verbs, and MODELS replaces ids of published models by their tiny twins. Everything else is as written:
an unknown option or key fails here as it fails for a reader.

A comment on the line above a block says why it is not run: `<!-- needs: accelerator -->`, `<!-- needs: network -->`,
or `<!-- needs: weights -->` (published ones, or a run on them). Its `distill` commands are still parsed and the keys of
their configs checked, its Python is compiled and what it imports from `distill` is looked up. `<!-- file: NAME -->` saves the
block to that file first.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import lightning
import pytest
import torch
import yaml
from click.testing import CliRunner
from omegaconf import OmegaConf
from reader import Library

from distill import config
from distill.cli import main
from distill.config import plugins, schema
from distill.errors import BadInput
from distill.models.diffusers import FAMILIES

ROOT = Path(os.environ.get("DISTILL_DOCS_ROOT", Path(__file__).parents[1]))
TOP = ("README.md", "CONTRIBUTING.md", "checkpoints/README.md")
PAGES = [p for p in TOP if (ROOT / p).exists()] + sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))
SLOW = {
    "docs/benchmarks.md",
    "docs/export.md",
    "docs/howto/sweep.md",
    "docs/methods/README.md",
    "docs/methods/ayf.md",
    "docs/methods/meanflow.md",
    "docs/methods/scm.md",
    "docs/plan.md",
    "docs/recipes.md",
    "docs/report.md",
    "docs/tutorials/first-student.md",
}
MARK = re.compile(r"<!-- (?:needs: (accelerator|network|weights)|file: (\S+)) -->")
VALIDATED = ("docs/dashboard.md",)  # pages whose runs validate at each step, as their blocks draw it
GENERATED = re.compile(
    r"(^|/)(index|changelog|contributing)\.md$|(^|/)reference/(config|cli|map|api/)|pictures/first_student\.png$"
)

MODELS = {  # ids of published models and folders of them -> tiny twins
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "tiny:sd15",
    "checkpoints/stable-diffusion-v1-5": "tiny:sd15",
    "THUDM/CogVideoX-2b": "tiny:cogvideox",
    "THUDM/CogVideoX-5b-I2V": "tiny:cogvideox_i2v",
}
SHORTER = {  # parts of commands that take hours -> the same for one or two recipes
    "compare configs/digits/*.yaml": "compare configs/digits/tdm.yaml configs/digits/mmd.yaml",
    "tests/robustness.py tdm dmd2 sid mmd ladd dpo diffusion_dpo diversity curation --factors 0.333 1 3 --seeds 0 1 2": (
        f"{ROOT}/tests/robustness.py tdm --factors 1 --seeds 0"
    ),
}
PLACEHOLDER = "toy/tdm"  # for CONFIG, where a command takes any
TOOLS = {"docker", "make", "pip", "pre-commit", "source", "wandb"}  # of make, the target is looked up
FEWER = {  # verb -> options that make it quick
    "bench": ["--steps", "1"],
    "compare": ["--seconds", "1"],
    "data pairs": ["-n", "32"],
    "demo": ["--steps", "2"],
    "eval": ["-n", "64"],
    "merge": ["--samples", "64"],
    "report": ["-n", "64", "--evaluations", "2"],
    "sample": ["-n", "4"],
    "train": ["--no-check"],  # `distill check` is run where a page shows it
}
ELSEWHERE = {
    "demo": "tests/test_demo.py",
    "verify": "tests/export",
}  # verbs that take minutes and have tests of their own
MOST = {  # config key -> its largest value
    "data.batch_size": 32,
    "engine.devices": 1,
    "eval.samples": 64,
    "eval.validation_samples": 32,
    "method.warm_start": 1,
    "train.patience": 0,
    "train.save_every": 0,
    "train.steps": 2,
    "train.validate_every": 0,
}


def small(cfg):
    """The config with few steps and samples, and without a dashboard's account."""
    for key, most in MOST.items():
        value = OmegaConf.select(cfg, key)
        if isinstance(value, int) and value > most:
            OmegaConf.update(cfg, key, most)
    cfg.eval.evaluations = cfg.eval.evaluations[:1]
    cfg.log.wandb, cfg.expect = "disabled", {}
    return cfg


def make_small(patch) -> None:
    """`config.load` and `lightning.Trainer` with `small` and few steps; `distill compare` takes four a second."""
    load, init = config.load, lightning.Trainer.__init__

    def few_steps(self, *args, **options):
        options["max_steps"] = min(options.get("max_steps", -1), 8)  # of which `distill bench` takes seven
        init(self, *args, **options)

    patch.setattr("distill.inspect.compare.seconds_a_step", lambda *args: 0.25)
    patch.setattr(config, "load", lambda *args, **options: small(load(*args, **options)))
    patch.setattr(lightning.Trainer, "__init__", few_steps)


# -- blocks -----------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """A fenced code block."""

    language: str
    text: str
    line: int  # of its fence
    mark: str  # what it needs; empty if it is run
    file: str = ""  # where a reader is told to save it


def blocks(page: Path) -> list[Block]:
    """The bash, python and yaml blocks of a page, with the comment above each."""
    found, lines = [], page.read_text().splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"(\s*)```(\w+)\s*$", lines[number])
        if not fence:
            number += 1
            continue
        assert fence[2] != "console", (
            f"{page}:{number + 1}: write commands as bash and their output as text, not console"
        )
        end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
        above = lines[number - 1].strip() if number else ""
        mark = MARK.fullmatch(above)
        assert mark or not above.startswith("<!--"), f"{page}:{number}: unknown comment {above}"
        if fence[2] in ("bash", "python", "yaml"):
            text = "\n".join(line.removeprefix(fence[1]) for line in lines[number + 1 : end])
            needs, file = mark.groups(default="") if mark else ("", "")
            found.append(Block(fence[2], text, number + 1, needs, file))
        number = end + 1
    return found


def commands(text: str) -> Iterator[str]:
    """The commands of a bash block: continued lines joined, loops whole, comments and empty lines left out."""
    loop: list[str] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        loop.append(re.sub(r"\s+#.*", "", line))
        if not loop[0].startswith("for ") or line.strip() == "done" or "; done" in line:
            yield "\n".join(loop)
            loop = []
    assert not loop, f"a loop without an end: {loop[0]}"


def arguments(command: str) -> list[str] | None:
    """The arguments of `distill` if the command is one of its own, by whatever it is started."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return None
    if words[0] == "distill":
        return words[1:]
    if "distill.cli" in words:
        return words[words.index("distill.cli") + 1 :]
    if words[0] == "launch/torchrun.sh" or words[:2] == ["sbatch", "launch/slurm.sbatch"]:
        return ["train", *words[1 + (words[0] == "sbatch") :]]
    return None


def leaf(words: list[str]) -> tuple[str, click.Context]:
    """The verb that the words name, and its context: unknown verbs and options raise."""
    context = main.make_context("distill", list(words))
    names: list[str] = []
    while isinstance(context.command, click.Group):
        left = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, left = context.command.resolve_command(context, left)
        context = command.make_context(name, left, parent=context)
        names.append(name)
    return " ".join(names), context


# -- what is done with them -------------------------------------------------------------------------------------------


def look(words: list[str]) -> None:
    """Parse a command without running it, and check the configs and keys that it names."""
    if {"--help", "-h", "--version"} & set(words):
        return
    verb, context = leaf(words)
    given = [str(c) for c in context.params.get("configs") or ()]
    files = [c for c in given if "=" not in c and not Path(c).is_dir() and "*" not in c]
    if files and (verb != "compare" or not context.params["record"]):
        config.load([f for f in files if not f.startswith("runs/")], [c for c in given if "=" in c])


def run(words: list[str]) -> None:
    """Run `distill` in this process."""
    verb, params = "", {}
    if not {"--help", "-h", "--version"} & set(words):
        verb, context = leaf(words)
        params = context.params
    if verb in ELSEWHERE:
        return look(words)
    if verb == "compare" and (params["record"] or any(name.startswith("runs/") for name in params["configs"])):
        return look(words)  # of runs: a run of two steps has no curve; tests/test_curves.py runs it
    quick = FEWER.get(verb, []) if "--quick" not in words else []
    result = CliRunner().invoke(main, [*words, *quick], catch_exceptions=True)
    failed = result.exception and not isinstance(result.exception, SystemExit)
    assert result.exit_code == 0 and not failed, f"distill {shlex.join(words)}\n{result.output}\n{result.exception!r}"


def bash(command: str) -> None:
    """Run a line that is not `distill` alone; in it `distill` is this tree's, made small as above."""
    shims = Path(".shims").resolve()
    shims.mkdir(exist_ok=True)
    starter = f'import sys; sys.path.insert(0, "{Path(__file__).parent}"); import test_docs; test_docs.start()'
    for name, rest in {"distill": f"-c '{starter}'", "python": ""}.items():
        (shims / name).write_text(f'#!/bin/sh\nexec {sys.executable} {rest} "$@"\n')
        (shims / name).chmod(0o755)
    tree = str(Path(config.__file__).parents[2])
    env = os.environ | {"PATH": f"{shims}:{os.environ['PATH']}", "PYTHONPATH": tree}
    inner = re.sub(r"\bPYTHONPATH=\.(?= )", f"PYTHONPATH=.:{tree}", command)
    result = subprocess.run(["bash", "-ec", inner], capture_output=True, text=True, env=env)
    untrained = result.returncode == 2 and "distill: check teacher:" in result.stderr  # a teacher of two steps
    assert result.returncode == 0 or untrained, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


def is_outside(command: str) -> bool:
    """Whether a line installs something or needs an account; `make` must name a target that exists."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"{command}: the Makefile has no such target"
    return bool(TOOLS & set(words))


def start() -> None:
    """`distill`, made small, in a process of its own."""
    make_small(pytest.MonkeyPatch())
    main()


def check_python(text: str) -> None:
    """Compile, and look up what is imported from `distill`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distill":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), (
                    f"{node.module} has no {alias.name}"
                )


def check_yaml(text: str, folder: Path) -> None:
    """Keys and types of a run, and the arguments of every object that is ours; of other YAML that it is YAML."""
    node = yaml.safe_load(text)
    known = {*schema.RunConfig.__dataclass_fields__, "base"}
    if not isinstance(node, dict) or not set(node) & known:
        return
    node.pop("base", None)
    node.setdefault("name", "page")
    file = folder / "block.yaml"
    file.write_text(yaml.safe_dump(node))
    check_targets(OmegaConf.to_container(config.load([file])), "")


def check_targets(node, where: str) -> None:
    if isinstance(node, list):
        for item in node:
            check_targets(item, where)
    if not isinstance(node, dict):
        return
    name = node.get("_target_")
    if name and name.startswith("distill."):
        target = config.resolve(name)
        taken = config.signature(target)
        for key in set(node) - {"_target_"}:
            assert key in taken or config.open_ended(target), f"{where}: {name} takes no '{key}'"
    for key, value in node.items():
        check_targets(value, f"{where}.{key}")


def do(block: Block, names: dict, folder: Path) -> None:
    """Run a block, or check it if it is marked."""
    text = block.text
    for long, short in (MODELS | SHORTER).items():
        text = text.replace(long, short)
    if block.file:
        (folder / block.file).write_text(text + "\n")
    if block.language == "yaml":
        check_yaml(text, folder)
    elif block.language == "toml":
        for group in tomllib.loads(text)["project"]["entry-points"]:
            assert group == plugins.GROUP
    elif block.language == "python":
        check_python(text)
        if not block.mark:
            exec(compile(text, f"line {block.line}", "exec"), names)
    elif block.language == "bash":
        for command in commands(re.sub(r"\bCONFIG\b", PLACEHOLDER, text)):
            words = None if re.search(r"[;|&>]|\$\(|^for |^[A-Z_]+=", command) else arguments(command)
            if block.mark:
                words = None if command.startswith("for ") else arguments(command)
                look(words) if words else None
            elif words:
                run(words)
            elif not is_outside(command):
                bash(command)


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    def inside(words, folder):
        with pytest.MonkeyPatch.context() as patch:  # undone at once: other tests of this process load configs too
            make_small(patch)
            patch.chdir(folder)
            result = CliRunner().invoke(main, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output

    return Library(tmp_path_factory.mktemp("library"), inside)


def restore(families: dict) -> None:
    """Forget the families that were registered since `families` was copied."""
    FAMILIES.clear()
    FAMILIES.update(families)


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in PAGES])
def test_page(page, library, tmp_path, monkeypatch):
    """Every block of the page runs, or is marked and parses."""
    found = blocks(ROOT / page)
    if any(not b.mark and b.language != "yaml" for b in found):
        library.put(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # pages import the modules that they write
    make_small(monkeypatch)
    if page in VALIDATED:
        monkeypatch.setitem(MOST, "train.validate_every", 1)
    names, environment = {"__name__": "__page__"}, dict(os.environ)
    families = dict(FAMILIES)  # pages register their own
    try:
        for block in found:
            known = dict(FAMILIES)
            try:
                do(block, names, tmp_path)
                if block.file:  # who needs the file imports it
                    restore(known)
            except Exception as error:
                raise AssertionError(f"{page}:{block.line} ({block.language}) fails: {error}") from error
    finally:  # a page may have trained under a strategy, or with Lightning's own loggers
        restore(families)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Relative links lead to files, and to headings that exist; pages that the site generates are left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:|\$", target) or GENERATED.search(path):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file), f"{page} links to {target}, a heading that {path} lacks"


def test_wrong_blocks_fail(tmp_path, monkeypatch):
    """An unknown option, key, argument or name fails, in blocks that are run and in marked ones."""
    monkeypatch.chdir(tmp_path)
    make_small(monkeypatch)
    wrong = {
        "bash": ["distill train toy/tdm --fast", "distill train toy/tdm train.stepz=3", "distill trian toy/tdm"],
        "python": ["from distill.methods import TMD"],
        "yaml": ["train: {stepz: 3}", "method: {_target_: distill.methods.TDM, gird: 4}"],
    }
    for mark in ("", "accelerator"):
        for language, texts in wrong.items():
            for text in texts:
                with pytest.raises((AssertionError, click.UsageError, BadInput)):
                    do(Block(language, text, 1, mark), {}, tmp_path)

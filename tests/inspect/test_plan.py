"""The verb: every shipped recipe, sizes that do not fit, folders without weights, and what a user may mistype."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import weigh
from click.testing import CliRunner
from omegaconf import OmegaConf
from rich.console import Console

from distill import config
from distill.cli import main
from distill.errors import BadInput
from distill.inspect.plan import Machine, machine_of, plan
from distill.inspect.plan.cards import card
from distill.inspect.plan.show import sentences, show
from distill.inspect.plan.spread import KINDS, STRATEGIES

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    p for p in (ROOT / "configs").rglob("*/*.yaml") if p.stem not in ("base", "unet-2b", "dit-2b", "dit-12b")
)
BENCH = sorted(p for p in (ROOT / "configs" / "bench").glob("*b.yaml"))
BUCKETS = {"zero_optimization": {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000}}


def tight(cfg, strategy, gpus=8, layout="full"):
    """A machine in which this strategy just fits."""
    rows = plan(cfg, Machine(gpus, 80e9, 1e12))["rows"]
    need = next(r["total"] for r in rows if (r["strategy"], r["layout"]) == (strategy, layout))
    return Machine(gpus, 1.01 * need / 0.92, 1e12)


def recipe(tmp_path, name="tdm", **engine):
    (tmp_path / "ds.json").write_text(json.dumps(BUCKETS))
    return weigh.recipe(name, deepspeed=str(tmp_path / "ds.json"), **engine)


def check(found):
    for row in found["rows"]:
        assert row["total"] == sum(row[k] for k in KINDS) > 0 and all(row[k] >= 0 for k in KINDS)
    assert {r["strategy"] for r in found["rows"]} == set(STRATEGIES)
    assert found["flops"] > 0 and found["hours"] > 0 and found["disk"]["checkpoints"] > 0
    fits = [r["fits"] for r in found["rows"]]
    assert fits == sorted(fits, reverse=True), "those that fit come first"


@pytest.mark.parametrize(
    "path",
    [ROOT / "configs" / p for p in ("toy/dmd2.yaml", "toy/meanflow.yaml", "digits/scm.yaml")],
    ids=lambda p: p.stem,
)
def test_a_shipped_recipe_is_planned(path):
    check(plan(config.load([path], ["train.threads=1"]), machine_of("32", 8)))


@pytest.mark.slow
def test_every_shipped_recipe_is_planned(monkeypatch):
    monkeypatch.setattr(
        sys.modules["distill.inspect.plan.trace"], "SECONDS", 0.1
    )  # the package has a function of that name
    for path in RECIPES:
        twin = ["model=tiny"] if config.load([path]).tiny else []  # the published networks' configs are on the hub
        found = plan(config.load([path], ["train.threads=1", *twin]), machine_of("32", 8))
        check(found)
        assert not any("run as they are" in note for note in found["notes"]), path


@pytest.mark.slow
@pytest.mark.parametrize("path", BENCH, ids=lambda p: p.stem)
def test_billions_of_weights_are_planned_in_seconds_and_without_them(path, tmp_path):
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "distill.cli",
            "plan",
            str(path),
            "--gpus",
            "8",
            "--memory",
            "80",
            "--json",
            str(tmp_path / "plan.json"),
        ],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads((tmp_path / "plan.json").read_text())
    check(found)
    assert ended.ru_utime - began.ru_utime < 60 and ended.ru_maxrss < 4 * 2**20
    assert found["advice"].startswith("does not fit: ddp") and "use engine.strategy=" in found["advice"]
    assert max(found["parameters"].values()) > 2e9


# -- what does not fit --------------------------------------------------------------------------------------------


def test_a_strategy_that_fits_is_named(tmp_path):
    cfg = recipe(tmp_path)
    found = plan(cfg, tight(cfg, "fsdp"))
    assert found["rows"][0]["strategy"] == "fsdp" and found["rows"][0]["layout"] == "full"
    assert found["advice"].startswith("does not fit: ddp takes")
    assert "use engine.strategy=fsdp engine.devices=8" in found["advice"]
    assert plan(weigh.recipe("tdm", strategy="fsdp"), tight(cfg, "fsdp"))["advice"].startswith("fits: fsdp")


def test_a_run_that_fits_is_reported_as_such():
    found = plan(weigh.recipe("tdm"), machine_of("bf16", 2))
    assert found["advice"].startswith("fits: ddp takes") and found["rows"][0]["strategy"] == "ddp"
    assert plan(weigh.recipe("tdm"), machine_of("bf16", 1))["rows"][0]["strategy"] == "single"


def test_a_smaller_batch_is_the_way_out(tmp_path):
    cfg, small = recipe(tmp_path), recipe(tmp_path)
    small.data.batch_size = 3
    least = min(row["total"] for row in plan(small, Machine(2, 80e9, 1e12))["rows"])
    machine = Machine(2, 1.01 * least / 0.92, 1e12)
    advice = plan(cfg, machine)["advice"]
    assert "no strategy fits on 2 x" in advice and "use data.batch_size=" in advice
    cfg.data.batch_size = int(advice.split("batch_size=")[1].split()[0])
    assert 1 <= cfg.data.batch_size < 8 and plan(cfg, machine)["rows"][0]["fits"]


def test_more_gpus_or_larger_ones_are_the_last_way_out(tmp_path):
    cfg = recipe(tmp_path)
    assert "use GPUs of more than" in plan(cfg, Machine(1, 1e4, 1e12))["advice"]


def test_the_largest_batch_fits_and_the_next_does_not(tmp_path):
    cfg = recipe(tmp_path)
    machine = Machine(2, 2e7, 1e12)
    row = next(r for r in plan(cfg, machine, largest=True)["rows"] if r["strategy"] == "ddp" and r["layout"] == "full")
    totals = []
    for batch in (row["batch"], round(1.03 * row["batch"]) + 1):
        cfg.data.batch_size = batch
        rows = plan(cfg, machine)["rows"]
        totals.append(next(r["total"] for r in rows if r["strategy"] == "ddp" and r["layout"] == "full"))
    assert row["batch"] > 8 and totals[0] <= 1.01 * machine.room and totals[1] > machine.room


def test_hours_follow_operations_peak_and_utilisation():
    cfg, machine = weigh.recipe("tdm"), Machine(4, 80e9, 1e12, 0.5)
    found = plan(cfg, machine)
    assert found["hours"] == pytest.approx(cfg.train.steps * found["flops"] / 0.5e12 / 3600)
    warm = plan(config.checked(config.merge(cfg, OmegaConf.create({"method": {"warm_start": 500}}))), machine)
    assert warm["hours"] < 0.9 * found["hours"], "half of the steps only imitate"


def test_adapters_need_less_and_are_offered():
    cfg = weigh.recipe("tdm")
    rows = {(r["strategy"], r["layout"]): r for r in plan(cfg, machine_of("32", 8))["rows"]}
    full, shared = rows["ddp", "full"], rows["ddp", "shared_base"]
    assert shared["weights"] < 0.5 * full["weights"] and shared["moments"] < 0.5 * full["moments"]
    assert shared["frozen"] == full["frozen"]


# -- folders and data that are not here ----------------------------------------------------------------------------


def test_a_folder_is_planned_without_its_weights_and_data(tmp_path):
    shutil.copytree(ROOT / "checkpoints" / "digits-teacher", tmp_path / "teacher")
    for file in (tmp_path / "teacher").rglob("*.safetensors"):
        file.unlink()
    lines = ["roles.teacher.path=" + str(tmp_path / "teacher"), "data.path=" + str(tmp_path / "nowhere")]
    cfg = config.load([ROOT / "configs" / "digits" / "tdm.yaml"], [*lines, "train.threads=1"])
    found = plan(cfg, machine_of("32", 1))
    assert "does not exist; random samples of the network's shape are used instead" in found["notes"][0]
    kept = plan(config.load([ROOT / "configs" / "digits" / "tdm.yaml"], ["train.threads=1"]), machine_of("32", 1))
    assert found["parameters"] == kept["parameters"] and found["flops"] == kept["flops"]


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_text_networks_are_built_from_their_configs(name, tmp_path):
    from distill.models.diffusers import load
    from distill.models.diffusers.folder import shapes_only
    from distill.models.diffusers.tiny import builders

    builders()[name]().save_pretrained(tmp_path, safe_serialization=True)
    real = load(tmp_path, null=None)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    with shapes_only():
        shapes = load(tmp_path)
    assert all(p.is_meta for p in shapes.net.parameters())
    sizes = lambda model: {k: (p.shape, p.dtype) for k, p in model.net.named_parameters()}
    assert sizes(shapes) == sizes(real) and shapes.net.shape == real.net.shape
    with pytest.raises(BadInput, match="safetensors"):
        load(tmp_path)


def test_conditions_of_text_come_from_the_data(tmp_path):
    from distill.models.diffusers import tiny as families

    families.builders()["sd15"]().save_pretrained(tmp_path / "sd", safe_serialization=True)
    cfg = config.load(
        [ROOT / "configs" / "digits" / "tdm.yaml"], ["data.path=nowhere", f"roles.teacher.path={tmp_path}/sd"]
    )
    with pytest.raises(BadInput, match="data.path: nowhere does not exist, and the network's conditions"):
        plan(cfg, machine_of("32", 1))


# -- the command line ----------------------------------------------------------------------------------------------


def conditions(*arguments):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    toy = ROOT / "configs" / "toy" / "tdm.yaml"
    out = conditions(toy, "train.threads=1", "--gpus", 2, "--gpu", "A100", "--batch", "--json", tmp_path / "plan.json")
    assert out.exit_code == 0, out.output
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["machine"]["memory"] == 80e9 and found["rows"][0]["batch"] > 256
    assert "fits: ddp" in out.output and "zero3+offload" in out.output and "2 x 80 GB" in out.output
    assert all(line in out.output.replace("\n", "") for line in sentences(found))
    again = conditions(toy, "--json", tmp_path / "plan.json")
    assert again.exit_code == 2 and "exists; name another file" in again.output


def test_the_plan_of_a_small_run_has_one_unit_no_trailing_blanks_and_names_what_it_assumes():
    toy = ROOT / "configs" / "toy" / "tdm.yaml"
    out = conditions(toy, "train.threads=1").output
    lines = out.splitlines()
    total = next(line for line in lines if line.split()[:2] == ["single", "full"]).split()[-2]
    assert ": MB per rank, " in lines[0] and f"TDM fits: single takes {total} MB of 1 x 80 GB per rank." in lines
    assert [line for line in lines if line != line.rstrip()] == []
    assert "Note: An H100 is assumed (80 GB, 67 TFLOP/s); name the card by --gpu." in lines
    assert "(67 TFLOP/s)" in conditions(toy, "train.threads=1", "--memory", 24).output
    for given in (("--gpu", "4090"), ("--memory", 24, "--flops", 1e13)):
        assert "assumed" not in conditions(toy, "train.threads=1", *given).output


def test_styled_tables_have_no_trailing_blanks():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    show(plan(weigh.recipe("tdm"), Machine(1, 1e4, 1e12)), console)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
    assert "too big" in plain and all(line == line.rstrip() for line in plain.splitlines())


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--gpu", "h10"), "--gpu: 'h10' is none of .* Did you mean 'h100'"),
        (("engine.deepspeed=nowhere.json",), "engine.deepspeed: nowhere.json cannot be read"),
        (("roles.layout=shared",), "roles.layout: 'shared' must be full or shared_base"),
        (("engine.strategy=zero9",), "engine.strategy: 'zero9' must be one of"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, says):
    out = conditions(ROOT / "configs" / "toy" / "tdm.yaml", "train.threads=1", *arguments)
    assert out.exit_code == 2 and out.output.count("\n") == 1
    with pytest.raises(BadInput, match=says):
        raise BadInput(out.output)


def test_cards_are_known_by_their_usual_names():
    assert card("RTX 4090") == card("4090") and card("nvidia-h100").memory == 80
    assert machine_of("32", 1, "a100").flops == 19.5e12 and machine_of("bf16", 1, "a100").flops == 312e12
    assert machine_of("bf16", 1, "a100", memory=40, flops=1e12).memory == 40e9


def test_plans_cost_little(tmp_path):
    began = time.process_time()
    plan(weigh.recipe("tdm"), machine_of("32", 8))
    assert time.process_time() - began < 20
    assert torch.is_autocast_cache_enabled()

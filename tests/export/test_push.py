"""`distill push`: what is sent to the hub, against the signatures of the installed client, without a network."""

from __future__ import annotations

import inspect
from pathlib import Path

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner

from distill.cli import main
from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.export import export
from distill.export.push import hub_card, push
from distill.models.diffusers import UNet2D, schedule_of


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    student = Denoiser(UNet2D(size=8, widths=(8, 16)), schedule_of("DDIMScheduler"), "v")
    return export(student, 2, "ode", tmp_path_factory.mktemp("exports") / "student", licence="mit")


@pytest.fixture
def sent(monkeypatch):
    """The calls of a client that accepts exactly what the installed HfApi accepts."""
    calls, client = [], huggingface_hub.HfApi

    class Fake:
        def __getattr__(self, name):
            signature = inspect.signature(getattr(client, name))

            def call(*args, **kwargs):
                bound = signature.bind(self, *args, **kwargs)  # raises TypeError as the real one would
                calls.append((name, {k: v for k, v in bound.arguments.items() if k != "self"}))
                return "https://huggingface.co/me/mine" if name == "create_repo" else None

            return call

    monkeypatch.setattr(huggingface_hub, "HfApi", Fake)
    return calls


def test_the_folder_and_a_card_that_loads_from_the_hub_are_sent(exported, sent):
    assert push(exported, "me/mine", private=True) == "https://huggingface.co/me/mine"
    assert [name for name, _ in sent] == ["create_repo", "upload_folder", "upload_file"]
    create, folder, card = (arguments for _, arguments in sent)
    assert create == {"repo_id": "me/mine", "private": True, "repo_type": "model", "exist_ok": True}
    assert folder["folder_path"] == exported and "README.md" in folder["ignore_patterns"] and folder["revision"] is None
    text = card["path_or_fileobj"].decode()
    assert card["path_in_repo"] == "README.md" and text.startswith("---\nlicense: mit\n")
    assert 'from_pretrained("me/mine")' in text and '"student"' not in text
    assert 'from_pretrained("student")' in (exported / "README.md").read_text()


def test_the_verb_takes_a_branch_and_prints_the_address(exported, sent):
    result = CliRunner().invoke(main, ["push", str(exported), "me/mine", "--revision", "four-steps"])
    assert result.exit_code == 0 and "https://huggingface.co/me/mine" in result.output, result.output
    arguments = dict(sent)
    assert arguments["create_branch"] == {"repo_id": "me/mine", "branch": "four-steps", "exist_ok": True}
    assert arguments["upload_folder"]["revision"] == arguments["upload_file"]["revision"] == "four-steps"
    assert arguments["create_repo"]["private"] is False
    assert 'from_pretrained("me/mine", revision="four-steps")' in arguments["upload_file"]["path_or_fileobj"].decode()


@pytest.mark.parametrize(
    "before, after",
    [
        (
            'pipe.load_lora_weights("s", weight_name="s.safetensors")',
            'load_lora_weights("a/b", weight_name="s.safetensors")',
        ),
        ('D.from_pretrained("s", subfolder="scheduler")', 'D.from_pretrained("a/b", subfolder="scheduler")'),
        ('PeftModel.from_pretrained(pipe.transformer, "s")', 'PeftModel.from_pretrained(pipe.transformer, "a/b")'),
        (
            'U.from_single_file("s/s.safetensors", config="base")',
            'U.from_single_file("https://huggingface.co/a/b/blob/main/s.safetensors", config="base")',
        ),
    ],
)
def test_every_form_of_loading_is_rewritten(before, after):
    card = f'# s\n\n```python\n{before}\n```\n\n`s` and "s" stay\n'
    text = hub_card(card, "s", "a/b")
    assert after in text and text.endswith('`s` and "s" stay\n')


def test_what_may_not_be_published_is_refused_before_anything_is_sent(exported, sent, tmp_path):
    with pytest.raises(BadInput, match="is not a name on the hub: give OWNER/NAME"):
        push(exported, "mine")
    with pytest.raises(BadInput, match="was not exported by distill"):
        push(tmp_path, "me/mine")
    torch.manual_seed(0)
    student = Denoiser(UNet2D(size=8, widths=(8, 16)), schedule_of("DDIMScheduler"), "v")
    unlicensed = export(student, 2, "ode", tmp_path / "unlicensed")
    with pytest.raises(BadInput, match="states no licence.*--licence NAME"):
        push(unlicensed, "me/mine")
    assert sent == []
    card = Path(unlicensed / "README.md")
    card.write_text(card.read_text().replace("license: other", "license: cc-by-4.0"))
    push(unlicensed, "me/mine")
    assert len(sent) == 3


def test_a_refusal_of_the_hub_is_one_sentence(exported, monkeypatch):
    class Refusing:
        def create_repo(self, *args, **kwargs):
            raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nmore lines")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    result = CliRunner().invoke(main, ["push", str(exported), "me/mine"])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert "The hub refuses me/mine (Token is required): log in by `hf auth login`" in result.stderr

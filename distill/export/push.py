"""Uploads an export to the Hugging Face hub."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from distill.errors import BadInput
from distill.export.licence import UNKNOWN, front_matter
from distill.files import read_json

REPO = re.compile(r"[\w.-]+/[\w.-]+")


def push(out: str | Path, repo: str, private: bool = False, revision: str | None = None) -> str:
    """Upload an export, with a model card whose code loads it from the hub.

    Args:
        out: a folder that `distill export` wrote.
        repo: OWNER/NAME on the hub; it is created if it does not exist.
        private: of a repository that is created.
        revision: branch to upload to, created if it does not exist; the main branch by default.

    Returns:
        The address of the repository.

    Raises:
        BadInput: the folder is not an export, its card states no licence, or the hub refuses.
    """
    from huggingface_hub import HfApi

    out = Path(out)
    record, card = _checked(out, repo)
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=out,
            revision=revision,
            commit_message=f"Export of distill {record['distill']}",
            ignore_patterns=["README.md", ".*"],
        )
        api.upload_file(
            path_or_fileobj=hub_card(card, out.name, repo, revision).encode(),
            path_in_repo="README.md",
            repo_id=repo,
            revision=revision,
            commit_message="Model card",
        )
    except Exception as error:  # without a token, offline, forbidden, not a name: each its own class
        text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BadInput(
            f"The hub refuses {repo} ({text}): log in by `hf auth login` with a token that may write there, and check the "
            "name; what was uploaded already stays, and the same command completes it."
        ) from error
    return str(url)


def hub_card(card: str, name: str, repo: str, revision: str | None = None) -> str:
    """The model card with the code loading from `repo` where it loaded from the folder `name`."""
    head, fence, rest = card.partition("```python\n")
    code, end, tail = rest.partition("```")
    file = f"https://huggingface.co/{repo}/blob/{revision or 'main'}/"
    code = code.replace(f'from_single_file("{name}/', f'from_single_file("{file}')
    branch = f', revision="{revision}"' if revision else ""
    code = re.sub(rf'(from_pretrained|load_lora_weights)\("{re.escape(name)}"', rf'\1("{repo}"{branch}', code)
    code = re.sub(rf'(PeftModel\.from_pretrained\([^,]+, )"{re.escape(name)}"', rf'\1"{repo}"{branch}', code)
    return head + fence + code.replace("  # the path of this folder", "") + end + tail


def _checked(out: Path, repo: str) -> tuple[dict[str, Any], str]:
    """The record and the card of an export that may be published."""
    if not REPO.fullmatch(repo):
        raise BadInput(f"'{repo}' is not a name on the hub: give OWNER/NAME.")
    if not (out / "distill.json").is_file() or not (out / "README.md").is_file():
        raise BadInput(f"{out} was not exported by distill: it lacks distill.json or README.md; export it first.")
    record, card = read_json(out / "distill.json"), (out / "README.md").read_text(encoding="utf-8")
    head = front_matter(card)
    if head.get("license", UNKNOWN) == UNKNOWN and not (head.get("license_name") or head.get("license_link")):
        raise BadInput(
            f"{out}/README.md states no licence, and a model is published under one: write `license: NAME` at its head, or "
            "export again with --licence NAME."
        )
    base = record.get("base")
    if base and Path(base).exists():
        warnings.warn(
            f"The card of {out} names its base by the local path {base}: put its name on the hub there.", stacklevel=3
        )
    return record, card

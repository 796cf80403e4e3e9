"""The licence of an export: that of the model it was made from, or the one that the user states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.denoise import Denoiser, network_of

FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "LICENCE.md")
TEXTS = {  # a line in the first lines of a licence's text -> its name on the hub
    "apache license": "apache-2.0",
    "mit license": "mit",
    "creativeml open rail++-m": "openrail++",
    "creativeml open rail-m": "creativeml-openrail-m",
}
UNKNOWN = "other"


@dataclass(frozen=True)
class Licence:
    """A licence as the front matter of a model card states it.

    Args:
        name: `license`, an identifier of the hub such as apache-2.0; "other" for licences that have none, and where
            nothing is known.
        title, link: `license_name` and `license_link` of a licence called "other".
        file: the base's own licence file, which an export copies.
    """

    name: str = UNKNOWN
    title: str | None = None
    link: str | None = None
    file: Path | None = None

    @property
    def known(self) -> bool:
        """Whether a licence was stated."""
        return self.name != UNKNOWN or bool(self.title or self.link)

    def record(self) -> dict[str, str]:
        """Its entries in distill.json."""
        entries = {"licence": self.name, "licence_name": self.title, "licence_link": self.link}
        return {key: value for key, value in entries.items() if value}


def licence_of(student: Denoiser) -> Licence:
    """The licence of the pipeline that a student's network was loaded from.

    Taken from the front matter of its README.md, else from its LICENSE file; "other" where there is neither, and for
    networks that were not loaded from a pipeline.
    """
    net = network_of(student).base
    folder = Path(net.folder) if net.folder else None
    card = _card(folder, net.source)
    stated = front_matter(card.read_text(encoding="utf-8")) if card else {}
    file = next((folder / name for name in FILES if folder and (folder / name).is_file()), None)
    name = stated.get("license")
    name = name[0] if isinstance(name, list) and name else name
    if not name and file:
        name = _recognised(file.read_text(encoding="utf-8", errors="replace"))
        link = None if name else file.name
        return Licence(name or UNKNOWN, link=link, file=file)
    return Licence(str(name or UNKNOWN), stated.get("license_name"), stated.get("license_link"), file)


def front_matter(card: str) -> dict[str, Any]:
    """The YAML between the first two `---` lines of a model card; empty where there is none."""
    import yaml

    head, *rest = card.split("---\n", 2) if card.startswith("---\n") else ("",)
    if len(rest) < 2:
        return {}
    try:
        found = yaml.safe_load(rest[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _card(folder: Path | None, source: tuple[str, str | None] | None) -> Path | None:
    """README.md of the pipeline's folder, or of the model of the hub."""
    if folder and (folder / "README.md").is_file():
        return folder / "README.md"
    name, revision = source or ("", None)
    if not name or name.startswith("tiny:") or Path(name).exists():
        return None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "README.md", revision=revision))
    except Exception:  # offline, gone, gated: the licence is then unknown
        return None


def _recognised(text: str) -> str | None:
    head = " ".join(text[:300].lower().split())
    return next((name for words, name in TEXTS.items() if words in head), None)

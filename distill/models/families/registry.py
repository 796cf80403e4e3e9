"""The families that are known: the `FAMILY` of each module of this package, and those that other packages register."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from distill.config import plugins
from distill.errors import BadInput
from distill.models.families.family import Family

# Stock class of the network -> its family: conditioned on tensors such as text, or on class labels.
FAMILIES: dict[str, Family] = {}
LABEL_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Let folders whose network is of the class `family.network` be loaded, encoded and exported.

    A package calls it when it is imported: an installed plugin (entry point `distill.plugins`) is imported when a folder
    has a network that no family here supports, another package when `--allow` names it.

    Raises:
        BadInput: `family` is no declaration, it says too little, or another family supports its network.

    Examples:
        >>> from distill.models.diffusers import Family, register_family
        >>> def call(net, x, n, text):
        ...     return net.stock(x, timestep=n, encoder_hidden_states=text).sample
        >>> register_family(Family(network="AllegroTransformer3DModel", call=call))
    """
    if not isinstance(family, Family):
        raise BadInput(f"register_family: {family!r} is no family; pass a distill.models.diffusers.Family.")
    if family.call is None and family.adapter is None:
        raise BadInput(
            f"register_family: the family of {family.network} has no `call`; state how the network is called."
        )
    table = LABEL_FAMILIES if family.takes_labels else FAMILIES
    known = (LABEL_FAMILIES | FAMILIES).get(family.network)
    if known not in (None, family):
        raise BadInput(f"register_family: {known.origin} supports {family.network} already; remove one.")
    table[family.network] = family


def families() -> list[Family]:
    """All families: those of this package, and those registered so far."""
    return [*LABEL_FAMILIES.values(), *FAMILIES.values()]


def family_of(network: str | None) -> Family | None:
    """The family of a stock class, of this package or registered by a plugin; None if there is none."""
    if network not in FAMILIES and network not in LABEL_FAMILIES:
        plugins.import_installed()
    return (LABEL_FAMILIES | FAMILIES).get(network or "")


def _register_own() -> None:
    """Registers the `FAMILY` of each module beside this one."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        declared = vars(importlib.import_module(f"{__package__}.{module.name}")) if module.name != "registry" else {}
        if "FAMILY" in declared:
            register_family(declared["FAMILY"])


_register_own()

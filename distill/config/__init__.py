"""Configs: YAML files and `key=value` overrides to one checked mapping, and to the objects that it names.

Examples:
    >>> from distill import config
    >>> config.build({"_target_": "distill.times.Grid.uniform", "steps": 2}).times
    (1.0, 0.5, 0.0)
    >>> config.load(["toy/tdm"], ["train.steps=5"]).train.steps
    5
"""

from omegaconf import DictConfig

from distill.config.loading import checked, fingerprint, load, merge, override, read, save, to_yaml
from distill.config.objects import build, open_ended, plain, resolve, signature, verify
from distill.config.plugins import confirm, record
from distill.config.schema import TARGET

__all__ = [
    "TARGET",
    "DictConfig",
    "build",
    "checked",
    "confirm",
    "fingerprint",
    "load",
    "merge",
    "open_ended",
    "override",
    "plain",
    "read",
    "record",
    "resolve",
    "save",
    "signature",
    "to_yaml",
    "verify",
]

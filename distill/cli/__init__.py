"""`distill VERB`: the command line. Verbs import what they need when they run, so that `distill --help` stays fast."""

from distill.cli import data, recipes, results, training
from distill.cli.group import main

__all__ = ["data", "main", "recipes", "results", "training"]

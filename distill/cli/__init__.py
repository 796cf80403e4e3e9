"""`distill VERB`: the command line. Heavy imports wait until a verb runs; a new verb is a function in one of its files."""

from distill.cli import data, results, training
from distill.cli.group import main

__all__ = ["data", "main", "results", "training"]

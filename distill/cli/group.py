"""The group of all verbs, and how it shows bad input."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import click

from distill import __version__
from distill.errors import BadInput

_stock = warnings.showwarning


def _sentence(message, category, filename, *rest) -> None:
    """A warning of ours as a sentence, without the line of code that gave it."""
    if Path(__file__).parents[1] in Path(filename).parents:
        click.echo(f"distill: {message}", err=True)
    else:
        _stock(message, category, filename, *rest)


class Verbs(click.Group):
    """A group that shows bad input as one sentence (exit code 2) unless --debug is given."""

    def invoke(self, ctx: click.Context):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("default", category=UserWarning, module=r"distill\.")
                warnings.showwarning = _sentence
                return super().invoke(ctx)
        except (BadInput, OSError) as error:
            if ctx.params.get("debug"):
                raise
            where = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
            text = str(error) if isinstance(error, BadInput) else f"{where}; look at its rights and free space."
            click.echo(f"distill: {' '.join(text.split())}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("distill: interrupted.", err=True)
            sys.exit(130)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distill")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--allow", multiple=True, metavar="PACKAGE", help="Let configs name objects of this package too.")
def main(debug: bool, allow: tuple[str, ...]) -> None:
    """Few-step students from diffusion and flow teachers.

    \b
    Example:
      distill data digits data/digits
      distill train configs/digits/tdm.yaml train.steps=400
      distill eval runs/digits-tdm
      distill export runs/digits-tdm student
    """


def allowed() -> tuple[str, ...]:
    """Packages beside ours that configs may name."""
    return click.get_current_context().find_root().params["allow"]

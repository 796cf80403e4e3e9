"""`distill recipes`: the recipes that come with the package."""

from __future__ import annotations

from itertools import groupby

import click

from distill.cli.group import main


@main.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes that come with distill, or print one.

    NAME is such as toy/tdm. Every command that takes a CONFIG takes the name of a recipe, from any folder.

    \b
    Example:
      distill recipes
      distill recipes digits/tdm
      distill recipes digits/tdm > mine.yaml
    """
    from distill.config import recipes as shipped

    if name:
        click.echo(shipped.text(name), nl=False)
        return
    names = shipped.names()
    width = max(map(len, names))
    for folder, group in groupby(names, key=lambda name: name.partition("/")[0]):
        click.echo(f"\n{folder}")
        for name in group:
            click.echo(f"  {name:{width}}  {shipped.about(name)}")

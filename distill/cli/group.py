"""The click group of all verbs: common options, and the display of errors."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import warnings
from pathlib import Path

import click

from distill import __version__
from distill.errors import BadInput, LostProcess

ALLOW = "distill.allow"  # in click's meta of a command
_stock_showwarning = warnings.showwarning


def _show_warning(message, category, filename, *rest) -> None:
    """Print a warning of distill as one sentence, without its source line."""
    if Path(__file__).parents[1] in Path(filename).parents:
        click.echo(f"distill: {message}", err=True)
    else:
        _stock_showwarning(message, category, filename, *rest)


def _describe_os_error(error: OSError) -> str:
    where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"{where}; check permissions and free space."


def _say(text: str) -> None:
    """Print an error as one line; of several ranks that meet the same one, one prints it."""
    from distill.training import launch  # reads configs, which `--help` need not

    line = " ".join(text.split())
    if launch.first_to_say(line):
        click.echo(f"distill: {line}", err=True)


def _leave(text: str, code: int) -> None:
    """Print an error and end this process, with the exit code that the launcher should see."""
    from distill.training import launch

    _say(text)
    launch.leave(code)


def _remember_allow(ctx: click.Context, option: click.Parameter, packages: tuple[str, ...]) -> None:
    ctx.meta[ALLOW] = (*ctx.meta.get(ALLOW, ()), *(name.split(".")[0] for name in packages))


def _allow_option() -> click.Option:
    text = "Let configs name objects of this package too; installed plugins need no mention."
    return click.Option(
        ["--allow"], multiple=True, metavar="PACKAGE", help=text, expose_value=False, callback=_remember_allow
    )


def _near_option(name: str, command: click.Command) -> str:
    """The option of a command that is near to `name`, or the setting of a run where the command takes some; else ""."""
    options = [option for param in command.params if isinstance(param, click.Option) for option in param.opts]
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.8)
    if near:
        return f" Did you mean '{near[0]}'?"
    if not any("KEY=VALUE" in (param.metavar or "") for param in command.params if isinstance(param, click.Argument)):
        return ""
    from distill.config.schema import Engine, Eval, Log, Train

    sections = {"train": Train, "engine": Engine, "eval": Eval, "log": Log}
    keys = {f"--{f.name}": f"{section}.{f.name}" for section, s in sections.items() for f in dataclasses.fields(s)}
    near = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), keys, n=1, cutoff=0.8)
    return f" Did you mean {keys[near[0]]}=VALUE?" if near else ""


class Verb(click.Command):
    """A verb with the option --allow."""

    def __init__(self, *args, params: list[click.Parameter] | None = None, **kwargs):
        super().__init__(*args, params=[*(params or ()), _allow_option()], **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            hint = _near_option(error.option_name, self)
            raise click.NoSuchOption(
                error.option_name, f"No such option '{error.option_name}'.{hint}", ctx=ctx
            ) from None

    def invoke(self, ctx: click.Context):
        if packages := ctx.meta.get(ALLOW):
            from distill.config import plugins  # lazily: `distill --help` imports nothing heavy

            plugins.import_allowed(packages)
        return super().invoke(ctx)


class Verbs(click.Group):
    """Prints BadInput as one sentence and exits with code 2; --debug shows the traceback."""

    command_class = Verb
    group_class = type

    def invoke(self, ctx: click.Context):
        try:
            if not ctx.params.get("debug"):
                for library in ("TRANSFORMERS", "DIFFUSERS"):  # read when they are imported
                    os.environ.setdefault(f"{library}_VERBOSITY", "error")
            with warnings.catch_warnings():
                warnings.filterwarnings("default", category=UserWarning, module=r"distill\.")
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except BrokenPipeError:  # the reader of a pipe, such as `head`, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except (BadInput, OSError) as error:
            if ctx.find_root().params.get("debug"):
                raise
            _leave(str(error) if isinstance(error, BadInput) else _describe_os_error(error), 2)
        except LostProcess as error:
            if ctx.find_root().params.get("debug"):
                raise
            _say(str(error))
            sys.exit(1)
        except KeyboardInterrupt:
            _leave("interrupted.", 130)


@click.group(cls=Verbs, params=[_allow_option()], context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distill")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Distil diffusion and flow models into students that sample in one to four steps.

    \b
    Example:
      distill recipes
      distill data digits data/digits
      distill train digits/tdm train.steps=400
      distill eval runs/digits-tdm
      distill export runs/digits-tdm student
    """


def allowed() -> tuple[str, ...]:
    """Packages besides distill and installed plugins that configs may name, from --allow before or after the verb."""
    return click.get_current_context().meta.get(ALLOW, ())

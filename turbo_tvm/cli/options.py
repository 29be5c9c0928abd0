"""Options and behaviour of every command: errors as one line, exit codes, `--debug` and `--version`."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import click

from turbo_tvm import __version__
from turbo_tvm.errors import TurboError

_DEBUG = "turbo_tvm.debug"
_INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


class Failure(click.ClickException):
    """An error for the user: `error: message` on stderr, exit code 1."""

    def show(self, file: Any = None) -> None:
        """Print the message."""
        click.echo(f"error: {self.format_message()}", err=True)


class Commands(click.Group):
    """A group whose commands turn TurboError into a Failure, unless `--debug` asks for the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except TurboError as error:
            if ctx.meta.get(_DEBUG):
                raise
            raise Failure(str(error)) from error
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which a user needs them."""
        return list(self.commands)


def _remember(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    ctx.meta[_DEBUG] = value or ctx.meta.get(_DEBUG, False)


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_remember, help="Show the traceback of an error."
)


def lengths_callback(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[int] | None:
    """Parse the value of `--lengths`: whole numbers of at least 1; None where it is not given."""
    if value is None:
        return None
    try:
        lengths = [int(part) for part in value.replace(",", " ").split()]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 12,200,37") from None
    if not lengths or min(lengths) < 1:
        raise click.BadParameter("lengths are whole numbers of at least 1, such as 12,200,37")
    return lengths


def image_size_callback(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Parse the value of `--image-size` to height and width in pixels; None where it is not given."""
    if value is None:
        return None
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} is no size in pixels such as 224, or 224x320 for height and width")
    return int(parts[0]), int(parts[-1])


def print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Print versions and exit; TVM's is read without importing it."""
    if not value or ctx.resilient_parsing:
        return
    click.echo(f"turbo-tvm {__version__} (TVM {_installed('apache-tvm')}, Python {platform.python_version()})")
    ctx.exit()


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

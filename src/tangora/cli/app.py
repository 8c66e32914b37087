"""The program: what all commands share, and how it ends."""

import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from tangora._checks import InputError
from tangora.cli.errors import one_line
from tangora.cli.flags import option
from tangora.cli.output import console


class Program(TyperGroup):
    """The program, whose own flags take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return its flags."""
        params = super().get_params(ctx)
        for each in params:
            each.metavar = ""
        return params


app = typer.Typer(
    name="tangora",
    cls=Program,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["--help", "-h"],
        # --learning_rate is --learning-rate
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)

RESOURCES = "Output and resources"
_INTERRUPTED = 130  # what typer makes of Ctrl-C


class Command(TyperCommand):
    """A command whose help stands among the other flags, not in front of them."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the flag of the help."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel, option.metavar = RESOURCES, ""
        return option


def _tell_version(wanted: bool) -> bool:
    if wanted:
        console.print(f"tangora {version('tangora')}", highlight=False)
        raise typer.Exit
    return wanted


@app.callback()
def tangora(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_tell_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Train and compare LoRA methods, and measure how closely they follow full fine-tuning."""


ConfigFile = Annotated[
    Path | None,
    option(
        RESOURCES,
        "<file>",
        "YAML file with any of these settings. Flags win; --no-NAME switches a setting off.",
        "--config",
    ),
]
Output = Annotated[
    Path,
    option(
        RESOURCES,
        "<folder>",
        "Output folder; the same command goes on with what is there.",
        "--output",
        "-o",
    ),
]


def main() -> None:
    """Run the command line; bad input ends with one line and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PEFT asks for the old name whenever it wraps a model
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    try:
        code = app(standalone_mode=False)
    except (InputError, TyperException) as error:
        if not (sentence := str(error) if isinstance(error, InputError) else one_line(error)):
            raise SystemExit(2) from None  # without arguments: the help has been printed
        Console(stderr=True).print(f"[bold red]error:[/] {escape(sentence)}", soft_wrap=True)
        raise SystemExit(2) from None
    if code == _INTERRUPTED:
        Console(stderr=True).print("interrupted; the same command continues where it stopped")
    if code:
        raise SystemExit(code)

"""The program: what all commands share, and how it ends."""

import os
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from tangora._checks import InputError, near_hint
from tangora._launched import launched, launched_as
from tangora.cli.flags import option
from tangora.cli.output import console, wait_for_the_first


class _Program(TyperGroup):
    """The program, whose own flags take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return its flags."""
        params = super().get_params(ctx)
        for each in params:
            each.metavar = ""
        return params


app = typer.Typer(
    name="tangora",
    cls=_Program,
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
_NUMBERS = {"int_parsing": "a whole number", "float_parsing": "a number"}


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
        "Output folder; the same command continues an interrupted run.",
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
    if launched():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # every process would warn
        console.quiet = launched_as() > 0
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        wait_for_the_first(error)
        if not isinstance(error, (InputError, TyperException)):
            raise
        if not (sentence := str(error) if isinstance(error, InputError) else _one_line(error)):
            raise SystemExit(2) from None  # without arguments: the help has been printed
        Console(stderr=True).print(f"[bold red]error:[/] {escape(sentence)}", soft_wrap=True)
        raise SystemExit(2) from None
    if code == _INTERRUPTED:
        Console(stderr=True).print("interrupted; the same command continues where it stopped")
    if code:
        raise SystemExit(code)


def _one_line(error: TyperException) -> str:
    # what was wrong with a command line, what is allowed, and how to mend it
    told: Any = error  # the parser's own classes are private
    message = " ".join(error.message.split())
    context: Any = getattr(told, "ctx", None) or SimpleNamespace(command_path="tangora")
    command = context.command_path
    if hasattr(told, "possibilities"):
        return _unknown_flag(told.option_name, context, command)
    if message.startswith("No such command"):
        name = message.split("'")[1]
        known = [each for each, found in context.command.commands.items() if not found.hidden]
        return f"{command} has no command {name!r}{near_hint(name, known)}; allowed: {', '.join(known)}"
    if hasattr(told, "param_type"):
        return f"{command} needs {_shown(told.param)}: {_first_sentence(told.param.help)}"
    if hasattr(told, "param") and told.param is not None:
        return _bad_value(told, message)
    if hasattr(told, "option_name"):
        if "not take a value" in message:
            return f"{told.option_name} takes no value"
        return f"{told.option_name} needs a value"
    if extra := re.fullmatch(r"Got unexpected extra argument\S* \((.*)\)\.?", message):
        return _extra(extra[1].split()[0], context, command)
    return message.rstrip(".")


def _unknown_flag(name: str, context: Any, command: str) -> str:
    flags = [flag for param in context.command.get_params(context) for flag in param.opts]
    return f"{command} has no option {name}{near_hint(name, flags)}; {command} --help lists all"


def _shown(param: Any) -> str:
    return param.opts[0] if param.param_type_name == "option" else param.display_name_raw.upper()


def _first_sentence(text: str | None) -> str:
    sentence = re.split(r"[.;](?:\s|$)", text or "a value", maxsplit=1)[0]
    return f"{sentence[:1].lower()}{sentence[1:]}" if sentence[1:2].islower() else sentence


def _bad_value(error: Any, message: str) -> str:
    flag = _shown(error.param)
    if not isinstance(error.__cause__, ValidationError):
        return f"{flag}: {message[:1].lower()}{message[1:].rstrip('.')}"
    first = error.__cause__.errors(include_url=False)[0]
    if wanted := _NUMBERS.get(first["type"]):
        return f"{flag} must be {wanted}; got {first['input']!r}"
    return f"{flag}: {first['msg'][:1].lower()}{first['msg'][1:]}; got {first['input']!r}"


def _extra(value: str, context: Any, command: str) -> str:
    words = sys.argv[1:]
    before = words[words.index(value) - 1] if value in words[1:] else ""
    flag = before.replace("_", "-")
    if flag in _switches(context):
        return _switch(flag, context, f"; got {value!r}")
    return f"{command} takes no further argument; got {value!r}"


def _switches(context: Any) -> set[str]:
    return {
        flag for param in context.command.params if getattr(param, "is_flag", False) for flag in param.opts
    }


def _switch(flag: str, context: Any, got: str = "") -> str:
    name = flag.removeprefix("--").removeprefix("no-")
    off = f", --no-{name} off" if f"--no-{name}" in _switches(context) else ""
    return f"{flag} takes no value: --{name} switches it on{off}{got}"

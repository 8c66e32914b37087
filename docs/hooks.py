"""What the site adds to MkDocs: formulas without JavaScript, files of the repository, and the command line's flags."""

import html
import inspect
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import latex2mathml.converter
import typer
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)((?:#[^)]*)?\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\s*\\\[(.*?)\\\]\s*)</\1>', re.DOTALL)
DOUBLE_STRUCK = re.compile(r'(?<=<mi) mathvariant="double-struck">(\w)')  # which no browser draws
BLACKBOARD = {"R": ">ℝ", "E": ">𝔼"}
COMMAND_LINE = "api/command-line.md"
FILES = "files"  # where the site keeps what pages link to outside of docs
MARKUP = re.compile(r"([\\`*_{}\[\]#|])")


def on_config(config: Any) -> Any:
    """Show the version at the foot of every page."""
    import tangora

    config.copyright = f"tangora {tangora.__version__}, {config.copyright}"
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to outside of docs, and the page of the command line."""
    pages = [page for page in files if page.is_documentation_page()]
    linked = {path for page in pages for path in _linked(page)}
    for file in sorted({file for path in linked for file in _listed(path)}):
        where = f"{FILES}/{_name(file)}" + (".txt" if file.suffix == ".md" else "")
        files.append(File.generated(config, where, abs_src_path=file))
    for path in sorted(linked):
        if path.is_dir():
            files.append(
                File.generated(config, f"{FILES}/{_name(path)}/index.html", content=_folder_page(path))
            )
    files.append(File.generated(config, COMMAND_LINE, content="\n".join(_command_line())))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001
    """Lead links that leave docs to the copies in the site."""

    def led(match: re.Match[str]) -> str:
        target = _target(page.file, match[2])
        if target is None:
            return match[0]
        depth = len(PurePosixPath(page.file.src_uri).parts) - 1
        where = (
            f"{FILES}/{_name(target)}"
            + ("/index.html" if target.is_dir() else "")
            + (".txt" if target.suffix == ".md" else "")
        )
        return f"{match[1]}{'../' * depth}{where}{match[3]}"

    return LINK.sub(led, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001
    """Write formulas as MathML, which browsers draw themselves."""

    def drawn(match: re.Match[str]) -> str:
        inline = match[2] is not None
        latex = html.unescape(match[2] if inline else match[3])
        mathml = latex2mathml.converter.convert(latex, display="inline" if inline else "block")
        return DOUBLE_STRUCK.sub(lambda letter: BLACKBOARD[letter[1]], mathml)

    return FORMULA.sub(drawn, content)


def _target(file: Any, link: str) -> Path | None:
    path = (ROOT / "docs" / file.src_uri).parent.joinpath(link).resolve()
    inside = path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs")
    return path if inside and path.exists() else None  # MkDocs itself warns about what does not exist


def _linked(file: Any) -> Iterator[Path]:
    for match in LINK.finditer(Path(file.abs_src_path).read_text(encoding="utf-8")):
        if (target := _target(file, match[2])) is not None:
            yield target


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _listed(path: Path) -> list[Path]:
    found = [path] if path.is_file() else sorted(path.iterdir())
    return [file for file in found if file.is_file()]


def _folder_page(path: Path) -> str:
    names = [file.name + (".txt" if file.suffix == ".md" else "") for file in _listed(path)]
    items = "\n".join(f'<li><a href="{name}">{name}</a></li>' for name in names)
    return f"<!doctype html><meta charset=utf-8><title>{_name(path)}</title><h1>{_name(path)}</h1><ul>{items}</ul>"


def _command_line() -> Iterator[str]:
    """Yield the lines of a page with every command, its examples and a table of flags for each panel of its help."""
    from tangora.cli import app

    group: Any = typer.main.get_command(app)
    yield "# Command line\n"
    yield "Every flag is also a key of a YAML file (`--config`), with underscores in place of hyphens.\n"
    for name, command in group.commands.items():
        text, examples = (*re.split("Examples?:", re.sub(r"\[/?dim\]", "", command.help or "")), "")[:2]
        yield f"## tangora {name}\n\n{_plain(text.strip())}\n"
        if examples.strip():
            yield f"```bash\n{inspect.cleandoc(examples)}\n```\n"
        panels: dict[str, list[str]] = {}
        for parameter in command.params:
            if not getattr(parameter, "hidden", False):
                panel = getattr(parameter, "rich_help_panel", None) or "Arguments"
                panels.setdefault(panel, []).append(_row(parameter))
        for panel, rows in panels.items():
            yield "\n".join([f"| {panel} | |", "|---|---|", *rows]) + "\n"


def _row(parameter: Any) -> str:
    flags = [name for name in parameter.opts if name.startswith("-")]
    names = ", ".join(f"`{name}`" for name in flags or [parameter.metavar])
    value = f" `{parameter.metavar}`" if flags and parameter.metavar else ""
    text = _plain(" ".join((parameter.help or "").split()))
    return "| " + (names + value).replace("|", r"\|") + f" | {text} |"


def _plain(text: str) -> str:
    """Keep Markdown from reading marks in a help text, such as asterisks in a pattern; its marks are Rich's."""
    return MARKUP.sub(r"\\\1", html.escape(text.replace(r"\[", "["), quote=False))

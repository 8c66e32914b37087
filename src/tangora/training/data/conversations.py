"""Reads the dialogues of ChatterBot's corpus as conversations of a user and an assistant."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from tangora.training.data.readers import RawData, RawRow

_ROLES = ("user", "assistant")
_MOST_TURNS = 8  # one entry of the trivia is a list of 44 questions


def read_chatterbot(folder: Path, name: str) -> RawData:
    """Read a folder of YAML files, each with a list of conversations; their turns belong to two in turn."""
    rows = [row for path in sorted(folder.glob("*.yml")) for row in _conversations(path)]
    return RawData({"train": rows}, name=name)


def _conversations(path: Path) -> Iterator[RawRow]:
    conversations = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)["conversations"]
    for number, said in enumerate(conversations, start=1):
        turns = [
            str(each).strip() for each in said[: len(said) // 2 * 2]
        ]  # a question without an answer is left out
        if turns and all(turns) and len(turns) <= _MOST_TURNS:
            messages = [{"role": _ROLES[index % 2], "content": turn} for index, turn in enumerate(turns)]
            yield RawRow(f"{path.name}: conversation {number}", {"messages": messages})

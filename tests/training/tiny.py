"""Tiny data, made on the fly: rows, files, examples."""

import json

import torch

from tests.models import WORDS


def labelled_examples(count=11):
    """Texts of different lengths with one of three labels."""
    words = WORDS[:7]
    return [
        {"text": " ".join(words[(index + step) % 7] for step in range(1 + index % 5)), "label": index % 3}
        for index in range(count)
    ]


def causal_examples(count=7):
    """Sums of different lengths."""
    return [
        {"prompt": f"{index} + {index * index} =", "completion": f"{index + index * index}"}
        for index in range(count)
    ]


def rng_state_unchanged(action):
    """Run an action and say whether torch's random state is as before."""
    before = torch.get_rng_state()
    action()
    return torch.equal(before, torch.get_rng_state())


def labelled_rows(count=20):
    """Rows of different texts with two labels."""
    return [{"text": f"text {index}", "label": ["yes", "no"][index % 2]} for index in range(count)]


def reviews(count=200):
    """Cells of different texts with two labels."""
    return [[f"film {index}", ["bad", "good"][index % 2]] for index in range(count)]


def write_jsonl(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def write_csv(path, header, lines):
    path.write_text("".join(",".join(line) + "\n" for line in [header, *lines]))
    return str(path)

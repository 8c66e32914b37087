"""Tiny data, made on the fly: rows, files, examples."""

import json

import numpy
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from tests.models import WORDS, clip_tokenizer, tiny_clip


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


def write_clip(folder):
    """Write a tiny CLIP model as it is published: whole, with its tokenizer and image processor."""
    tiny_clip().save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(
        folder
    )
    return str(folder)


def picture(number, colour):
    """A picture of 12 x 10 pixels, noisy, in which one channel is bright."""
    values = numpy.random.default_rng(number).integers(0, 60, (10, 12, 3))
    values[..., colour] += 150
    return Image.fromarray(values.astype("uint8"))


def write_pictures(folder, count=30, names=("red_cat", "GreenDog", "blue_sea")):
    """Write pictures of three colours, each in the folder of its label."""
    for number in range(count):
        colour = number % 3
        (folder / names[colour]).mkdir(parents=True, exist_ok=True)
        picture(number, colour).save(folder / names[colour] / f"{number}.png")
    return str(folder)

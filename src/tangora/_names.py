"""Names that settings accept. They stand here so that the command line can check them without torch."""

from typing import Literal, TypeAlias, get_args

Kind: TypeAlias = Literal["classification", "causal"]
"""Training objective of a model: one label per text or image, or the next token."""

KINDS: tuple[Kind, ...] = get_args(Kind)

Tracker: TypeAlias = Literal["tensorboard", "trackio", "wandb"]
"""Where live curves can be sent."""

SpaceName: TypeAlias = Literal["tangent", "weights", "factors"]
"""Directions over which curvature is measured."""

# not read from the type: typing gives one object for the same names in any order
SPACES: tuple[SpaceName, ...] = ("tangent", "weights", "factors")

Status: TypeAlias = Literal["finished", "diverged", "out_of_memory", "failed"]
"""Final state of a run."""

STATUSES: tuple[Status, ...] = get_args(Status)

CHAT_TEMPLATES = ("alpaca",)
"""Chat templates for tokenizers that have none."""

DIAGNOSED_STARTS = ("lora", "orthogonal", "pissa", "lora-ga", "lora-one")
"""Initializations that a diagnosis can compare."""

MODELS: dict[str, str] = {
    "minilm-l6": "all-MiniLM-L6-v2: a sentence encoder with 23 million parameters, for classification",
    "smollm2-135m": "SmolLM2-135M-Instruct, dequantized from Q4_1 (4 bits): text generation or classification",
    "vit-digits": "a small vision transformer, pretrained here on images of the digits 0 to 4",
}
"""Models that need no hub, and what they are."""

DATA: dict[str, str] = {
    "bbc-news": "2125 news articles in five classes",
    "chatterbot": "about 700 short English conversations, trivia and programming questions among them",
    "digits": "8x8 images of the digits 5 to 9",
    "digits-permuted": "8x8 images of all ten digits, with permuted pixels",
    "python-functions": "136 short Python functions to complete, with tests; stands in for CodeFeedback and HumanEval",
    "everyday-choices": "questions with four answers each, which things fit; stands in for commonsense_170k",
    "mnist-5k": "5000 digits of MNIST, shrunk to 8x8",
    "textures": "8x8 patches from photographs of brick, grass and gravel",
    "reasoning-gym:": "reasoning-gym:NAME[,key=value...] generates questions and answers, e.g. reasoning-gym:chain_sum",
}
"""Data that needs no hub, and what it is."""

USER_LOG = "tangora.notes"
"""Logger of messages for the user during a command; the command line prints them."""

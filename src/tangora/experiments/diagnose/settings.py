"""What `tangora diagnose` looks at."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, field_validator

from tangora._checks import check_choice
from tangora._names import STARTS, Kind
from tangora.experiments.values import Device, Seed, Settings, Targets


class DiagnoseSettings(Settings):
    """Model, data, and what to look at."""

    groups: ClassVar[Mapping[str, str]] = {
        "model": "Model and data",
        "rank": "Adapter",
        "starts": "Measurements",
        "num_examples": "Accuracy and cost",
    }
    aliases: ClassVar[Mapping[str, str]] = {
        "r": "rank",
        "lora_r": "rank",
        "lora_alpha": "alpha",
        "max_seq_length": "max_length",
    }

    model: str = Field(
        default="minilm-l6", description="Base model: packaged name, local folder, GGUF file or hub name."
    )
    data: str = Field(
        default="bbc-news",
        description="Data set: packaged name, reasoning-gym:NAME, local file or folder, or hub name.",
    )
    kind: Kind | None = Field(
        default=None, description="Type of task. Default: recognised from the columns of the data."
    )
    text_column: str | None = Field(default=None, description="Column of the text.")
    label_column: str | None = Field(default=None, description="Column of the label.")
    prompt_column: str | None = Field(default=None, description="Column of the prompt.")
    completion_column: str | None = Field(default=None, description="Column of the completion.")
    chat_template: bool | None = Field(
        default=None, description="Write causal examples with the tokenizer's chat template, as in train."
    )
    num_train: int | None = Field(
        default=None,
        ge=1,
        description="Training examples, as in train. Default: all that are not set aside.",
    )
    num_validation: int | None = Field(default=None, ge=1, description="Validation examples, as in train.")
    num_test: int | None = Field(default=None, ge=1, description="Test examples, as in train.")
    max_length: int = Field(
        default=128, ge=2, description="Maximum tokens per example (max_seq_length); longer ones are cut."
    )
    adapter: str | None = Field(
        default=None, description="Folder of a saved adapter. Default: a new LoRA adapter."
    )
    rank: int | None = Field(
        default=None, ge=1, description="Rank (r) of the initializations. Default: the adapter's, or 8."
    )
    budget_rank: int | None = Field(
        default=None,
        ge=1,
        description="Uniform rank whose number of parameters the rank plan may use. Default: rank.",
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="LoRA alpha (lora_alpha) at budget_rank, for the rank plan. Default: scaling unchanged.",
    )
    target_modules: Targets = Field(
        default="all-linear",
        description="Layers to adapt: names separated by commas, a pattern, or all-linear (target_modules).",
    )
    starts: list[str] = Field(
        default=list(STARTS), description="Initializations to compare, separated by commas."
    )
    num_examples: int = Field(default=32, ge=1, description="Training examples for the gradient.")
    num_held_out: int = Field(
        default=32,
        ge=0,
        description="Further training examples, held out to evaluate the initializations.",
    )
    batch_size: int = Field(default=4, ge=1, description="Examples per batch.")
    exact_norms: bool | None = Field(
        default=None,
        description="Form the gradients to get exact norms. Default: where they fit into memory.",
    )
    power_iterations: int = Field(
        default=1,
        ge=0,
        description="Power iterations that sharpen the singular values, two passes over the data each.",
    )
    seed: Seed = Field(default=0, description="Seed of random vectors, initializations and a new head.")
    device: Device = Field(
        default=None, description="Device: cpu, cuda, cuda:N or mps. Default: a GPU if there is one."
    )

    @field_validator("starts", mode="before")
    @classmethod
    def _known(cls, starts: object) -> object:
        if isinstance(starts, str):
            starts = _names(starts)
        for start in starts if isinstance(starts, list) else ():
            check_choice("starts", start, STARTS)
        return starts


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]

"""Settings that name a model and data, and say how the data are read."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, field_validator

from tangora._checks import check_choice
from tangora._names import CHAT_TEMPLATES, Kind
from tangora.experiments.values import Device, Settings


class ModelSettings(Settings):
    """A model by name."""

    model: str = Field(
        default="minilm-l6", description="Base model: packaged name, local folder, GGUF file or hub name."
    )


class DataSettings(Settings):
    """Data by name, how they are read, and where."""

    aliases: ClassVar[Mapping[str, str]] = {"max_seq_length": "max_length"}

    data: str = Field(
        default="bbc-news",
        description="Data set: packaged name, reasoning-gym:NAME, local file (.jsonl .json .csv .tsv .parquet), folder "
        "of LABEL/*.txt or LABEL/*.png, or hub name: owner/name or owner/name/config.",
    )
    kind: Kind | None = Field(
        default=None, description="Type of task. Default: recognised from the columns of the data."
    )
    text_column: str | None = Field(
        default=None,
        description="Column of the text, or of images; a,b for sentence pairs, a|b for the first column that exists. "
        "Default, as for the other columns: recognised by its name.",
    )
    label_column: str | None = Field(default=None, description="Column of the label, for classification.")
    prompt_column: str | None = Field(
        default=None,
        description="Column of the prompt. A causal example is prompt + newline + completion + eos; the loss counts "
        "the completion.",
    )
    completion_column: str | None = Field(default=None, description="Column of the completion.")
    chat_template: bool | str | None = Field(
        default=None,
        description="Write causal examples with the tokenizer's chat template. Conversations (column messages) need "
        "it; --no-chat-template joins their turns by newlines instead. In YAML also alpaca, for base models.",
    )
    class_prompts: str | list[str] | None = Field(
        default=None, description="Template(s) of CLIP's prompt for a class, such as: a photo of a {}."
    )
    num_train: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Training examples. Default: all examples that are not in the validation and test sets."
        ),
    )
    num_validation: int | None = Field(
        default=None,
        ge=1,
        description="Validation examples, used to select the learning rate. Default: a fifth of the data, at most 200.",
    )
    num_test: int | None = Field(
        default=None,
        ge=1,
        description="Test examples, used for the reported metrics. Default: a fifth of the data, at most 500.",
    )
    max_length: int = Field(
        default=128,
        ge=2,
        description=(
            "Maximum tokens per example (max_seq_length); longer examples are truncated, and their number "
            "is reported."
        ),
    )
    device: Device = None

    @field_validator("chat_template")
    @classmethod
    def _known_template(cls, chosen: bool | str | None) -> bool | str | None:
        if isinstance(chosen, str):
            check_choice("chat_template", chosen, CHAT_TEMPLATES)
        return chosen

    @property
    def any_gpu(self) -> bool:
        """Whether any GPU will do."""
        return self.device in (None, "cuda")

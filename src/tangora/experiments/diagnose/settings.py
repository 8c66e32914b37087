"""What `tangora diagnose` looks at."""

from pydantic import Field, field_validator

from tangora._checks import check_choice
from tangora._names import STARTS, Kind
from tangora.experiments.settings import Settings


class DiagnoseSettings(Settings):
    """Model, data, and what to look at."""

    model: str = Field(default="minilm-l6", description="Packaged name, local folder, GGUF file or hub name.")
    data: str = Field(
        default="bbc-news", description="Packaged name, reasoning-gym:<name>, local file or hub name."
    )
    kind: Kind | None = Field(
        default=None, description="classification or causal; default: what the data is."
    )
    text_column: str | None = Field(default=None, description="Column of the text.")
    label_column: str | None = Field(default=None, description="Column of the label.")
    prompt_column: str | None = Field(default=None, description="Column of the prompt.")
    completion_column: str | None = Field(default=None, description="Column of the completion.")
    chat_template: bool | None = Field(
        default=None, description="Write causal examples with the tokenizer's chat template, as in train."
    )
    num_train: int | None = Field(
        default=None, ge=1, description="Training examples, as in train; default: all that remain."
    )
    num_validation: int | None = Field(default=None, ge=1, description="Examples kept apart, as in train.")
    num_test: int | None = Field(default=None, ge=1, description="Examples kept apart, as in train.")
    num_examples: int = Field(default=32, ge=1, description="Training examples whose gradient is read.")
    num_held_out: int = Field(
        default=32, ge=0, description="Further training examples, on which the starts are looked at too."
    )
    batch_size: int = Field(default=4, ge=1, description="Examples at once.")
    max_length: int = Field(default=128, ge=2, description="Tokens per example; longer ones are cut.")
    adapter: str | None = Field(
        default=None, description="Folder of a saved adapter; default: a plain LoRA start."
    )
    rank: int | None = Field(
        default=None, ge=1, description="Rank of the starts; default: the adapter's, or 8."
    )
    budget_rank: int | None = Field(
        default=None,
        ge=1,
        description="Uniform rank whose parameters the rank plan may spend; default: rank.",
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="LoRA's alpha at budget_rank, for the plan; default: scaling unchanged.",
    )
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="Layers to adapt, as PEFT takes them; a saved adapter knows its own.",
    )
    starts: list[str] = Field(default=list(STARTS), description="Starts to compare.")
    exact_norms: bool | None = Field(
        default=None, description="Form the gradients for exact norms; default: where they fit into memory."
    )
    power_iterations: int = Field(
        default=1, ge=0, description="Rounds that sharpen the singular values, two passes each."
    )
    seed: int = Field(default=0, ge=0, description="Seed of random vectors, starts and a new head.")

    @field_validator("target_modules")
    @classmethod
    def _separated(cls, targets: str | list[str]) -> str | list[str]:
        # PEFT reads a single string as a pattern; names come separated by commas from the command line
        return _names(targets) if isinstance(targets, str) and "," in targets else targets

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

"""What `tangora curvature` measures."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tangora._checks import check_choice
from tangora._names import SPACES, Kind, Space
from tangora.experiments.values import Device, Seed, Settings

RECORD = "curvature.json"
"""Name of the file in an output folder."""


class CurvatureSettings(Settings):
    """Whose curvature, on what data, and how much of it; what is not given is the run's own."""

    groups: ClassVar[Mapping[str, str]] = {
        "source": "Model and data",
        "over": "Measurements",
        "num_examples": "Accuracy and cost",
    }
    aliases: ClassVar[Mapping[str, str]] = {"max_seq_length": "max_length"}

    source: str = Field(
        default="minilm-l6",
        description="Run folder, or a model: packaged name, local folder, GGUF file or hub name.",
    )
    data: str | None = Field(
        default=None,
        description="Data set: packaged name, reasoning-gym:NAME, local file or folder, or hub name. Default: the "
        "run's, or bbc-news.",
    )
    kind: Kind | None = Field(
        default=None, description="Type of task. Default: recognised from the columns of the data."
    )
    text_column: str | None = Field(default=None, description="Column of the text.")
    label_column: str | None = Field(default=None, description="Column of the label.")
    prompt_column: str | None = Field(default=None, description="Column of the prompt.")
    completion_column: str | None = Field(default=None, description="Column of the completion.")
    chat_template: bool | None = Field(
        default=None,
        description="Write causal examples with the tokenizer's chat template. Default: as the run.",
    )
    num_train: int | None = Field(default=None, ge=1, description="Training examples, as in train.")
    num_validation: int | None = Field(default=None, ge=1, description="Validation examples, as in train.")
    num_test: int | None = Field(default=None, ge=1, description="Test examples, as in train.")
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Maximum tokens per example (max_seq_length). Default: the run's, or 128.",
    )
    adapter: str | None = Field(default=None, description="Folder of a saved adapter, for a model.")
    split: Literal["train", "validation", "test"] = Field(
        default="train", description="Split whose loss is measured."
    )
    over: list[Space] | None = Field(
        default=None,
        min_length=1,
        description="Parameter spaces, separated by commas: tangent, factors, weights. Default: tangent,factors with "
        "an adapter, weights without.",
    )
    layers: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Names or patterns of layers, separated by commas. Default: all.",
    )
    top: int = Field(default=5, ge=1, description="Number of largest eigenvalues.")
    gauss_newton: bool = Field(default=False, description="Measure the Gauss-Newton matrix too.")
    per_layer: bool = Field(
        default=False, description="Trace of every layer, and its share of the top eigenvector."
    )
    layer_eigenvalues: bool = Field(
        default=False, description="Largest eigenvalue of every layer, by an iteration for each."
    )
    per_batch: bool = Field(default=False, description="Largest eigenvalue and trace of every mini-batch.")
    landscape: bool = Field(default=False, description="Loss along and across the top eigenvectors.")
    landscape_points: int = Field(
        default=11, ge=3, description="Points along each direction of the landscape, an odd number."
    )
    radius: float = Field(
        default=0.05,
        ge=0,
        description="Radius of the ball in which the largest loss is searched for; 0 switches it off.",
    )
    num_examples: int = Field(default=32, ge=1, description="Number of examples, the first of the split.")
    batch_size: int = Field(
        default=8, ge=1, description="Examples per batch; per-batch measures each of these batches."
    )
    tolerance: float = Field(
        default=1e-2, gt=0, lt=1, description="Relative residual at which an eigenvalue has converged."
    )
    max_products: int = Field(
        default=20, ge=2, description="Maximum Hessian-vector products for the eigenvalues."
    )
    probes: int = Field(default=2, ge=1, description="Random vectors for the spectral density.")
    steps: int = Field(default=10, ge=2, description="Lanczos steps per random vector.")
    trace_products: int = Field(default=9, ge=6, description="Hessian-vector products for the trace.")
    cache_graph: bool | None = Field(
        default=None,
        description="Keep the graph of every batch: half the time, much more memory. Default: with a single batch.",
    )
    float64: bool = Field(default=False, description="Compute in float64.")
    seed: Seed = Field(default=0, description="Seed of the random vectors and of a new head.")
    device: Device = Field(
        default=None, description="Device: cpu, cuda, cuda:N or mps. Default: a GPU if there is one."
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_names(cls, value: object) -> object:
        return _separated(value)

    @field_validator("over", mode="before")
    @classmethod
    def _space_names(cls, value: object) -> object:
        names = _separated(value)
        for name in names if isinstance(names, list) else ():
            check_choice("over", name, SPACES)
        return names

    @field_validator("landscape_points")
    @classmethod
    def _odd(cls, points: int) -> int:
        if points % 2 == 0:
            raise ValueError(
                f"landscape_points must be odd, so that the point itself is one of them; got {points}"
            )
        return points

    @model_validator(mode="after")
    def _several_batches(self) -> "CurvatureSettings":
        if self.per_batch and self.num_examples <= self.batch_size:
            raise ValueError(
                f"per_batch compares mini-batches, and num_examples = {self.num_examples} with batch_size = "
                f"{self.batch_size} gives one; give more examples or a smaller batch_size"
            )
        return self


def _separated(value: object) -> object:
    # names come separated by commas from the command line
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

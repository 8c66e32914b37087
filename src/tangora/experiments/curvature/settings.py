"""What `tangora curvature` measures."""

from typing import Literal

from pydantic import Field, field_validator

from tangora._checks import check_choice
from tangora._names import SPACES, Kind, Space
from tangora.experiments.settings import Settings

RECORD = "curvature.json"
"""Name of the file in an output folder."""


class CurvatureSettings(Settings):
    """Whose curvature, on what data, and how much of it; what is not given is the run's own."""

    source: str = Field(
        default="minilm-l6", description="Run folder, or a model: packaged name, folder, hub name."
    )
    data: str | None = Field(
        default=None,
        description="Packaged name, reasoning-gym:<name>, local file or hub name; default: the run's, or bbc-news.",
    )
    kind: Kind | None = Field(
        default=None, description="classification or causal; default: what the data is."
    )
    text_column: str | None = Field(default=None, description="Column of the text.")
    label_column: str | None = Field(default=None, description="Column of the label.")
    prompt_column: str | None = Field(default=None, description="Column of the prompt.")
    completion_column: str | None = Field(default=None, description="Column of the completion.")
    chat_template: bool | None = Field(
        default=None,
        description="Write causal examples with the tokenizer's chat template; default: as the run.",
    )
    num_train: int | None = Field(default=None, ge=1, description="Training examples, as in train.")
    num_validation: int | None = Field(default=None, ge=1, description="Examples kept apart, as in train.")
    num_test: int | None = Field(default=None, ge=1, description="Examples kept apart, as in train.")
    max_length: int | None = Field(
        default=None, ge=2, description="Tokens per example; default: the run's, or 128."
    )
    adapter: str | None = Field(default=None, description="Folder of a saved adapter, for a model.")
    split: Literal["train", "validation", "test"] = Field(
        default="train", description="Whose loss: train, validation or test."
    )
    num_examples: int = Field(default=32, ge=1, description="Examples, the first of the split.")
    batch_size: int = Field(
        default=8, ge=1, description="Examples at once, and in a mini-batch of --per-batch."
    )
    over: list[Space] | None = Field(
        default=None,
        min_length=1,
        description="tangent, factors, weights, separated by commas; default: tangent,factors with an adapter, "
        "weights without.",
    )
    layers: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Names or patterns of layers, separated by commas; default: all.",
    )
    top: int = Field(default=5, ge=1, description="Largest eigenvalues.")
    tolerance: float = Field(default=1e-2, gt=0, lt=1, description="Relative residual of an eigenvalue.")
    max_products: int = Field(default=20, ge=2, description="Products that the eigenvalues may take.")
    probes: int = Field(default=2, ge=1, description="Random vectors of the spectral density.")
    steps: int = Field(default=10, ge=2, description="Lanczos steps for each.")
    trace_products: int = Field(default=9, ge=6, description="Products that the trace may take.")
    radius: float = Field(
        default=0.05, ge=0, description="Radius of the ball in which the largest loss is looked for; 0: none."
    )
    gauss_newton: bool = Field(default=False, description="The Gauss-Newton matrix beside the Hessian.")
    per_layer: bool = Field(
        default=False, description="Trace and part in the top eigenvector of every layer."
    )
    layer_eigenvalues: bool = Field(
        default=False, description="Also every layer's own largest eigenvalue, an iteration for each."
    )
    per_batch: bool = Field(default=False, description="Largest eigenvalue and trace of every mini-batch.")
    landscape: bool = Field(default=False, description="The loss along and across the top eigenvectors.")
    landscape_points: int = Field(default=11, ge=3, description="Points along each direction, odd.")
    cache_graph: bool | None = Field(
        default=None,
        description="Keep the graph of every batch: half the time, much memory; default: where there is one batch.",
    )
    float64: bool = Field(default=False, description="Compute in float64.")
    seed: int = Field(default=0, ge=0, description="Seed of random vectors and of a new head.")

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


def _separated(value: object) -> object:
    # names come separated by commas from the command line
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

"""Settings of `tangora diagnose` and `tangora curvature`: quantities, model and data."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from tangora._checks import check_choice
from tangora._names import DIAGNOSED_STARTS, SpaceName
from tangora.experiments.data_settings import DataSettings, ModelSettings
from tangora.experiments.values import Seed, Separated, Targets

CURVATURE_RECORD = "curvature.json"
"""Name of the file in an output folder of `tangora curvature`."""


class DiagnoseSettings(DataSettings, ModelSettings):
    """Model, data, and what to look at."""

    groups: ClassVar[Mapping[str, str]] = {
        "model": "Model and data",
        "device": "Accuracy and cost",
        "adapter": "Model and data",
        "rank": "Adapter",
        "starts": "Measurements",
        "num_examples": "Accuracy and cost",
    }
    aliases: ClassVar[Mapping[str, str]] = {
        **DataSettings.aliases,
        "r": "rank",
        "lora_r": "rank",
        "lora_alpha": "alpha",
    }

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
        description="LoRA alpha (lora_alpha) at --budget-rank, for the rank plan. Default: scaling unchanged.",
    )
    target_modules: Targets = "all-linear"
    starts: Annotated[list[str], Separated] = Field(
        default=list(DIAGNOSED_STARTS), description="Initializations to compare, separated by commas."
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
        description="Compute the full gradients for exact norms. Default: if they fit into memory.",
    )
    power_iterations: int = Field(
        default=1,
        ge=0,
        description="Power iterations that sharpen the singular values, two passes over the data each.",
    )
    seed: Seed = Field(default=0, description="Seed of random vectors, initializations and a new head.")

    @field_validator("starts")
    @classmethod
    def _known(cls, starts: list[str]) -> list[str]:
        for start in starts:
            check_choice("starts", start, DIAGNOSED_STARTS)
        return starts


class CurvatureSettings(DataSettings):
    """Whose curvature, on what data, and how much of it; what is not given is the run's own."""

    groups: ClassVar[Mapping[str, str]] = {
        "data": "Model and data",
        "device": "Accuracy and cost",
        "source": "Model and data",
        "over": "Measurements",
        "num_examples": "Accuracy and cost",
    }

    data: str | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        description="Data set: packaged name, reasoning-gym:NAME, local file or folder, or hub name. Default: the "
        "run's, or bbc-news.",
    )
    max_length: int | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        ge=2,
        description="Maximum tokens per example (max_seq_length). Default: the run's, or 128.",
    )
    source: str = Field(
        default="minilm-l6",
        description="Run folder, or a model: packaged name, local folder, GGUF file or hub name.",
    )
    adapter: str | None = Field(default=None, description="Folder of a saved adapter, for a model.")
    split: Literal["train", "validation", "test"] = Field(
        default="train", description="Split whose loss is measured."
    )
    over: Annotated[list[SpaceName] | None, Separated] = Field(
        default=None,
        min_length=1,
        description="Parameter spaces, separated by commas: tangent, factors, weights. Default: tangent,factors with "
        "an adapter, weights without.",
    )
    layers: Annotated[list[str] | None, Separated] = Field(
        default=None,
        min_length=1,
        description="Names or patterns of layers, separated by commas. Default: all.",
    )
    top: int = Field(default=5, ge=1, description="Number of largest eigenvalues.")
    gauss_newton: bool = Field(default=False, description="Also measure the Gauss-Newton matrix.")
    empirical_fisher: bool = Field(
        default=False,
        description=(
            "Also measure the empirical Fisher matrix: the second moment of the gradients of single labels."
        ),
    )
    per_layer: bool = Field(
        default=False, description="Trace of every layer, and its share of the top eigenvector."
    )
    layer_eigenvalues: bool = Field(
        default=False, description="Largest eigenvalue of every layer, with one Lanczos iteration per layer."
    )
    per_batch: bool = Field(default=False, description="Largest eigenvalue and trace of every mini-batch.")
    landscape: bool = Field(default=False, description="Loss along and across the top eigenvectors.")
    landscape_points: int = Field(
        default=11, ge=3, description="Points along each direction of the landscape, an odd number."
    )
    radius: float = Field(
        default=0.05,
        ge=0,
        description="Radius of the ball in which the largest loss is searched; 0: off.",
    )
    num_examples: int = Field(default=32, ge=1, description="Number of examples, the first of the split.")
    batch_size: int = Field(
        default=8, ge=1, description="Examples per batch; --per-batch measures each of these batches."
    )
    tolerance: float = Field(
        default=1e-2, gt=0, lt=1, description="Relative residual at which an eigenvalue has converged."
    )
    max_products: int = Field(
        default=20, ge=2, description="Maximum Hessian-vector products for the eigenvalues."
    )
    probes: int = Field(default=2, ge=1, description="Number of random vectors for the spectral density.")
    steps: int = Field(default=10, ge=2, description="Lanczos steps per random vector.")
    trace_products: int = Field(default=9, ge=6, description="Hessian-vector products for the trace.")
    cache_graph: bool | None = Field(
        default=None,
        description="Keep the graph of every batch: half the time, much more memory. Default: with a single batch.",
    )
    float64: bool = Field(default=False, description="Compute in float64.")
    seed: Seed = Field(default=0, description="Seed of the random vectors and of a new head.")

    @field_validator("landscape_points")
    @classmethod
    def _odd(cls, points: int) -> int:
        if points % 2 == 0:
            raise ValueError(
                f"landscape_points must be odd, so that the current weights are one of them; got {points}"
            )
        return points

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # files that were written without it stay as they are
        return {key: value for key, value in handler(self).items() if value or key != "empirical_fisher"}

    @model_validator(mode="after")
    def _several_batches(self) -> "CurvatureSettings":
        if self.per_batch and self.num_examples <= self.batch_size:
            raise ValueError(
                f"per_batch compares mini-batches, and num_examples = {self.num_examples} with batch_size = "
                f"{self.batch_size} is only one mini-batch; use more examples or a smaller batch_size"
            )
        return self

"""Settings of evaluation on tasks of lm-eval."""

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from tangora._checks import check_installed
from tangora.experiments.values import Separated, Settings


class BenchmarkSettings(Settings):
    """Benchmarks after training."""

    benchmarks: Annotated[list[str] | None, Separated] = Field(
        default=None,
        min_length=1,
        description="Tasks of lm-eval, evaluated after training, separated by commas (causal models; needs lm-eval).",
    )
    benchmark_limit: int | None = Field(
        default=None, ge=1, description="Examples of each benchmark. Default: all."
    )
    benchmark_path: str | None = Field(
        default=None, description="Folder with further tasks for lm-eval, as YAML files (include_path)."
    )
    execute_code: bool = Field(
        default=False,
        description="Run the programs generated for code benchmarks, in a sandbox, and count those that pass. Default: "
        "programs are only written to files.",
    )

    @field_validator("benchmarks")
    @classmethod
    def _evaluable(cls, names: list[str] | None) -> list[str] | None:
        if names is not None:
            check_installed("lm_eval", "benchmarks", "'tangora[eval]'")
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"benchmarks must differ from each other; got {twice[0]} twice")
        return names

    @model_validator(mode="after")
    def _about_benchmarks(self) -> "BenchmarkSettings":
        for key in ("benchmark_limit", "benchmark_path", "execute_code"):
            if getattr(self, key) and not self.benchmarks:
                raise ValueError(f"{key} needs benchmarks; got {getattr(self, key)!r} alone")
        return self

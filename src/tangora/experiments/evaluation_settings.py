"""Settings of what is evaluated beyond losses: answers to compare with right ones, and answers to keep."""

import shlex
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from tangora.experiments.benchmark_settings import BenchmarkSettings


class EvaluationSettings(BenchmarkSettings):
    """Generated answers: which prompts, their maximal length, and their judge."""

    aliases: ClassVar[Mapping[str, str]] = {"stop_strings": "stop"}

    exact_match: bool = Field(
        default=False,
        description="Generate answers to validation and test prompts and count exact matches (causal models).",
    )
    prompts: str | list[str | list[str]] | None = Field(
        default=None,
        description="Prompts to answer after training, into answers.jsonl: a file or hub data set with a column "
        "prompt or turns, such as HuggingFaceH4/mt_bench_prompts; in YAML also the prompts themselves.",
    )
    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Maximum tokens of a generated answer (max_new_tokens). Default: a little more than the longest "
        "completion, for --exact-match; 1024 for --prompts.",
    )
    stop: str | list[str] | None = Field(
        default=None,
        description="Text that ends a generated answer and is cut off (stop_strings); in YAML also a list of them.",
    )
    judge: str | list[str] | None = Field(
        default=None,
        description="Command that scores answers.jsonl, whose path it gets: it prints one number, or one JSON line per "
        "score. No shell.",
    )

    @field_validator("stop")
    @classmethod
    def _texts(cls, stop: str | list[str] | None) -> list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop
        if texts is not None and not all(texts):
            raise ValueError("stop must hold texts that are not empty; got ''")
        return texts or None

    @field_validator("judge")
    @classmethod
    def _command(cls, judge: str | list[str] | None) -> list[str] | None:
        words = shlex.split(judge) if isinstance(judge, str) else judge
        if words is not None and not words:
            raise ValueError("judge must be a command; it is empty")
        return words

    @field_validator("prompts")
    @classmethod
    def _turns(cls, prompts: Any) -> Any:
        if isinstance(prompts, str):
            return prompts
        given = [[each] if isinstance(each, str) else each for each in prompts or ()]
        if prompts is not None and not all(turns and all(map(str.strip, turns)) for turns in given or [[]]):
            raise ValueError("prompts must be texts, or lists of a conversation's turns, none of them empty")
        return given or None

    @model_validator(mode="after")
    def _needed(self) -> "EvaluationSettings":
        for key in ("max_new_tokens", "stop"):
            if getattr(self, key) is not None and not self.generates:
                raise ValueError(
                    f"{key} needs exact_match or prompts; got only {key} = {getattr(self, key)!r}"
                )
        if self.judge is not None and self.prompts is None:
            raise ValueError(f"judge needs prompts; got only judge = {shlex.join(self.judge)!r}")
        return self

    @property
    def generates(self) -> bool:
        """Whether a run writes answers."""
        return self.exact_match or self.prompts is not None

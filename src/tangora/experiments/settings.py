"""What a run needs to know, validated: every error names the key, the value and what is allowed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from tangora._checks import InputError
from tangora._names import Kind, Tracker
from tangora.recipes import recipe


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def grown_from(self, found: Mapping[str, Any]) -> set[str]:
        """Tell in which keys these settings ask for more of the same than others did.

        Args:
            found: The others, as JSON holds them.

        Returns:
            Keys that may differ, as what was done for the others is a part of what these want.
        """
        del found
        return set()


class TaskSettings(Settings):
    """Model, data and training budget: what all methods of a comparison share."""

    model: str = Field(default="minilm-l6", description="Packaged name, local folder, GGUF file or hub name.")
    data: str = Field(
        default="bbc-news", description="Packaged name, reasoning-gym:<name>, local file or hub name."
    )
    test_data: str | None = Field(
        default=None,
        description="Other data to test on: its test split, or all of it; default: part of data.",
    )
    kind: Kind | None = Field(
        default=None, description="classification or causal; default: what the data is."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of the frozen weights; what is trained is always float32."
    )
    text_column: str | None = Field(
        default=None, description="Column of the text; a,b for pairs, a|b for the first that there is."
    )
    label_column: str | None = Field(default=None, description="Column of the label.")
    prompt_column: str | None = Field(default=None, description="Column of the prompt.")
    completion_column: str | None = Field(default=None, description="Column of the completion.")
    num_train: int | None = Field(
        default=None, ge=1, description="Training examples; default: all that remain."
    )
    num_validation: int = Field(default=200, ge=1, description="Examples that choose the learning rate.")
    num_test: int = Field(default=500, ge=1, description="Examples that are reported.")
    steps: int = Field(default=100, ge=1, description="Optimizer steps.")
    batch_size: int = Field(default=16, ge=1, description="Examples per step and micro-batch.")
    accumulate: int = Field(default=1, ge=1, description="Micro-batches per step.")
    max_length: int = Field(default=128, ge=2, description="Tokens per example; longer ones are cut.")
    rank: int = Field(default=8, ge=1, description="LoRA's r.")
    alpha: float = Field(default=16.0, gt=0, description="LoRA's alpha.")
    target_modules: str | list[str] = Field(
        default="all-linear", description="Layers to adapt, as PEFT takes them."
    )
    start_examples: int = Field(
        default=32, ge=1, description="Training examples whose gradient a data-driven start reads."
    )
    rank_plan: dict[str, Any] | None = Field(
        default=None,
        description="rank_plan.json of tangora diagnose: other ranks for single layers; with its rank and alpha.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="After the warm-up."
    )
    warmup: float = Field(
        default=0.03, ge=0, lt=1, description="Share of the steps with rising learning rate."
    )
    head_learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Peak learning rate of a new classification head; default: the method's, mostly the adapter's.",
    )
    clip: float = Field(default=1.0, gt=0, description="Largest norm of the gradient of what is trained.")
    exact_match: bool = Field(
        default=False,
        description="Also generate answers to validation and test prompts and compare them (causal models).",
    )
    evaluate_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between evaluations on validation data; default: only at the end.",
    )
    save_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between checkpoints, from which a run that was cut off goes on; default: no checkpoints.",
    )
    report_to: list[Tracker] | None = Field(
        default=None,
        description="Live curves, separated by commas: tensorboard (events in each run's folder), trackio, wandb.",
    )
    forgetting: bool = Field(
        default=False, description="Also measure the loss on unrelated text before and after (causal models)."
    )
    measure_every: int | None = Field(
        None,
        ge=1,
        description="Steps between measured points of the trajectory, and snapshots of full; default: none.",
    )
    measure_gradient: int | None = Field(
        None, ge=1, description="Training examples whose gradient is read at every measured step."
    )
    curvature_every: int | None = Field(
        None,
        ge=1,
        description="Steps between measured points of the Hessian: largest eigenvalue, trace; default: none.",
    )
    curvature: bool | None = Field(
        default=None, description="Also measure at the end how flat the loss is, and the generalisation gap."
    )
    curvature_examples: int | None = Field(
        default=None,
        ge=1,
        description="Training examples, the curvature of whose loss is measured; default: 32, 16 while training.",
    )
    curvature_layers: str | None = Field(
        default=None,
        description="Pattern of the layers over whose weights it is measured at the end, such as *.layers.29.*, for "
        "models with many weights; default: all that are adapted.",
    )

    @field_validator("target_modules")
    @classmethod
    def _separated(cls, targets: str | list[str]) -> str | list[str]:
        # PEFT reads a single string as a pattern; names come separated by commas from the command line
        return (
            [name.strip() for name in targets.split(",")]
            if isinstance(targets, str) and "," in targets
            else targets
        )

    @field_validator("report_to", mode="before")
    @classmethod
    def _listed(cls, names: Any) -> Any:
        return [name.strip() for name in names.split(",")] if isinstance(names, str) else names

    @model_validator(mode="before")
    @classmethod
    def _with_plan(cls, values: Any) -> Any:
        # the plan itself is kept, so that a record says what was run; rank and alpha are its own unless given
        if not isinstance(values, dict) or not isinstance(values.get("rank_plan"), str):
            return values
        plan = _read_plan(values["rank_plan"])
        own = {
            key: plan[made_for]
            for key, made_for in (("rank", "r"), ("alpha", "lora_alpha"))
            if made_for in plan
        }
        return own | values | {"rank_plan": plan}

    @model_validator(mode="after")
    def _measured_first(self) -> "TaskSettings":
        if self.measure_gradient is not None and self.measure_every is None:
            raise ValueError(
                f"measure_gradient needs measure_every; got measure_gradient = {self.measure_gradient} alone"
            )
        return self

    @model_validator(mode="after")
    def _curved(self) -> "TaskSettings":
        measured = self.curvature or self.curvature_every
        if self.curvature_examples is not None and not measured:
            raise ValueError(
                f"curvature_examples needs curvature or curvature_every; got {self.curvature_examples} alone"
            )
        if self.curvature_layers is not None and not self.curvature:
            raise ValueError(f"curvature_layers needs curvature; got {self.curvature_layers!r} alone")
        return self

    def as_task(self) -> dict[str, Any]:
        """Return the arguments of ``load_task``.

        Returns:
            Keyword arguments but for ``spec``.
        """
        keys = ("kind", "num_train", "num_validation", "num_test")
        columns = ("text_column", "label_column", "prompt_column", "completion_column")
        return {key: getattr(self, key) for key in (*keys, *columns)} | {"test_spec": self.test_data}


class RunSettings(TaskSettings):
    """One run."""

    recipe: str = Field(default="tangent", description="Name of the method.")
    learning_rate: float | None = Field(
        None, gt=0, description="Peak; default: the recipe's second smallest."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the start, the data order and dropout.")
    reference: str | None = Field(
        default=None, description="Output folder of full fine-tuning with snapshots, to measure distances to."
    )

    @field_validator("recipe")
    @classmethod
    def _known(cls, name: str) -> str:
        return recipe(name).name

    @model_validator(mode="after")
    def _referred(self) -> "RunSettings":
        if self.reference is not None and self.measure_every is None:
            raise ValueError(f"reference needs measure_every; got reference = {self.reference!r} alone")
        return self

    @model_validator(mode="after")
    def _precise(self) -> "RunSettings":
        if self.dtype != "float32" and recipe(self.recipe).adapter is None:
            raise ValueError(f"dtype must be float32 where all weights are trained; got {self.dtype!r}")
        return self

    @property
    def peak(self) -> float:
        """The learning rate, with the recipe's default filled in."""
        given = self.learning_rate
        return given if given is not None else recipe(self.recipe).default_learning_rate


def _read_plan(path: str) -> dict[str, Any]:
    try:
        plan = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"rank_plan cannot be read: {error}") from None
    keys = ("rank_pattern", "alpha_pattern")
    if not isinstance(plan, dict) or any(not isinstance(plan.get(key), dict) for key in keys):
        raise ValueError(f"rank_plan must hold {' and '.join(keys)}")
    return {key: plan[key] for key in (*keys, "r", "lora_alpha", "use_rslora") if key in plan}


_SettingsT = TypeVar("_SettingsT", bound=Settings)


def validated(kind: type[_SettingsT], values: dict[str, Any], source: str = "") -> _SettingsT:
    """Make settings, with one-line errors.

    Args:
        kind: Class of the settings.
        values: By key.
        source: Where they come from, for the message.

    Returns:
        The settings.

    Raises:
        InputError: Naming the first bad key, its value and what is allowed.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        raise InputError(_first_problem(kind, error, f"{source}: " if source else "")) from None


def _first_problem(kind: type[Settings], error: ValidationError, source: str) -> str:
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0]) if first["loc"] else "settings"
    if first["type"] == "extra_forbidden":
        return f"{source}unknown key {key!r}; allowed: {', '.join(kind.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{source}{message}"
    return f"{source}{key}: {message[0].lower()}{message[1:]}; got {first['input']!r}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file.

    Args:
        path: The file.

    Returns:
        Its keys and values.

    Raises:
        InputError: If it cannot be read or holds no mapping; the message names file and line.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{place} is not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold keys and values; got {type(values).__name__}")
    return values


def run_settings(folder: Path) -> RunSettings:
    """Read the settings of a run.

    Args:
        folder: Output folder of ``tangora train``, or one of the ``runs`` of ``tangora compare``.

    Returns:
        Its settings.

    Raises:
        InputError: If the folder is none of these.
    """
    own, record = folder / "settings.json", folder.parent.parent / "records" / f"{folder.name}.json"
    source = own if own.is_file() else record
    try:
        values: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        raise InputError(
            f"{folder} is no run folder: it has no settings.json, and no record beside it"
        ) from None
    values = values if source is own else values.get("settings", {})
    known = {key: value for key, value in values.items() if key in RunSettings.model_fields}
    if "recipe" not in known:
        raise InputError(f"{folder} holds a comparison; choose one of its runs, {folder}/runs/NAME")
    return validated(RunSettings, known, str(source))


_NO_PART = {"report_to", "save_every", "title"}
"""Settings that change nothing of what is found."""


def claim_folder(folder: Path, settings: Settings, name: str = "settings.json") -> None:
    """Write the settings into an output folder, or check that it belongs to them.

    Args:
        folder: Output folder, created when missing.
        settings: What will be run there.
        name: Name of the file.

    Raises:
        InputError: If the folder belongs to another configuration (the message names the first difference), or holds
            something else.
    """
    path = folder / name
    wanted = json.loads(settings.model_dump_json())
    if path.exists():
        # what an older version did not know was as it is by default
        fields = type(settings).model_fields.items()
        usual = {key: field.get_default(call_default_factory=True) for key, field in fields}
        found = usual | json.loads(path.read_text(encoding="utf-8"))
        # what was refused before its first step left nothing to protect
        holds_work = any(entry.name not in {name, "log.txt"} for entry in folder.iterdir())
        for key in sorted((wanted.keys() | found.keys()) - _NO_PART - settings.grown_from(found)):
            if wanted.get(key) != found.get(key) and holds_work:
                raise InputError(
                    f"{folder} belongs to another configuration: {key} is {found.get(key)!r} there and "
                    f"{wanted.get(key)!r} here; choose another --output"
                )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is no tangora output folder; choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


def adapter_settings(folder: Path) -> RunSettings:
    """Read the settings of a finished run with an adapter.

    Args:
        folder: As for `run_settings`.

    Returns:
        Its settings.

    Raises:
        InputError: If the folder is no run, or holds no adapter.
    """
    settings = run_settings(folder)
    if not (folder / "adapter").is_dir():
        raise InputError(f"{folder} holds no adapter: the run has not finished, or trained all weights")
    return settings

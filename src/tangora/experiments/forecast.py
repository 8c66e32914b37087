"""`tangora compare --dry-run`: what a comparison would run and what it would need, without a run.

Nothing is downloaded or written: data and configurations that only the hub has are left alone.
"""

from dataclasses import dataclass

from tangora._checks import InputError, reason
from tangora._names import Kind
from tangora.experiments.comparison.paper import Paper
from tangora.experiments.comparison.plan import CompareSettings, PlanSettings
from tangora.experiments.comparison.sweep import planned
from tangora.experiments.run.estimate import Memory, estimate
from tangora.experiments.run.preparing import check_against_data, load_run_task
from tangora.recipes import recipe
from tangora.training.data import is_hub_data
from tangora.training.models.empty_model import read_config


@dataclass(frozen=True)
class RecipeForecast:
    """Forecast for one recipe of a comparison."""

    recipe: str
    learning_rates: tuple[float, ...]
    memory: Memory | None
    """Memory of one run; `None` where it cannot be estimated."""


@dataclass(frozen=True)
class Forecast:
    """Forecast of one comparison."""

    settings: CompareSettings
    recipes: tuple[RecipeForecast, ...]
    examples: tuple[int, int, int] | None
    """Numbers of training, validation and test examples; `None` for data on the hub."""
    runs: int
    """As far as they are known: `halving` decides on further ones."""
    further_runs: int
    """The most that `extend` and `refine` may add."""
    steps: int | None
    """Optimizer steps of one run; `None` for epochs over data whose size is not known."""
    missing: str | None
    """Why there is no estimate of the memory."""

    @property
    def paper(self) -> Paper | None:
        """Published results, if the plan holds any."""
        return self.settings.paper


def forecast(settings: CompareSettings | PlanSettings) -> dict[str, Forecast]:
    """Tell what a comparison, or each task of a plan, would run.

    Returns:
        By the task's name, which is empty for a comparison alone.

    Raises:
        InputError: If data that are here cannot be read, or a recipe cannot be prepared on a model.
    """
    if isinstance(settings, CompareSettings):
        return {"": _forecast(settings)}
    found = {}
    for name, task in settings.tasks.items():
        try:
            found[name] = _forecast(task)
        except InputError as problem:
            raise InputError(f"{name}: {problem}") from problem
    return found


def _forecast(settings: CompareSettings) -> Forecast:
    examples, kind, num_labels = None, settings.kind, 2
    if not any(is_hub_data(name) for name in (settings.data, settings.test_data) if name is not None):
        task = load_run_task(settings)
        examples = (len(task.train), len(task.validation), len(task.test))
        kind, num_labels = task.kind, len(task.labels) or 2
        settings = settings.model_copy(update={"kind": kind})
        for name in settings.recipes:
            check_against_data(settings.run(name, settings.grid(name)[0], settings.seeds[0]), task)
    memory, missing = _memory(settings, kind, num_labels)
    num_train = examples[0] if examples is not None else settings.num_train
    return Forecast(
        settings,
        tuple(
            RecipeForecast(name, tuple(settings.grid(name)), memory.get(name)) for name in settings.recipes
        ),
        examples,
        planned(settings, []),
        _further(settings),
        settings.steps if num_train is None else settings.num_steps(num_train),
        missing,
    )


def _further(settings: CompareSettings) -> int:
    swept = sum(recipe(name).trains for name in settings.recipes)
    return swept * settings.sweep_seeds * (settings.extend + 2 * settings.refine)


def _memory(
    settings: CompareSettings, kind: Kind | None, num_labels: int
) -> tuple[dict[str, Memory], str | None]:
    if kind is None:
        return {}, "the data are on the hub, and the plan does not set their kind"
    try:
        config = read_config(settings.model)
    except InputError as problem:
        return {}, str(problem)
    runs = [settings.run(name, settings.grid(name)[0], settings.seeds[0]) for name in settings.recipes]
    try:
        return dict(zip(settings.recipes, estimate(runs, config, kind, num_labels), strict=True)), None
    except InputError:
        raise
    except Exception as error:  # a model's code may ask for numbers, which empty tensors do not have
        return {}, f"{type(error).__name__} in the model's code: {reason(error)}"
